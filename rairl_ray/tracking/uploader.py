"""Sends a run folder's spool to MLflow, by three queues, each of them a thread.

Queue `status` opens and closes the run, `rows` carries metrics and parameters, `files` tables and artifacts.
They do not wait for each other: neither a slow upload nor a refused row keeps a run from being closed.
A record is carried at least once, and has the effect of once (mlflow_run.py).
"""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import brief
from rairl_ray.tracking.mlflow_run import MlflowRun, Warn, joins
from rairl_ray.tracking.spool import Record, Spool, read_records

KINDS = {
    "status": ("start", "finish"),
    "rows": ("metrics", "params"),
    "files": ("text", "table", "artifact"),
}
"""Queue -> the records that it carries, in their order."""
LONGEST_PAUSE_SECONDS = 30.0
"""Between two attempts at a server that is down; the first pauses are shorter."""


class Uploader:
    """A spool, its run in MLflow and the queues between them; opening one only reads the spool's cursor."""

    def __init__(
        self, uri: str, output: Path, folder: Path, warn: Warn, resume_run_id: str | None = None
    ) -> None:
        self.spool = Spool(folder, server_name(uri, output), resume_run_id)
        self.run = MlflowRun(uri, output, self.spool, warn)
        self._warn = warn
        self._failures = dict.fromkeys(KINDS, 0)
        """Queue -> attempts in a row that came to nothing."""
        self._hurry = threading.Event()

    def start(self) -> None:
        """Begin to carry, in the background, what is in the spool and what comes."""
        for queue in KINDS:
            # A daemon: a hanging server must not keep a finished program alive.
            threading.Thread(target=self._loop, args=[queue], name=f"tracking-{queue}", daemon=True).start()

    def finish(self, status: str, session: str, seconds: float) -> bool:
        """Close the run and end; whether everything arrived within so many seconds."""
        deadline = time.monotonic() + seconds
        # Rows first, so that whoever sees the terminal status sees the whole run; but not at its cost.
        self.run.before_finish = lambda position: self.spool.wait_for(
            lambda: self._failures["rows"] or self._offset("rows") >= position, seconds / 2
        )
        position = self.spool.put({"kind": "finish", "status": status, "session": session})
        self._hurry.set()
        self.spool.wait_for(lambda: self._carried(position), deadline - time.monotonic())
        self.spool.close()
        return self._carried(position)

    def once(self) -> bool:
        """Carry all that is there on this thread; whether all arrived. Raises what MLflow raises."""
        self.run.before_finish = lambda position: self._carry("rows")
        for queue in KINDS:
            self._carry(queue)
        return self._carried(self.spool.size())

    def _offset(self, queue: str) -> int:
        """Everything before it is carried."""
        return self.spool.cursor[f"{queue}_offset"]

    def _carried(self, position: int) -> bool:
        return all(self._offset(queue) >= position for queue in KINDS)

    def _carry(self, queue: str) -> None:
        """Carry what a queue has now, and save after each request how far it came."""
        if queue != "status" and not self.run.exists():
            return
        key, batch, reached = self.spool.cursor["key"], list[Record](), self._offset(queue)
        for record, position in read_records(self.spool.path, *KINDS[queue], start=reached):
            if record is not None and batch and not joins(batch, record):
                if not self._send(queue, key, batch, reached):
                    return
                batch = []
            if record is not None:
                batch.append(record)
            reached = position
        self._send(queue, key, batch, reached)

    def _send(self, queue: str, key: str, batch: list[Record], reached: int) -> bool:
        """False where it is not ours to go on: after the end, or with the history under another key."""
        # The folder may have been moved before its file was opened.
        if reached == self._offset(queue) or not self.spool.in_place():
            return False
        if batch:
            self.run.apply(batch, reached)
        # Only what was carried is worth a write: to skip other queues' records again costs nothing.
        return self.spool.advance(key, {f"{queue}_offset": reached}, save=bool(batch))

    def _loop(self, queue: str) -> None:
        while not self.spool.ended:
            seen = self.spool.changes
            try:
                if not self.spool.own():
                    # The process that sends what an earlier one left here is not done yet.
                    time.sleep(1.0)
                    continue
                self._carry(queue)
                self._failures[queue] = 0
                self.spool.wait_for_change(seen)
            except Exception as error:
                self._failures[queue] += 1
                self.spool.notify()
                # Once is nothing: SQLite answers "locked" at once where two of our queues write.
                if self._failures[queue] > 1 and not self.spool.ended:
                    place = self.spool.path
                    self._warn("down", f"MLflow is out of reach, metrics wait in {place}: {brief(error)}")
                if self._hurry.is_set():
                    time.sleep(1.0)
                else:
                    # No change: a writer that goes on writing must not become the clock of the attempts.
                    self._hurry.wait(min(LONGEST_PAUSE_SECONDS, 2.0 ** self._failures[queue]))


def tracking_uri(config: RunConfig, output: Path) -> str | None:
    """MLflow's address for runs below `output`; None where tracking is off."""
    uri = config.tracking.uri or f"sqlite:///{output / 'mlflow.db'}"
    return None if uri == "none" else uri


def server_name(uri: str, output: Path) -> str:
    """What a cursor may remember of an address, which may contain a password.

    Of a database in the output folder no more than its name there, so that the folder may be moved.
    """
    return hashlib.sha256(uri.replace(f"{output}/", "").encode()).hexdigest()[:16]
