"""A server that takes no more than it was made for: what may be sent to it, how much, and for how long."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from ..data.decoding import shown
from .refusals import RefusedError, check_content, check_route, check_senders

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Server = Callable[[Message, Receive, Send], Awaitable[None]]  # of ASGI

# With them gradio would believe a caller about the address at which it is.
UNHEARD = (b"x-forwarded-host", b"x-gradio-server")


@dataclass
class LimitedRequests:
    """Receives requests whole, within limits, and gives on those that the page takes.

    Refused are, with their status: those of elsewhere (403), for what the page does not need (404), with
    what is no JSON or has a file in it (400), that are too large (413) or too slow (408), and those that come
    while too many others are served or received (503).

    Attributes:
        server: what the others go to.
        most_bytes: of what a request carries.
        most_held: bytes of all requests that are being received.
        most_seconds: for a request to be received.
        most_open: requests at a time, with those that wait for an answer.
        here_only: take requests that are sent to a loopback address by a page of one, and no others.
    """

    server: Server
    most_bytes: int
    most_held: int
    most_seconds: float
    most_open: int
    here_only: bool = True
    _held: int = field(default=0, init=False)
    _open: int = field(default=0, init=False)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        if scope["type"] == "websocket":  # the page has none
            await send({"type": "websocket.close"})
            return
        if scope["type"] != "http":
            await self.server(scope, receive, send)
            return
        self._open += 1
        try:
            if self._open > self.most_open:
                raise RefusedError(503, f"{self.most_open} requests are served at the moment; come later")
            content = await self._admit(scope, receive)
            await self._serve(_cleared(scope), content, receive, send)
        except RefusedError as refusal:
            await _answer(send, refusal.status, str(refusal))
        finally:
            self._open -= 1

    async def _admit(self, scope: Message, receive: Receive) -> bytes:
        """What a request carries; raise where it is refused."""
        more = True

        async def noted() -> Message:
            nonlocal more
            message = await receive()
            more = message.get("more_body", False)
            return message

        try:
            async with asyncio.timeout(self.most_seconds):
                try:
                    self._check_head(scope)
                    content = await self._receive(noted)
                except RefusedError:
                    # Read to its end, and held nowhere: who still sends does not hear an answer.
                    while more:
                        await noted()
                    raise
        except TimeoutError as error:
            text = f"request: expected all of it within {self.most_seconds:g} s; send it faster"
            raise RefusedError(408, text) from error
        if scope["method"] == "POST":
            check_content(content)
        return content

    def _check_head(self, scope: Message) -> None:
        if self.here_only:
            check_senders(scope["headers"])
        check_route(scope["method"], scope["path"])
        told = dict(scope["headers"]).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.most_bytes:
            raise self._too_large()

    async def _receive(self, receive: Receive) -> bytes:
        parts: list[bytes] = []
        length, more = 0, True
        try:
            while more:
                message = await receive()
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
                length += len(parts[-1])
                self._held += len(parts[-1])
                if length > self.most_bytes:
                    raise self._too_large()
                if self._held > self.most_held:
                    raise RefusedError(
                        503, f"{self.most_held:,} bytes of requests are received at the moment; come later"
                    )
            return b"".join(parts)
        finally:
            self._held -= length

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, f"request: expected at most {self.most_bytes:,} bytes; send smaller pictures"
        )

    async def _serve(self, scope: Message, content: bytes, receive: Receive, send: Send) -> None:
        """Have a request answered that was received, to its end whatever happens."""
        left = [content]
        del content  # held no longer than it takes to read it
        begun = ended = False

        async def given() -> Message:
            return {"type": "http.request", "body": left.pop()} if left else await receive()

        async def noted(message: Message) -> None:
            nonlocal begun, ended
            begun, ended = True, message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            await self.server(scope, given, noted)
        except Exception as error:
            # The server would print it as it is, with all that a caller wrote in it.
            if not begun:
                print(
                    f"viar: {scope['method']} {shown(scope['path'])[:100]}: {shown(error)[:200]}",
                    file=sys.stderr,
                )
                raise RefusedError(
                    400, "request: not understood; see what the page and its calls send"
                ) from error
            if not ended:
                await send({"type": "http.response.body", "body": b""})


def _cleared(scope: Message) -> Message:
    """The request without what no part of the page listens to, and gradio would."""
    headers = [(name, value) for name, value in scope["headers"] if name not in UNHEARD]
    query = b"" if scope["method"] == "POST" else scope.get("query_string", b"")
    return {**scope, "headers": headers, "query_string": query}


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": text}).encode()})
