"""Sends a run folder's spool to MLflow, by three queues.

Queue `status` opens and closes the run, `rows` carries metrics and parameters, `files` tables and artifacts.
They do not wait for each other: neither a slow upload nor a refused row keeps a run from being closed.
A record is carried at least once, and has the effect of once (mlflow_run.py).
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rairl_ray.config.schema import RunConfig
from rairl_ray.tracking.mlflow_run import MlflowRun, Warn, joins
from rairl_ray.tracking.spool import Record, Spool, read_records

LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts at a server that is down; the first pauses are shorter."""

KINDS = {
    "status": ("start", "finish"),
    "rows": ("metrics", "params"),
    "files": ("text", "table", "artifact"),
}
"""Queue -> the records that it carries."""


class UploadQueue:
    """Carries the records of some kinds in order, and saves after each request how far it came."""

    def __init__(
        self, name: str, spool: Spool, run: MlflowRun, on_failure: Callable[[Exception], None]
    ) -> None:
        self._name, self._spool, self._run, self._on_failure = name, spool, run, on_failure
        self._hurry = threading.Event()
        self._failures = 0

    @property
    def offset(self) -> int:
        """Everything before it is carried."""
        return self._spool.cursor[f"{self._name}_offset"]

    def start(self) -> None:
        """Begin to carry in a thread of its own."""
        # A daemon: a hanging server must not keep a finished program alive.
        threading.Thread(target=self._loop, name=f"tracking-{self._name}", daemon=True).start()

    def hurry(self) -> None:
        """The program is about to end: try again every second."""
        self._hurry.set()

    def wait(self, position: int, seconds: float) -> None:
        """Wait until everything before `position` is carried, or this queue fails."""
        self._spool.wait_for(lambda: self._failures or self.offset >= position, seconds)

    def once(self) -> None:
        """Carry what is there now. Raises what MLflow raises."""
        if self._name != "status" and not self._run.exists():
            return
        key, batch, reached = self._spool.cursor["key"], list[Record](), self.offset
        for record, position in read_records(self._spool.path, *KINDS[self._name], start=reached):
            if record is not None:
                if batch and not joins(batch, record):
                    if not self._carry(key, batch, reached):
                        return
                    batch = []
                batch.append((record, position))
            reached = position
        self._carry(key, batch, reached)

    def _carry(self, key: str, batch: list[Record], reached: int) -> bool:
        """False where it is no longer ours to go on: after the end, or with the history under another key."""
        # The folder may have been moved before its file was opened.
        if reached == self.offset or not self._spool.in_place():
            return False
        if batch:
            self._run.apply(batch)
        # Only what was carried is worth a write: to skip other queues' records again costs nothing.
        return self._spool.advance(key, {f"{self._name}_offset": reached}, save=bool(batch))

    def _loop(self) -> None:
        while not self._spool.ended:
            seen = self._spool.changes
            try:
                if not self._spool.own():
                    # The process that sends what an earlier one left here is not done yet.
                    time.sleep(1.0)
                    continue
                self.once()
                self._failures = 0
            except Exception as error:
                self._failures += 1
                # Once is nothing: SQLite answers "locked" at once where two of our queues write.
                if self._failures > 1 and not self._spool.ended:
                    self._on_failure(error)
                self._spool.notify()
            self._pause(seen)

    def _pause(self, seen: int) -> None:
        """Until the spool has changed since, or it is time for the next attempt."""
        if not self._failures:
            self._spool.wait_for(lambda: self._spool.changes != seen)
        elif self._hurry.is_set():
            time.sleep(1.0)
        else:
            # A writer that goes on writing must not become the clock of the attempts.
            self._hurry.wait(min(LONGEST_PAUSE_SECONDS, 2.0**self._failures))


class Uploader:
    """A spool, its run in MLflow and the queues between them; opening one only reads its cursor."""

    def __init__(
        self,
        uri: str,
        output: Path,
        folder: Path,
        *,
        warn: Warn,
        on_failure: Callable[[Exception], None],
        resume_run_id: str | None = None,
    ) -> None:
        self.spool = Spool(folder, server_names(uri, output), resume_run_id)
        self.run = MlflowRun(uri, output, self.spool, warn)
        self.queues = [UploadQueue(name, self.spool, self.run, on_failure) for name in KINDS]
        self.rows = self.queues[1]

    def drain(self, position: int, seconds: float) -> bool:
        """Carry everything before `position` and end; whether all of it arrived within so many seconds."""
        for queue in self.queues:
            queue.hurry()
        self.spool.wait_for(lambda: self._carried(position), seconds)
        self.spool.close()
        return self._carried(position)

    def once(self) -> bool:
        """Carry all that is there on this thread; whether all arrived. Raises what MLflow raises."""
        self.run.before_finish = lambda position: self.rows.once()
        for queue in self.queues:
            queue.once()
        return self._carried(self.spool.size())

    def _carried(self, position: int) -> bool:
        return all(queue.offset >= position for queue in self.queues)


def tracking_uri(config: RunConfig, output: Path) -> str | None:
    """MLflow's address for runs below `output`; None where tracking is off."""
    uri = config.tracking.uri or f"sqlite:///{output / 'mlflow.db'}"
    return None if uri == "none" else uri


def server_names(uri: str, output: Path) -> list[str]:
    """What a cursor may remember of an address, which may contain a password.

    The first is what it remembers now: of a database in the output folder, no more than its name there, so that
    the folder may be moved. The last is what earlier versions remembered.
    """
    within = uri.replace(f"{output}/", "")
    return [hashlib.sha256(text.encode()).hexdigest()[:16] for text in (within, uri)]
