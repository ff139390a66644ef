"""Uploads a run folder's tracking spool to MLflow, by three queues.

Queue `status` opens and closes the run, `rows` carries metrics and parameters, `files` tables and artifacts.
They do not wait for each other: neither a slow upload nor a refused row keeps a run from being closed.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rairl_ray.config.schema import RunConfig
from rairl_ray.tracking.mlflow_run import MlflowRun, Warn, joins
from rairl_ray.tracking.spool import Spool, UploadQueue
from rairl_ray.tracking.unsent import CURSOR, SPOOL


class Uploader:
    """The spool and its queues; opening one touches no network and changes nothing on disk."""

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
        self.spool = Spool(
            folder / SPOOL,
            folder / CURSOR,
            lambda saved: _cursor(saved, server_names(uri, output), resume_run_id),
        )
        self.run = MlflowRun(uri, output, self.spool, warn)

        def queue(name: str, *kinds: str, apply: Any, **options: Any) -> UploadQueue:
            return UploadQueue(self.spool, name, kinds, apply, on_failure=on_failure, **options)

        run = self.run
        self.status = queue("status", "start", "finish", apply=run.apply_status, ready=lambda: True)
        self.rows = queue("rows", "metrics", "params", apply=run.apply_rows, ready=run.exists, joins=joins)
        self.files = queue("files", "text", "table", "artifact", apply=run.apply_file, ready=run.exists)
        self.queues = (self.status, self.rows, self.files)

    def drain(self, position: int, seconds: float) -> bool:
        """Carry everything before `position` and end; whether all of it arrived within so many seconds."""
        for queue in self.queues:
            queue.hurry()
        with self.spool.changed:
            self.spool.changed.wait_for(lambda: self._carried(position), seconds)
        self.spool.close()
        return self._carried(position)

    def once(self) -> bool:
        """Carry all that is there on this thread; whether all arrived. Raises what MLflow raises."""
        self.run.before_finish = lambda position: self.rows.once()
        key = None
        while key != self.spool.cursor["key"]:
            key = self.spool.cursor["key"]
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


def _cursor(saved: dict[str, Any] | None, names: list[str], run_id: str | None) -> dict[str, Any]:
    """The saved cursor if it belongs to this server, else one at the beginning: it gets the whole history."""
    fresh: dict[str, Any] = {
        "server": names[0], "key": uuid.uuid4().hex, "run_id": None, "session": None, "closed": False,
        "status_offset": 0, "rows_offset": 0, "files_offset": 0,
    }  # fmt: skip
    if saved is not None:
        ours = saved.get("server") in names and saved.keys() == fresh.keys()
        return saved | {"server": names[0]} if ours else fresh
    # A lost cursor: everything in the spool may have arrived, and does no harm twice.
    return fresh | {"run_id": run_id}
