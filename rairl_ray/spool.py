"""A durable queue on disk with one background thread that carries its records to a slow or dead receiver.

`put` appends one line to a JSONL file and returns. The thread applies the lines in order and saves after
each one how far it came, so that the next process goes on there. A record is applied at least once:
`apply` must have the same effect twice as once. The file is never shortened, it is the whole history.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rairl_ray.files import append_line, read_json_lines, write_atomic

RETRY_SECONDS = 30.0


class Spool:
    """One queue: the lines in `path`, the cursor beside them in `cursor_path`."""

    def __init__(
        self,
        path: Path,
        cursor_path: Path,
        *,
        cursor: dict[str, Any],
        same: tuple[str, ...],
        apply: Callable[[dict[str, Any]], None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Go on from the saved cursor where it equals `cursor` in the keys `same`, else begin with `cursor`."""
        self.path, self._cursor_path = path, cursor_path
        self._apply, self._on_failure = apply, on_failure
        self._wake, self._last_try = threading.Event(), threading.Event()
        self._write, self._progress = threading.Lock(), threading.Condition()
        self._passes, self._ended = 0, False
        self.cursor = {**cursor, "offset": 0}
        with contextlib.suppress(OSError, ValueError, KeyError):
            saved = json.loads(cursor_path.read_bytes())
            if all(saved[key] == cursor[key] for key in same):
                self.cursor = saved
        self.advance()

    def history(self) -> list[dict[str, Any]]:
        """All records so far, of this process and earlier ones."""
        return read_json_lines(self.path, skip_broken=True) if self.path.exists() else []

    def put(self, record: dict[str, Any]) -> None:
        """Append a record with its time. Raises OSError for a full disk, TypeError for what JSON has not."""
        line = json.dumps({**record, "time_ms": time.time_ns() // 1_000_000})
        with self._write:
            append_line(self.path, line)
        self._wake.set()

    def advance(self, **changes: Any) -> None:
        """Change and save the cursor. After the end it belongs to the next process, and nothing happens."""
        with self._progress:
            if self._ended:
                return
            self.cursor = {**self.cursor, **changes}
            write_atomic(self._cursor_path, json.dumps(self.cursor))
            self._progress.notify_all()

    def start(self, ready: Callable[[], bool], wait_seconds: float) -> None:
        """Begin, and wait until `ready()`, the first attempt has ended, or so many seconds passed."""
        # A daemon: a hanging receiver must not keep a finished program alive.
        threading.Thread(target=self._loop, name="spool", daemon=True).start()
        with self._progress:
            self._progress.wait_for(lambda: ready() or self._passes > 0, wait_seconds)

    def drain(self, timeout_seconds: float) -> bool:
        """Carry what is left and end; whether all arrived. A receiver that is down gets one more attempt."""
        self._last_try.set()
        self._wake.set()
        with self._progress:
            # The pass that runs now may have missed the newest line; the one after it cannot.
            last = self._passes + 2
            self._progress.wait_for(lambda: self._all_carried() or self._passes >= last, timeout_seconds)
            self._ended = True
            return self._all_carried()

    def _all_carried(self) -> bool:
        return not self.path.exists() or self.cursor["offset"] >= self.path.stat().st_size

    def _loop(self) -> None:
        while not self._ended:
            self._wake.clear()
            failed = False
            try:
                for record, end in self._pending():
                    if self._ended:
                        return
                    self._apply(record)
                    self.advance(offset=end)
            except Exception as error:
                failed = True
                self._on_failure(error)
            with self._progress:
                self._passes += 1
                self._progress.notify_all()
            if failed:
                self._last_try.wait(1.0)
            if not self._last_try.is_set():
                self._wake.wait(RETRY_SECONDS if failed else None)

    def _pending(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Whole lines behind the cursor, each with the offset of its end; a torn one is an empty record."""
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            file.seek(self.cursor["offset"])
            for line in file:
                if not line.endswith(b"\n"):
                    return
                record = {}
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                yield record, self.cursor["offset"] + len(line)
