"""Headless Chromium on a page of a folder, served on loopback. What the page sends to /result comes back."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip
SECONDS = 120.0


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, results: queue.Queue[Any], **kwargs: Any) -> None:
        self._results = results
        super().__init__(*args, **kwargs)

    def do_POST(self) -> None:
        self._results.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def result_of(folder: Path, page: str) -> Any:
    """Open a page of a folder; return the JSON that it sends.

    Raises:
        queue.Empty: it sent nothing in time.
    """
    assert CHROMIUM is not None
    results: queue.Queue[Any] = queue.Queue()
    handler = partial(_Handler, results=results, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{page}"
        browser = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            return results.get(timeout=SECONDS)
        finally:
            browser.terminate()
            browser.wait(timeout=SECONDS)
            server.shutdown()
