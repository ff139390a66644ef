"""What each record of a run's spool does to MLflow, and how it stays true. The only importer of mlflow.

Exactly once, over a line that may be cut anywhere:
- MLflow keeps one row per (run, metric, step, timestamp, value). The timestamp is the record's own, so a
  batch that is sent again after its answer was lost changes nothing.
- A run carries a key of ours as a tag, noted before the run is made: it is found again instead of made twice.
- MLflow never forgets a row: of steps that a resume makes again the spool holds the first measurement alone
  (tracking/tracker.py), so a run keeps its id for ever.

Only the threads of the queues and that of unsent.py come here, but for `import_mlflow`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rairl_ray.errors import brief
from rairl_ray.imports import without
from rairl_ray.metrics import legal_name
from rairl_ray.tracking.spool import Record, Spool

RUN_KEY_TAG = "rairl.run_key"
TAG_LENGTH = 8000
"""MLflow's limit."""
METRICS_AT_ONCE = 1000
"""In one request: as many as MLflow takes."""
FILE_ATTEMPTS = 3
"""A file that a living server does not take so many times is left out."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow's own retries block for minutes and would repeat even the making of a run; the queues retry.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}

Warn = Callable[[str, str], None]
"""Called with a topic and one line; each topic is shown once."""


def import_mlflow() -> None:
    """Import MLflow and touch no network.

    On the calling thread: two threads that import large libraries at once can meet half-made modules.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with without("pandas"):  # for tables of datasets, of which we log none
        import mlflow

        assert mlflow.MlflowClient
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


class MlflowRun:
    """One run in MLflow, as far as the spool's cursor says it exists."""

    def __init__(self, uri: str, output: Path, spool: Spool, warn: Warn) -> None:
        self._uri, self._output, self._spool, self._warn = uri, output, spool, warn
        self._connected: Any = None
        self._refused_names: set[str] = set()
        self._attempts: Counter[str] = Counter()
        self.before_finish: Callable[[int], None] = lambda position: None  # before a terminal state is set

    def exists(self) -> bool:
        """Whether a server gave this run an id."""
        return self._spool.cursor["run_id"] is not None

    def apply(self, batch: list[Record], position: int) -> None:
        """Do what a record says, or several records `metrics`; `position` is the end of the last or later."""
        record, key = batch[0], self._key
        try:
            match record["kind"]:
                case "start":
                    self._open(record)
                case "finish":
                    self._close(record, position)
                case "params":
                    self._log_params(record)
                case "metrics":
                    self._log_metrics(batch)
                case _:
                    self._log_file(record)
        except Exception as error:
            # A server that came back without its database gets the whole history in a new run.
            if self.exists() and _status(error) == 404 and self._is_gone():
                self._warn("gone", "MLflow has lost the run; its history is sent again")
                self._attempts.clear()
                self._spool.restart(key)
            raise

    # --- the run -------------------------------------------------------------------------------------

    @property
    def _key(self) -> str:
        return self._spool.cursor["key"]

    @property
    def _run_id(self) -> str:
        return self._spool.cursor["run_id"]

    def _client(self) -> Any:
        from mlflow import MlflowClient

        if self._connected is None:
            _make_database(self._uri)
            self._connected = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        return self._connected

    def _open(self, record: Record) -> None:
        key = self._key
        if not self.exists():
            self._spool.advance(key, {"run_id": self._find_or_create(record)})
        self._client().update_run(self._run_id, status="RUNNING")
        self._spool.advance(key, {"session": record["session"], "closed": False})
        self._bin_twins()

    def _close(self, record: Record, position: int) -> None:
        if record["session"] != self._spool.cursor["session"]:
            return
        self.before_finish(position)
        self._client().set_terminated(self._run_id, record["status"], record["time_ms"])
        self._bin_twins()
        self._spool.advance(self._key, {"closed": True})

    def _find_or_create(self, record: Record) -> str:
        experiment = self._experiment(record["experiment"])
        if found := self._with_key(experiment):
            return found[0]
        tags = {RUN_KEY_TAG: self._key}
        run = self._client().create_run(experiment, record["time_ms"], tags, record["run_name"])
        return run.info.run_id

    def _with_key(self, experiment: str) -> list[str]:
        found = self._client().search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{self._key}'")
        return sorted(run.info.run_id for run in found)

    def _bin_twins(self) -> None:
        """Move to MLflow's trash what a request made that arrived after we gave it up and made another run."""
        client = self._client()
        found = self._with_key(client.get_run(self._run_id).info.experiment_id)
        for run_id in (twin for twin in found if twin != self._run_id):
            try:
                client.set_terminated(run_id, "KILLED")
                client.delete_run(run_id)
            except Exception as error:
                # An answer that asking again does not change.
                if _status(error) not in (400, 401, 403, 404):
                    raise
                self._warn("bin", f"MLflow keeps the twin {run_id} of this run: {brief(error)}")

    def _experiment(self, name: str) -> str:
        client = self._client()
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        # A server keeps artifacts itself, a database does not.
        database = urlsplit(self._uri).scheme in ("sqlite", "postgresql", "mysql", "mssql", "file", "")
        place = (self._output / "mlartifacts").as_uri() if database else None
        # Raises where another process makes it in the meantime; the next attempt finds that one.
        return client.create_experiment(name, artifact_location=place)

    def _is_gone(self) -> bool:
        try:
            self._client().get_run(self._run_id)
        except Exception as error:
            return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
        return False

    # --- rows ----------------------------------------------------------------------------------------

    def _log_metrics(self, batch: list[Record]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, record["time_ms"], record["step"])
            for record in batch
            for name, value in record["metrics"].items()
            if name not in self._refused_names
        ]
        self._send("metrics", metrics)

    def _log_params(self, record: Record) -> None:
        from mlflow.entities import Param, RunTag

        # MLflow refuses another value for a parameter: after a resume config.yaml has the newest ones.
        has = self._client().get_run(self._run_id).data.params
        params = [Param(name, value) for name, value in record["params"].items() if name not in has]
        self._send("params", params)
        tags = [RunTag(legal_name(name), value[:TAG_LENGTH]) for name, value in record["tags"].items()]
        self._send("tags", tags)

    def _send(self, what: str, items: list[Any]) -> None:
        """Log them; what MLflow will never take is found by halves and left out."""
        try:
            self._client().log_batch(self._run_id, **{what: items})
        except Exception as error:
            # A run that somebody deleted refuses everything: then its rows wait, it may be restored.
            if _status(error) != 400 or self._client().get_run(self._run_id).info.lifecycle_stage != "active":
                raise
            if len(items) > 1:
                self._send(what, items[: len(items) // 2])
                self._send(what, items[len(items) // 2 :])
                return
            name = items[0].key
            if what == "metrics":
                self._refused_names.add(name)
            self._warn(f"{what} {name}", f"MLflow refuses {name!r}, which is left out: {brief(error)}")

    # --- files ---------------------------------------------------------------------------------------

    def _log_file(self, record: Record) -> None:
        """One that cannot be sent holds up nothing for ever."""
        name = record["path" if record["kind"] == "artifact" else "name"]
        try:
            if record["kind"] == "text":
                self._client().log_text(self._run_id, record["text"], record["name"])
            elif record["kind"] == "table":
                self._log_table(record)
            else:
                self._log_artifact(record)
        except Exception as error:
            if _status(error) != 400 and not isinstance(error, FileNotFoundError):
                # Raises where the server is down: then the attempt counts for nothing.
                self._client().get_run(self._run_id)
                self._attempts[name] += 1
                if self._attempts[name] < FILE_ATTEMPTS:
                    raise
                del self._attempts[name]
            self._warn(f"file {name}", f"MLflow does not get {name}: {brief(error)}")

    def _log_table(self, record: Record) -> None:
        # As MlflowClient.log_table, which would append to a table that exists; this replaces it.
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        client = self._client()
        client.log_dict(self._run_id, {"columns": record["columns"], "data": record["data"]}, record["name"])
        tables = json.loads(client.get_run(self._run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": record["name"], "type": "table"}
        tag = json.dumps([*tables, entry])
        if entry not in tables and len(tag) <= TAG_LENGTH:
            client.set_tag(self._run_id, MLFLOW_LOGGED_ARTIFACTS, tag)

    def _log_artifact(self, record: Record) -> None:
        # Relative to the run folder, which may have been moved since.
        path = self._spool.path.parent / record["path"]
        if not (self._spool.in_place() and path.is_file()):
            raise FileNotFoundError(f"{path} is not there any more")
        self._client().log_artifact(self._run_id, str(path), record["place"])


def joins(batch: list[Record], record: Record) -> bool:
    """Whether a record's metrics still go into one request with those of `batch`."""
    rows = [*batch, record]
    fits = sum(len(row.get("metrics", ())) for row in rows) <= METRICS_AT_ONCE
    return fits and all(row["kind"] == "metrics" for row in rows)


def _make_database(uri: str) -> None:
    """Make a new sqlite database beside its place and move it there.

    MLflow makes the tables in dozens of steps: a kill in between leaves a file that no MLflow can open.
    """
    from mlflow import MlflowClient

    path = Path(uri.removeprefix("sqlite:///").split("?")[0])
    if not uri.startswith("sqlite:///") or path.exists() or not path.parent.is_dir():
        return
    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        new = path.with_name(f".{path.name}.new")
        new.unlink(missing_ok=True)
        MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):
            # Not `replace`: somebody may have opened MLflow there in the meantime.
            os.link(new, path)
        new.unlink()


def _status(error: Exception) -> int | None:
    code = getattr(error, "get_http_status_code", None)
    return code() if code else None
