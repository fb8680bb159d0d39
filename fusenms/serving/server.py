"""Runs the app in uvicorn, on a socket, with the time limits that uvicorn lacks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fusenms.errors import ConfigError
from fusenms.safety.text import printable
from fusenms.serving.settings import ServeSettings

if TYPE_CHECKING:
    from starlette.applications import Starlette

HEAD_BYTES = 64 * 1024
"""Maximum size of the head of a request."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 is a free one.

    Raises:
        ConfigError: there is no such host, or the port is taken.
    """
    if not 0 <= port < 65536:
        raise ConfigError(f"port is {port}; expected 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"host {printable(host)}, port {port}: cannot be used ({error}); choose others") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"host {printable(host)}, port {port}: cannot be used ({reason}); choose others") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a socket, for people."""
    return address(*bound.getsockname()[:2])


def address(host: str, port: int) -> str:
    """The address of a host and port, for people."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: Starlette, bound: socket.socket, settings: ServeSettings, on_ready: Callable[[], None]) -> None:
    """Serve an app on a socket until SIGTERM or SIGINT. Then no connections are accepted, and requests that were taken are answered.

    Args:
        on_ready: called once connections are accepted.
    """
    _allow_files(settings.max_connections + 256)
    server_of(app, settings, on_ready).run(sockets=[bound])


def server_of(app: Starlette, settings: ServeSettings, on_ready: Callable[[], None]) -> uvicorn.Server:
    """The server of an app."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=type("Protocol", (_Protocol,), {"settings": settings}),
        ws="none",
        log_config=None,
        log_level="error",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=1024,
        h11_max_incomplete_event_size=HEAD_BYTES,
        timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]
        timeout_graceful_shutdown=settings.shutdown_timeout,  # type: ignore[arg-type]
    )
    server = _Server(config, on_ready)
    app.state.metrics.watch_connections(lambda: len(server.server_state.connections))
    return server


class Stop:
    """Waits for SIGTERM or SIGINT. Signals that come between are not lost."""

    def __init__(self) -> None:
        self._event = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._event.set())

    def wait(self) -> None:
        while not self._event.wait(0.2):  # with a time limit, so that the handler runs on every system
            pass


class _Server(uvicorn.Server):
    """Ends normally after a signal, with what the signal means already done."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():  # signals are those of the main thread
            yield
            return
        older = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in older.items():
                signal.signal(number, handler)


class _Protocol(H11Protocol):
    """A connection that is closed if the head of a request, or the taking of an answer, takes too long, or if there are too many."""

    settings: ServeSettings
    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            transport.write(_TOO_MANY)
            transport.close()
            return
        self._head = self.loop.call_later(self.settings.read_timeout, transport.abort)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        waiting = self.conn.their_state.__name__ == "IDLE"
        if not waiting and self._head is not None:
            self._head.cancel()
            self._head = None
        elif waiting and self._head is None:
            self._head = self.loop.call_later(self.settings.read_timeout, self.transport.abort)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._taking is not None:
            self._taking.cancel()
        self._taking = self.loop.call_later(self.settings.read_timeout, self._abort_if_not_taken)

    def _abort_if_not_taken(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head, self._taking):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


_MESSAGE = json.dumps({"error": "the server has as many connections as it may have; try again"}).encode()
_TOO_MANY = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_MESSAGE), _MESSAGE)
)


def _allow_files(count: int) -> None:
    """Let the process have as many open files, as far as the system does."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
