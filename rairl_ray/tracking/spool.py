"""The history of a run, as MLflow is to have it: a line a record; beside it a cursor says how far it is sent.

`Spool.put` appends a line and returns: whatever MLflow does, the writer waits for nothing but its own disk, and
nothing piles up in memory. The file is never shortened, so that everything can be sent again (`restart`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rairl_ray.files import append_line, write_atomic

SPOOL = "tracking_spool.jsonl"
CURSOR = "tracking_cursor.json"

Record = dict[str, Any]
"""A line: its `kind`, what that kind says, and its time `time_ms`."""


class Spool:
    """The two files of one run folder, and the lock of the one process that sends them.

    `cursor["key"]` names the attempt at sending the history: `restart` draws a new one, and whoever still works
    for an older one cannot change the cursor any more.
    """

    def __init__(self, folder: Path, server: str, run_id: str | None = None) -> None:
        """`server` names the receiver; `run_id` is the run's where the cursor is lost."""
        self.path, self._server, self._known_id = folder / SPOOL, server, run_id
        self.owned = self.ended = False
        self.elsewhere = False
        """Whether what was sent so far went to another server."""
        self.cursor = self._read_cursor()
        self.changed, self.changes = threading.Condition(), 0
        """Notified, and counted, when there is a new record, a queue came further or failed, or it ended."""
        self._writing, self._changing = threading.Lock(), threading.Lock()
        self._lock_file: IO[str] | None = None

    def put(self, record: Record) -> int:
        """Append a record, its `kind` first, with its time; returns the offset in bytes of its end.

        Raises OSError for a full disk, TypeError for what JSON has not.
        """
        line = json.dumps({"kind": record["kind"], **record, "time_ms": time.time_ns() // 1_000_000})
        with self._writing:
            append_line(self.path, line)
            position = self.size()
        self.notify()
        return position

    def size(self) -> int:
        """Bytes of the whole history."""
        return self.path.stat().st_size if self.path.exists() else 0

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def wait_for(self, condition: Callable[[], Any], seconds: float | None = None) -> None:
        """Wait until a condition holds that only changes of this spool make true, so many seconds at most."""
        with self.changed:
            self.changed.wait_for(condition, seconds)

    def wait_for_change(self, seen: int) -> None:
        """Wait until there was a change after the first `seen`."""
        self.wait_for(lambda: self.changes != seen)

    def advance(self, key: str, changes: dict[str, Any], save: bool = True) -> bool:
        """Change the cursor; False, and no change, if `key` is no longer its key or after the end."""
        with self._changing:
            if self.cursor["key"] != key or not self.in_place():
                return False
            self.cursor = self.cursor | changes
            if save:
                self._write_cursor()
        self.notify()
        return True

    def restart(self, key: str) -> None:
        """Send everything again from the first record, to a new run."""
        self.advance(key, self._fresh())

    def own(self, strict: bool = False) -> bool:
        """Become the one process that sends this spool, until `close` or this process ends in any way.

        False while another one is. On file systems without locks: True, or False if `strict`.
        """
        with self._changing:
            if self.owned or self.ended:
                return self.owned
            file = open(self.path.with_name(f".{self.path.stem}.lock"), "a")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                if strict or isinstance(error, BlockingIOError):
                    return False
            else:
                self._lock_file = file
            # Again, because another process may have sent in the meantime.
            self.cursor = self._read_cursor()
            self._write_cursor()
            self.owned = True
            return True

    def in_place(self) -> bool:
        """False, and the end, once the folder was moved whose lock we have: another one may have its name."""
        file = self._lock_file  # `close` may take it at any moment
        if file is not None:
            try:
                here = os.path.samestat(os.fstat(file.fileno()), os.stat(file.name))
            except (OSError, ValueError):
                here = False
            self.ended = self.ended or not here
        return not self.ended

    def close(self) -> None:
        """From now on the spool belongs to the next process."""
        with self._changing:
            if self.owned and self.in_place():
                with contextlib.suppress(OSError):
                    self._write_cursor()
            self.ended = True
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None
        self.notify()

    def _write_cursor(self) -> None:
        write_atomic(self.path.with_name(CURSOR), json.dumps(self.cursor))

    def _read_cursor(self) -> dict[str, Any]:
        """The saved cursor if it is of this server, else one at the beginning: it gets the whole history."""
        saved, fresh = saved_cursor(self.path.parent), self._fresh()
        if not saved:
            # Everything may have arrived, and does no harm twice.
            return fresh | {"run_id": self._known_id}
        self.elsewhere = saved.get("server") != self._server
        return fresh if self.elsewhere or saved.keys() != fresh.keys() else saved

    def _fresh(self) -> dict[str, Any]:
        return {
            "server": self._server, "key": uuid.uuid4().hex, "run_id": None, "session": None,
            "closed": False, "status_offset": 0, "rows_offset": 0, "files_offset": 0,
        }  # fmt: skip


def read_records(path: Path, *kinds: str, start: int = 0) -> Iterator[tuple[Record | None, int]]:
    """Whole lines behind the offset `start` with their positions; None for other kinds and torn lines."""
    if not path.exists():
        return
    prefixes = tuple(f'{{"kind": "{kind}"'.encode() for kind in kinds)
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            if not line.endswith(b"\n"):
                return
            start += len(line)
            record = None
            if line.startswith(prefixes):
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
            yield record, start


def saved_cursor(folder: Path) -> dict[str, Any]:
    """Empty where there is no readable one, as of a driver that died before it sent anything."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads((folder / CURSOR).read_bytes())
    return {}


def unfinished(folder: Path) -> bool:
    """Whether MLflow lacks something of a folder with a spool, or its run is not closed."""
    cursor = saved_cursor(folder)
    offsets = [value for name, value in cursor.items() if name.endswith("_offset")]
    return not cursor or not cursor["closed"] or min(offsets) < (folder / SPOOL).stat().st_size


def first_session(folder: Path) -> str | None:
    """The session of a run's first start, which never changes and so names its spool; None without one."""
    starts = read_records(folder / SPOOL, "start")
    return next((record["session"] for record, _ in starts if record is not None), None)
