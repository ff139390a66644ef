"""A durable queue on disk, and threads that carry its records to a slow, dead or forgetful receiver.

`Spool.put` appends one line to a JSONL file and returns: whatever the receiver does, the writer waits for
nothing but its own disk, and nothing piles up in memory. An `UploadQueue` is a thread that carries the
records of some kinds in order and saves after each batch how far it came, so that the next process goes on
there. What is slow or refused in one queue does not hold up another.

A record is carried at least once: `apply` must have the same effect twice as once. The file is never
shortened, it is the whole history, so that everything can be carried again (`restart`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from rairl_ray.files import append_line, write_atomic

LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts at a receiver that is down; the first pauses are shorter."""

Record = tuple[dict[str, Any], int]
"""A record and its position: the offset in bytes of its end."""


class Spool:
    """One queue: the lines in `path`, and a small dictionary beside them in `cursor_path`.

    `cursor["key"]` names the attempt at carrying the history: `restart` draws a new one, and whoever
    still works for an older one cannot change the cursor any more.
    """

    def __init__(
        self, path: Path, cursor_path: Path, cursor: Callable[[dict[str, Any] | None], dict[str, Any]]
    ) -> None:
        """`cursor` answers where to go on, given the saved cursor, None if there is no readable one."""
        self.path, self._cursor_path, self._choose = path, cursor_path, cursor
        self.cursor = self._read_cursor()
        self.owned = self.ended = False
        self.changed, self.changes = threading.Condition(), 0
        """Notified, and counted, when there is a new record, a queue came further or failed, or it ended."""
        self._write, self._save, self._own = threading.Lock(), threading.Lock(), threading.Lock()
        self._lock_file: IO[str] | None = None

    def put(self, record: dict[str, Any]) -> int:
        """Append a record, its `kind` first, with its time; returns its position.

        Raises OSError for a full disk, TypeError for what JSON has not.
        """
        line = json.dumps({"kind": record["kind"], **record, "time_ms": time.time_ns() // 1_000_000})
        with self._write:
            append_line(self.path, line)
            position = self.size()
        self.notify()
        return position

    def size(self) -> int:
        """Bytes of the whole history."""
        return self.path.stat().st_size if self.path.exists() else 0

    def records(self, *kinds: str, start: int = 0) -> Iterator[tuple[dict[str, Any] | None, int]]:
        """Whole lines behind the offset `start` with their positions; None for other kinds and torn lines."""
        if not self.path.exists():
            return
        prefixes = tuple(f'{{"kind": "{kind}"'.encode() for kind in kinds)
        with open(self.path, "rb") as file:
            if not self.in_place():
                return
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

    def notify(self) -> None:
        """Wake whoever waits for a change."""
        with self.changed:
            self.changes += 1
            self.changed.notify_all()

    def wait_for_change(self, seen: int) -> None:
        """Wait until there was a change after the first `seen`."""
        with self.changed:
            self.changed.wait_for(lambda: self.changes != seen)

    # --- the cursor --------------------------------------------------------------------------------

    def advance(self, key: str, changes: dict[str, Any], save: bool = True) -> bool:
        """Change the cursor; False, and no change, if `key` is no longer its key or after the end."""
        with self._save:
            if self.ended or self.cursor["key"] != key or not self.in_place():
                return False
            self.cursor = self.cursor | changes
            if save:
                self._write_cursor()
        self.notify()
        return True

    def restart(self, key: str, changes: dict[str, Any]) -> None:
        """Carry everything again from the first record; `changes` hold the new key."""
        self.advance(key, {name: 0 for name in self.cursor if name.endswith("_offset")} | changes)

    def _write_cursor(self) -> None:
        write_atomic(self._cursor_path, json.dumps(self.cursor))

    def _read_cursor(self) -> dict[str, Any]:
        saved = None
        with contextlib.suppress(OSError, ValueError):
            saved = json.loads(self._cursor_path.read_bytes())
        return self._choose(saved if isinstance(saved, dict) else None)

    # --- who carries -------------------------------------------------------------------------------

    def own(self, strict: bool = False) -> bool:
        """Become the one process that carries this spool, until `close` or this process ends in any way.

        False while another one is. On file systems without locks: True, or False if `strict`.
        """
        with self._own:
            if self.owned:
                return True
            file = open(self.path.with_name(f".{self.path.stem}.lock"), "a")  # noqa: SIM115
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.close()
                if strict or isinstance(error, BlockingIOError):
                    return False
            else:
                self._lock_file = file
            # Again, because another process may have carried in the meantime.
            self.cursor = self._read_cursor()
            self._write_cursor()
            self.owned = True
            return True

    def in_place(self) -> bool:
        """False, and the end, once the folder that we carry was moved and another one may have its name."""
        if self._lock_file is not None:
            try:
                here = os.path.samestat(os.fstat(self._lock_file.fileno()), os.stat(self._lock_file.name))
            except (OSError, ValueError):
                here = False
            self.ended = self.ended or not here
        return not self.ended

    def close(self) -> None:
        """From now on the spool belongs to the next process."""
        with self._save:
            if self.owned and self.in_place():
                with contextlib.suppress(OSError):
                    self._write_cursor()
            self.ended = True
        self.notify()
        with self._own:
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None


class UploadQueue:
    """Carries the records of some kinds in order, one at a time, or as many as `joins` lets come together."""

    def __init__(
        self,
        spool: Spool,
        name: str,
        kinds: tuple[str, ...],
        apply: Callable[[list[Record]], None],
        *,
        ready: Callable[[], bool],
        on_failure: Callable[[Exception], None],
        joins: Callable[[list[Record], dict[str, Any]], bool] = lambda batch, record: False,
    ) -> None:
        self._spool, self._kinds, self._apply, self._ready = spool, kinds, apply, ready
        self._on_failure, self._joins = on_failure, joins
        self._name, self._offset_name = name, f"{name}_offset"
        self._hurry = threading.Event()
        self.failing = False

    @property
    def offset(self) -> int:
        """Everything before it is carried."""
        return self._spool.cursor[self._offset_name]

    def start(self) -> None:
        """Begin to carry in a thread of its own."""
        # A daemon: a hanging receiver must not keep a finished program alive.
        threading.Thread(target=self._loop, name=f"tracking-{self._name}", daemon=True).start()

    def hurry(self) -> None:
        """The program is about to end: try again every second."""
        self._hurry.set()

    def wait(self, position: int, seconds: float) -> None:
        """Wait until everything before `position` is carried, or this queue fails."""
        with self._spool.changed:
            self._spool.changed.wait_for(lambda: self.failing or self.offset >= position, seconds)

    def once(self) -> None:
        """Carry what is there now. Raises what `apply` raises."""
        finished = False
        while not finished and not self._spool.ended and self._ready():
            finished = self._pass(self._spool.cursor["key"])

    def _pass(self, key: str) -> bool:
        """False if the history has to be carried again under another key."""
        batch: list[Record] = []
        reached = self.offset
        for record, position in self._spool.records(*self._kinds, start=reached):
            if self._spool.ended:
                return True
            if record is not None:
                if batch and not self._joins(batch, record):
                    if not self._carry(key, batch, reached):
                        return False
                    batch = []
                batch.append((record, position))
            reached = position
        return reached == self.offset or self._carry(key, batch, reached)

    def _carry(self, key: str, batch: list[Record], reached: int) -> bool:
        if batch:
            try:
                self._apply(batch)
            except Exception:
                if self._spool.cursor["key"] == key:
                    raise
        # Only what was carried is worth a write: to skip other queues' records again costs nothing.
        carried = self._spool.advance(key, {self._offset_name: reached}, save=bool(batch))
        return carried or self._spool.ended

    def _loop(self) -> None:
        failures = 0
        while not self._spool.ended:
            seen = self._spool.changes
            try:
                if not self._spool.own():
                    # The process that sends what an earlier one left here is not done yet.
                    time.sleep(1.0)
                    continue
                self.once()
                failures = 0
            except Exception as error:
                failures += 1
                # Once is nothing: SQLite answers "locked" at once where two of our queues write.
                if failures > 1 and not self._spool.ended:
                    self._on_failure(error)
            if self.failing != (failures > 0):
                self.failing = failures > 0
                self._spool.notify()
            if not failures:
                self._spool.wait_for_change(seen)
            elif self._hurry.is_set():
                time.sleep(1.0)
            else:
                # Not `changed`: a writer that goes on writing must not become the clock of the attempts.
                self._hurry.wait(min(LONGEST_PAUSE_SECONDS, 2.0**failures))
