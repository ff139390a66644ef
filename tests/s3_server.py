"""A real S3 server (moto's) in a process of its own, and a line to it that can be cut and mended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.mlflow_server import answers, free_port

BUCKET = "results"


@contextmanager
def s3_server() -> Iterator[str]:
    """Its address; it has BUCKET, and takes any credentials until `refuse_all`."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, "moto's server did not start"
            time.sleep(0.1)
        send(f"http://127.0.0.1:{port}/{BUCKET}", "PUT")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def send(url: str, method: str, body: bytes = b"") -> None:
    request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=30).close()


@contextmanager
def refusing_all(server: str) -> Iterator[None]:
    """The server knows no user while this lasts: every request is refused."""
    send(f"{server}/moto-api/reset-auth", "POST", b"0")
    try:
        yield
    finally:
        send(f"{server}/moto-api/reset-auth", "POST", b"inf")


class Line:
    """A way to the server: `cut` refuses new connections and ends those there are."""

    def __init__(self, server: str) -> None:
        self._target = ("127.0.0.1", int(server.rpartition(":")[2]))
        self._port = free_port()
        self._open: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.uri = f"http://127.0.0.1:{self._port}"
        self.mend()

    def mend(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        assert self._listener is not None
        for end in (self._listener, *self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                outer, _ = listener.accept()
                inner = socket.create_connection(self._target)
                self._open |= {outer, inner}
                for source, target in ((outer, inner), (inner, outer)):
                    threading.Thread(target=self._copy, args=(source, target), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)
