"""Bodies of requests, and what clients do beside sending them: too much, too slowly, or going away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusenms.serving.settings import ServeSettings

T = TypeVar("T")
LINGER_SECONDS, LINGER_BYTES = 2.0, 64 * 2**20
"""What is read and thrown away of a body that was refused, so that its client gets the answer: one that still sends would lose it."""
RETRY_AFTER = {"Retry-After": "1"}


class GoneError(Exception):
    """The client has closed the connection."""


class Bodies:
    """Reads bodies within the limits of a server, all of them together too."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings, self._held = settings, 0

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """Read a body, which counts as held until the end.

        Raises:
            HTTPException: 413 it is too large, 408 it comes too slowly, 415 it is compressed, 503 too many bodies are held.
            GoneError: the client is gone.
        """
        most, until = self._settings.max_body, time.monotonic() + self._settings.read_timeout
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise HTTPException(415, f"found a body with Content-Encoding {encoding[:40]!r}; expected none")
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 20) or int(length) > most:
            raise HTTPException(413, f"found a body of {length[:40]} bytes; expected at most {most}")
        parts, size = [], 0
        try:
            while True:
                try:
                    message = await asyncio.wait_for(request.receive(), max(until - time.monotonic(), 0.001))
                except asyncio.TimeoutError:
                    seconds = self._settings.read_timeout
                    raise HTTPException(
                        408, f"found {size} bytes of a body after {seconds:g} s; expected all of it"
                    ) from None
                if message["type"] == "http.disconnect":
                    raise GoneError
                part = message.get("body", b"")
                size += len(part)
                self._held += len(part)
                parts.append(part)
                if size > most:
                    raise HTTPException(413, f"found a body of more than {most} bytes; expected at most so many")
                if self._held > self._settings.max_bodies:
                    raise HTTPException(503, "too many requests are read at this moment; try again", RETRY_AFTER)
                if not message.get("more_body", False):
                    break
            body = b"".join(parts)
            parts.clear()
            yield body
        finally:
            self._held -= size


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do work for a client whose body was read. It is cancelled if the client goes away.

    Raises:
        GoneError: it did.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise GoneError
    finally:
        for each in (task, gone):
            if not each.done():
                each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Lingering:
    """Around an app: the answer to a request whose body was not read is sent at once, then some of the body is thrown away.

    The connection is closed after it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, late = Headers(scope=scope), False
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"

        async def receive_and_note() -> Message:
            nonlocal unread
            message = await receive()
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                unread = False
            return message

        async def send_and_linger(message: Message) -> None:
            nonlocal late
            if unread and message["type"] == "http.response.start":
                late = message["status"] == 408
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            if not unread or message["type"] != "http.response.body" or message.get("more_body", False):
                await send(message)
                return
            await send({**message, "more_body": True})
            if not late and "expect" not in headers:  # such a client waits for the answer before it sends
                with suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(_discard(receive_and_note), LINGER_SECONDS)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, receive_and_note, send_and_linger)


async def _discard(receive: Receive) -> None:
    size = 0
    while size < LINGER_BYTES:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
