"""A server that takes no more than it was made for: what may be sent to it, and how much."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Server = Callable[[Message, Receive, Send], Awaitable[None]]  # of ASGI


class TooLargeError(Exception):
    """More was sent than may be."""


@dataclass(frozen=True)
class LimitedRequests:
    """Refuses requests that are too large, with status 413, before they are held in memory.

    Attributes:
        server: what the others go to.
        most_bytes: of what a request carries.
        without: paths of the server that are answered as if they were not there, with status 404.
    """

    server: Server
    most_bytes: int
    without: tuple[str, ...] = ()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Serve one connection, as ASGI has it."""
        received, answered = 0, False

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most_bytes:
                raise TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        told = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if told.isdigit() and int(told) > self.most_bytes:
            await self._refuse(receive, send)
            return
        if str(scope.get("path", "")).rstrip("/") in self.without:
            await _answer(send, 404, "not found")
            return
        try:
            await self.server(scope, counted, noted)
        except TooLargeError:
            if answered:
                raise
            await self._refuse(receive, send)

    async def _refuse(self, receive: Receive, send: Send) -> None:
        # Read to its end, and held nowhere: who still sends does not hear an answer.
        while (await receive()).get("more_body"):
            pass
        await _answer(
            send, 413, f"request: expected at most {self.most_bytes:,} bytes; send smaller pictures"
        )


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps({"detail": text}).encode()})
