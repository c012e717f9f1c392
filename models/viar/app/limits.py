"""A server that takes no more than it was made for: how large what is sent to it may be."""

from __future__ import annotations

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
    """

    server: Server
    most_bytes: int

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
            await self._refuse(send)
            return
        try:
            await self.server(scope, counted, noted)
        except TooLargeError:
            if answered:
                raise
            await self._refuse(send)

    async def _refuse(self, send: Send) -> None:
        text = f'{{"detail": "request: expected at most {self.most_bytes:,} bytes; send smaller pictures"}}'
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 413, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})
