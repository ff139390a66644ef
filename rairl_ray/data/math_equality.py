"""Equality of short mathematical expressions, with a deadline that holds in any thread.

math-verify's own timeout needs signals, which work in a main thread only, and `9^{9^{9^9}}` stalls any
in-process check. So it runs in one child process, started at first use, killed when it misses a deadline
and started again for the next pair.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import selectors
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

MAX_LENGTH = 200
"""Longer strings are not compared symbolically."""
PAIR_SECONDS = 3.0
START_SECONDS = 120.0

_log = logging.getLogger(__name__)


class _Worker:
    """One child process; calls from several threads take turns."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        with self._lock:
            process = self._started()
            assert process.stdin is not None
            request = json.dumps({"gold": gold, "answer": answer}) + "\n"
            try:
                process.stdin.write(request.encode())
                process.stdin.flush()
            except BrokenPipeError:
                reply = None
            else:
                reply = _read_line(process, PAIR_SECONDS)
            if reply is None:
                _log.warning(
                    "comparing %r with %r took over %s s: counted as wrong", answer, gold, PAIR_SECONDS
                )
                self._kill()
            return reply == "1"

    def close(self) -> None:
        with self._lock:
            self._kill()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._kill()
        # -P keeps this folder off the child's import path; its own session keeps Ctrl-C for the parent alone.
        command = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if _read_line(self._process, START_SECONDS) != "ready":
            self._kill()
            raise RuntimeError("the math-verify worker did not start: is the package math-verify installed?")
        return self._process

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _read_line(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """One short line of the child, None if it ended or the deadline passed. Lines are atomic: under 4 KiB."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout=seconds):
            return None
    return process.stdout.readline().decode().strip() or None


_worker = _Worker()
atexit.register(_worker.close)


def equal_expressions(gold: str, answer: str) -> bool:
    """Whether math-verify finds both equal; False for anything over 200 characters or past the deadline."""
    if max(len(gold), len(answer)) > MAX_LENGTH or not answer.strip():
        return False
    return _equal(gold, answer)


@lru_cache(maxsize=8192)
def _equal(gold: str, answer: str) -> bool:
    return _worker.equal(gold, answer)
