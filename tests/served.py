"""A server on a real socket, in a thread or in a process of its own, and a client that sends what it is told."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusenms import ServeSettings, asgi_app
from fusenms.serving.models import Model, Models

for package in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="needs the packages of the extra serve: pip install 'fusenms[serve]'")

SECONDS = 60
"""A test fails if what it waits for does not happen in this time."""


class Server:
    """A running server."""

    def __init__(self, host: str, port: int, models: Models | None = None, process: Any = None) -> None:
        self.host, self.port, self.models, self.process = host, port, models, process

    def model(self, name: str = "shapes") -> Model:
        assert self.models is not None
        return self.models[name]

    def call(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (in small letters) and body of an answer."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def post(self, path: str, body: Any, kind: str = "application/octet-stream", **headers: str) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        status, _, answer = self.call("POST", path, body, {"Content-Type": kind} | headers)
        return status, json.loads(answer)

    def get(self, path: str) -> tuple[int, Any]:
        status, _, answer = self.call("GET", path)
        return status, json.loads(answer)

    def metric(self, line: str) -> float:
        """The value of a line of /metrics; 0 if there is none."""
        text = self.call("GET", "/metrics")[2].decode()
        return next((float(row.rsplit(" ", 1)[1]) for row in text.splitlines() if row.startswith(line + " ")), 0.0)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), SECONDS)


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes; a reset counts as closed."""
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


def request(path: str, body: bytes, **headers: str) -> bytes:
    """The bytes of a request that closes its connection."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


@contextmanager
def in_thread(*files: Path, **settings: Any) -> Iterator[Server]:
    """A server in this process; it does not watch its files unless told to."""
    from fusenms.serving import server

    own = ServeSettings(**{"watch": 0.0, "threads": 1} | settings)
    app = asgi_app(files, own)
    bound, ready = server.listen("127.0.0.1", 0), threading.Event()
    runs = server.server_of(app, own, ready.set)
    thread = threading.Thread(target=lambda: runs.run(sockets=[bound]))
    thread.start()
    try:
        assert ready.wait(SECONDS)
        host, port = bound.getsockname()
        yield Server(host, port, app.state.models)
    finally:
        runs.should_exit = True
        thread.join(SECONDS)
        app.state.models.close()
        assert not thread.is_alive()


@contextmanager
def in_process(*words: str) -> Iterator[Server]:
    """`fusenms serve` with some arguments, in a process of its own."""
    command = [sys.executable, "-m", "fusenms", "serve", *words, "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("}"):
                    break
            assert lines, process.stderr.read()
            host, port = json.loads("".join(lines))["url"].removeprefix("http://").rsplit(":", 1)
            yield Server(host, int(port), process=process)
        finally:
            process.kill()
