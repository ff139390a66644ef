"""MLflow tracking that can never hurt a run (DESIGN 6, decision 8). The only importer of mlflow.

Every call writes one line to RUN/tracking_spool.jsonl and returns; the thread of `Spool` carries the
lines to MLflow in order. While a server is down they wait, and the thread (or the next start in this
run folder) goes on from there. A line that is carried twice has the effect of one: MLflow keeps one row
per (metric, step, timestamp, value), the timestamp is the line's own, and the run is found again by a
key. So nothing is lost and nothing doubled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from rairl_ray.config.schema import RunConfig
from rairl_ray.spool import Spool

Status = Literal["FINISHED", "FAILED", "KILLED"]

SPOOL = "tracking_spool.jsonl"
CURSOR = "tracking_cursor.json"
RUN_KEY_TAG = "rairl.run_key"
# MLflow's limits
PARAMS_PER_BATCH, METRICS_PER_BATCH = 100, 1000
PARAM_LENGTH, TAG_LENGTH, KEY_LENGTH = 6000, 8000, 250
LARGEST = 1.7976931348623157e308
"""MLflow's own stand-in for infinity."""

ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow's own retries would block for minutes; the spool retries by itself.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class Tracker:
    """One run's line to MLflow. No method raises because of MLflow, a network or a full disk."""

    def __init__(self, warn: Callable[[str], None] | None = None) -> None:
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned = False
        self._spool: Spool | None = None
        self._logged: dict[str, int] = {}
        self._floor: float = -math.inf

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until a server gave one, and without tracking."""
        return self._spool.cursor["run_id"] if self._spool else None

    def start(
        self,
        config: RunConfig,
        run_folder: str | Path,
        resume_run_id: str | None = None,
        resume_from_step: int | None = None,
        tags: dict[str, str] | None = None,
    ) -> str | None:
        """Open a new MLflow run, or go on with the one of this run folder; its id, None if not known yet.

        Waits two seconds for a server and no longer. `tags` takes what others know (data hash, config
        hash). A metric is logged only past the last step at which an earlier process logged it, and
        past `resume_from_step`. `resume_run_id` is needed only where the run folder lost its cursor.
        """
        output = Path(config.output_dir).absolute()
        uri = config.tracking.uri or f"sqlite:///{output / 'mlflow.db'}"
        if uri == "none":
            return None
        try:
            self._spool = self._open_spool(uri, output, Path(run_folder).absolute(), resume_run_id)
            self._logged = _last_steps(self._spool.history())
            self._floor = -math.inf if resume_from_step is None else resume_from_step
            values = config.model_dump(mode="json")
            self._put(
                {
                    "kind": "start",
                    "experiment": config.tracking.experiment,
                    "run_name": config.name,
                    "params": _flatten(values),
                    "config": _redact(yaml.safe_dump(values, sort_keys=False)),
                    "tags": {**git_state(), **config.tracking.tags, **(tags or {})},
                }
            )
            # A database in a file cannot be down, but its first creation takes seconds.
            self._spool.start(lambda: self.run_id is not None, 2.0 if _is_server(uri) else 60.0)
        except Exception as error:
            self._spool = None
            self._warn_once(f"tracking is off: {_brief(error)}")
        return self.run_id

    def log(self, metrics: dict[str, float], step: int) -> None:
        """All metrics of a step, in one MLflow batch."""
        named = {metric_name(name): float(value) for name, value in metrics.items()}
        kept = {
            name: value
            for name, value in named.items()
            if step > max(self._floor, self._logged.get(name, self._floor))
        }
        if kept:
            self._put({"kind": "metrics", "step": step, "metrics": kept})

    def log_table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Rows of JSON values as the table artifact NAME.json, replacing an earlier one of that name."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._put({"kind": "table", "name": f"{metric_name(name)}.json", "columns": columns, "data": data})

    def log_artifacts(self, folder: str | Path) -> None:
        """Everything below `folder`, under the folder's own name. It is read later: leave it in place."""
        self._put({"kind": "artifacts", "folder": str(Path(folder).absolute())})

    def finish(self, status: Status, timeout_seconds: float = 60.0) -> None:
        """Set the run's terminal status and wait for the spool, unless the server is down."""
        self._put({"kind": "finish", "status": status})
        if self._spool and not self._spool.drain(timeout_seconds):
            self._warn_once(
                "MLflow has not received everything; the rest waits in the run folder for the next start"
            )

    def _open_spool(self, uri: str, output: Path, folder: Path, resume_run_id: str | None) -> Spool:
        # Another server gets the whole history. Only a hash of its address: that may contain a password.
        server = hashlib.sha256(uri.encode()).hexdigest()[:16]
        sink = _Sink(uri, output)
        spool = Spool(
            folder / SPOOL,
            folder / CURSOR,
            cursor={"server": server, "key": uuid.uuid4().hex, "run_id": resume_run_id},
            same=("server",),
            apply=sink.apply,
            on_failure=lambda error: self._warn_once(
                f"MLflow is out of reach, metrics wait in {folder / SPOOL}: {_brief(error)}"
            ),
        )
        sink.spool, sink.warn = spool, self._warn_once
        return spool

    def _put(self, record: dict[str, Any]) -> None:
        if self._spool is None:
            return
        try:
            self._spool.put(record)
        except Exception as error:
            self._warn_once(f"tracking drops a record: {_brief(error)}")

    def _warn_once(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            with contextlib.suppress(Exception):
                self._warn(text)


class _Sink:
    """What each record does to MLflow; only the spool's thread comes here."""

    spool: Spool
    warn: Callable[[str], None]

    def __init__(self, uri: str, output: Path) -> None:
        self._uri, self._output = uri, output
        self._client: Any = None

    @property
    def run_id(self) -> str:
        return self.spool.cursor["run_id"]

    def apply(self, record: dict[str, Any]) -> None:
        """Carry one record. One that MLflow will never accept is dropped, lest it block the rest."""
        actions = {
            "start": self._open_run,
            "metrics": self._log_metrics,
            "table": self._log_table,
            "artifacts": self._log_artifacts,
            "finish": self._finish_run,
        }
        action = actions.get(record.get("kind", "torn"))
        if action is None:
            return
        try:
            self._connect()
            action(record)
        except Exception as error:
            if getattr(error, "error_code", None) not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self.warn(f"MLflow refuses a record ({record['kind']}): {_brief(error)}")

    def _connect(self) -> None:
        if self._client is None:
            for name, value in ENVIRONMENT.items():
                os.environ.setdefault(name, value)
            # Here, because MLflow reads the settings above when it is imported.
            from mlflow import MlflowClient

            for name in ("mlflow", "alembic", "urllib3"):
                logging.getLogger(name).setLevel(logging.ERROR)
            self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)

    def _open_run(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        if self.spool.cursor["run_id"] is None:
            self.spool.advance(run_id=self._find_or_create_run(record))
        run = self._client.get_run(self.run_id)
        if run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        # MLflow refuses another value for a parameter: after a resume config.yaml has the newest ones.
        params = [Param(key, value) for key, value in record["params"].items() if key not in run.data.params]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])
        tags = [RunTag(metric_name(key), value[:TAG_LENGTH]) for key, value in record["tags"].items()]
        self._client.log_batch(self.run_id, tags=tags)
        self._client.log_text(self.run_id, record["config"], "config.yaml")

    def _find_or_create_run(self, record: dict[str, Any]) -> str:
        """A kill between creating a run and noting its id must not leave a second one behind."""
        experiment, key = self._experiment(record["experiment"]), self.spool.cursor["key"]
        found = self._client.search_runs([experiment], f"tags.`{RUN_KEY_TAG}` = '{key}'", max_results=1)
        if found:
            return found[0].info.run_id
        run = self._client.create_run(
            experiment, record["time_ms"], tags={RUN_KEY_TAG: key}, run_name=record["run_name"]
        )
        return run.info.run_id

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            place = None if _is_server(self._uri) else (self._output / "mlartifacts").as_uri()
            try:
                return self._client.create_experiment(name, artifact_location=place)
            except Exception:
                # Another process may have made it in the meantime.
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return found.experiment_id

    def _log_metrics(self, record: dict[str, Any]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, _bounded(value), record["time_ms"], record["step"])
            for name, value in record["metrics"].items()
        ]
        for start in range(0, len(metrics), METRICS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + METRICS_PER_BATCH])

    def _log_table(self, record: dict[str, Any]) -> None:
        # As MlflowClient.log_table, which would append to a table that exists; this replaces it.
        from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

        self._client.log_dict(
            self.run_id, {"columns": record["columns"], "data": record["data"]}, record["name"]
        )
        tables = json.loads(self._client.get_run(self.run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        entry = {"path": record["name"], "type": "table"}
        tag = json.dumps([*tables, entry])
        if entry not in tables and len(tag) <= TAG_LENGTH:
            self._client.set_tag(self.run_id, MLFLOW_LOGGED_ARTIFACTS, tag)

    def _log_artifacts(self, record: dict[str, Any]) -> None:
        folder = Path(record["folder"])
        if folder.is_dir():
            self._client.log_artifacts(self.run_id, str(folder), folder.name)

    def _finish_run(self, record: dict[str, Any]) -> None:
        self._client.set_terminated(self.run_id, record["status"], record["time_ms"])


def metric_name(name: str) -> str:
    """`name` with everything replaced that MLflow refuses in names of metrics, parameters and tags."""
    legal = re.sub(r"[^\w./: -]", "_", name, flags=re.ASCII)
    parts = [part for part in legal.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:KEY_LENGTH].rstrip("/") or "_"


def git_state() -> dict[str, str]:
    """Commit of this code and whether it was edited since; "unknown" where it is no git checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # Fails for a copy that lies, untracked, in somebody else's checkout: that commit is not ours.
        git("ls-files", "--error-unmatch", here.name)
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {"git.commit": "unknown", "git.dirty": "unknown"}


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme not in ("sqlite", "postgresql", "mysql", "mssql", "file", "")


def _redact(text: str) -> str:
    """`text` without user names and passwords in addresses."""
    return re.sub(r"://[^@/\s]+@", "://***@", text)


def _brief(error: Exception) -> str:
    return (_redact(str(error)).splitlines() or [type(error).__name__])[0][:200]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested configuration -> dotted parameter names and texts within MLflow's limits."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            flat[metric_name(prefix + key)] = _redact(text)[:PARAM_LENGTH]
    return flat


def _bounded(value: float) -> float:
    return value if math.isnan(value) else max(-LARGEST, min(LARGEST, value))


def _last_steps(history: list[dict[str, Any]]) -> dict[str, int]:
    """Metric name -> last step at which an earlier process logged it."""
    last: dict[str, int] = {}
    for record in history:
        for name in record.get("metrics", ()):
            last[name] = max(record["step"], last.get(name, record["step"]))
    return last
