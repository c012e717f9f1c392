"""Which requests the page takes: from where, for what, and with what in them."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from ..data.decoding import shown

Headers = Sequence[tuple[bytes, bytes]]  # of ASGI: names are in lower case

# What the page and `gradio_client` ask for. All else that gradio serves is not there: of the rest some write
# files, fetch from other addresses, or have no queue.
ROUTES = tuple(
    re.compile(route)
    for route in (
        r"(GET|HEAD) /",
        r"GET /(config|theme\.css|favicon\.ico|manifest\.json)",
        r"GET /(assets|static|svelte)/.+",
        r"GET /gradio_api/(info|app_id|startup-events|theme\.css|queue/data|heartbeat/[a-z0-9-]+)",
        r"GET /gradio_api/call/[a-z_]+/[a-z0-9]+",
        r"POST /gradio_api/(queue/join|cancel|reset|call/[a-z_]+)",
    )
)
# What gradio takes for a file, to be fetched and kept; nothing that the page sends has such a name in it.
NAMES_OF_FILES = ("path", "url", "meta")


class RefusedError(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP, for the answer.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def is_loopback(host: str | None) -> bool:
    """Whether a name or an address, without a port, is that of this machine for itself.

    Args:
        host: to look at; default none, which is not.
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def check_senders(headers: Headers) -> None:
    """Raise unless a request is meant for this machine, and comes from no page of elsewhere.

    A name of elsewhere that leads here is another Host, and a page of elsewhere that asks without the user's
    knowledge is another Origin.

    Args:
        headers: of the request.

    Raises:
        RefusedError: with status 403.
    """
    hosts = [b"//" + value for name, value in headers if name == b"host"]
    origins = [value for name, value in headers if name == b"origin"]
    for kind, values in (("Host", hosts or [b""]), ("Origin", origins)):
        for value in values:
            if not is_loopback(_host_of(value)):
                got = shown(value.decode("latin-1").removeprefix("//"))[:100]
                raise RefusedError(
                    403,
                    f"{kind}: expected 127.0.0.1, localhost or [::1], got {got!r}; start viar app with "
                    "--host to serve others",
                )


def check_route(method: str, path: str) -> None:
    """Raise unless the page or its programs need what is asked for.

    Args:
        method: of HTTP.
        path: without what comes after "?".

    Raises:
        RefusedError: with status 404.
    """
    asked = f"{method} {path.rstrip('/') or '/'}"
    if not any(route.fullmatch(asked) for route in ROUTES):
        raise RefusedError(404, "not found")


def check_content(content: bytes) -> None:
    """Raise unless it is a JSON object in which nothing is a file of elsewhere, however deep it stands.

    Args:
        content: of a request.

    Raises:
        RefusedError: with status 400.
    """
    try:
        sent = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, "request: expected JSON; send an object with `data`") from error
    if not isinstance(sent, dict):
        raise RefusedError(400, "request: expected a JSON object, with `data`")
    left: list[object] = [sent]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            if found := [name for name in NAMES_OF_FILES if name in value]:
                raise RefusedError(
                    400, f"request: has an object with {found[0]!r}, as of a file; send pictures in base64"
                )
            left += value.values()
        elif isinstance(value, list):
            left += value


def _host_of(address: bytes) -> str | None:
    try:
        parts = urlsplit(address.decode("ascii"))
        _ = parts.port  # raises where it is none
        return None if parts.username is not None or parts.path else parts.hostname
    except ValueError:
        return None
