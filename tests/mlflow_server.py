"""A real MLflow server in a process of its own, and a proxy before it that delays, cuts, hangs and refuses."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

Fault = Literal["pass", "cut", "hang", "error"]
"""What happens to a request; "cut": the server answers, and the client sees its connection reset."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """`mlflow server` on loopback over sqlite, its whole process group ended afterwards."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    options = ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    options += ["--artifacts-destination", f"{folder}/artifacts"]
    process = subprocess.Popen(
        command + options,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={
            **os.environ,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
    )
    try:
        deadline = time.monotonic() + 240
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, "mlflow server did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


class Proxy:
    """Forwards to `backend`; `fault(method, path)` decides about each request, after `delay_seconds`."""

    def __init__(self, backend: str) -> None:
        self.backend = backend.removeprefix("http://")
        self.fault: Callable[[str, str], Fault] = lambda method, path: "pass"
        self.delay_seconds = 0.0
        self.requests: list[str] = []
        """Method and path of every request, in order."""
        self._closed = threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

            def _serve(self) -> None:
                proxy._serve(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"

    def count(self, part: str) -> int:
        """Requests whose path contains `part`."""
        return sum(part in request for request in self.requests)

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests.append(f"{handler.command} {handler.path}")
        fault = self.fault(handler.command, handler.path)
        self._closed.wait(self.delay_seconds)
        if fault == "hang":
            self._closed.wait()
            return
        if fault == "error":
            handler.send_error(500, "broken on purpose")
            return
        status, headers, answer = self._forward(handler, body)
        if fault == "cut":
            # A reset, not an orderly end.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        handler.send_response(status)
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(answer)))
        handler.end_headers()
        handler.wfile.write(answer)

    def _forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.backend, timeout=120)
        try:
            headers = {name: value for name, value in handler.headers.items() if name.lower() != "host"}
            connection.request(handler.command, handler.path, body, headers)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()


@contextmanager
def proxy(backend: str) -> Iterator[Proxy]:
    made = Proxy(backend)
    try:
        yield made
    finally:
        made.close()
