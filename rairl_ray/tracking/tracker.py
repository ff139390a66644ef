"""MLflow tracking that can never hurt a run (docs/architecture.md 13).

    RunContext ──log, log_table, ...──> RUN/tracking_spool.jsonl ──queues (threads)──> MLflow
                      one line                                     uploader.py        mlflow_run.py

Every call writes a line to the run folder and returns; threads talk to MLflow. What a run
could not send waits in its folder: `--resume` sends it, and so does the next run in the same output folder,
which finds it by a pointer and also closes the runs of killed drivers (unsent.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Concatenate, Literal, NamedTuple, ParamSpec

import yaml

from rairl_ray.config.key_names import leaves
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import brief, redact
from rairl_ray.metrics import MEASURES_MACHINE, legal_name
from rairl_ray.provenance import git_state, process_identity
from rairl_ray.tracking.mlflow_run import import_mlflow
from rairl_ray.tracking.spool import read_records
from rairl_ray.tracking.unsent import UnsentRuns
from rairl_ray.tracking.uploader import Uploader, tracking_uri

P = ParamSpec("P")
Status = Literal["FINISHED", "FAILED", "KILLED"]

PARAM_LENGTH = 6000
"""MLflow's limit."""
DIFFERS_TAG = "rairl.made_again_differs"
"""The first metric that a resume or a retry measured otherwise than before; MLflow has the earlier value."""


def _harmless(
    method: Callable[Concatenate[Tracker, P], None],
) -> Callable[Concatenate[Tracker, P], None]:
    """A full disk or a flaw here costs a record, not the run."""

    @functools.wraps(method)
    def call(self: Tracker, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            what = "is off" if method.__name__ == "start" else f"drops a record ({method.__name__})"
            self._warn_once(method.__name__, f"tracking {what}: {brief(error)}")

    return call


class Told(NamedTuple):
    """What MLflow is told of a run: its name, and its parameters, which also are an artifact."""

    name: str
    file: str
    values: dict[str, Any]


class Tracker:
    """One run's line to MLflow. No method raises because of MLflow, a network or a full disk, or waits for
    them; only `finish` (`tracking.flush_seconds` at most) and `id_within` wait."""

    def __init__(self, warn: Callable[[str], None] | None = None) -> None:
        self._warn = warn or logging.getLogger(__name__).warning
        self._warned: set[str] = set()
        self._warning = threading.Lock()
        self._uploader: Uploader | None = None
        self._unsent_runs: UnsentRuns | None = None
        self._session = ""
        self._flush_seconds = 0.0
        self._earlier: dict[tuple[str, float], float] = {}
        self._differs = False

    @property
    def run_id(self) -> str | None:
        """MLflow's id of this run; None until a server gave one, and without tracking."""
        return self._uploader.spool.cursor["run_id"] if self._uploader else None

    def id_within(self, seconds: float) -> str | None:
        """The run's id, waiting so many seconds for it; None without one."""
        if (uploader := self._uploader) is not None:
            uploader.spool.wait_for(uploader.run.exists, seconds)
        return self.run_id

    @_harmless
    def start(
        self,
        config: RunConfig,
        run_folder: str | Path,
        resume_run_id: str | None = None,
        tags: dict[str, str] | None = None,
        told: Told | None = None,
    ) -> None:
        """Open a new MLflow run, or go on with the one of this run folder, without waiting for it.

        `resume_run_id` is needed only where the run folder lost its cursor. `tags` takes what others know.
        `told` stands for the configuration where it is not what the run is about.
        """
        output, folder = Path(config.output_dir).absolute(), Path(run_folder).absolute()
        uri = tracking_uri(config, output)
        if uri is None:
            return
        import_mlflow()
        process = process_identity()
        self._session, self._flush_seconds = process["session"], config.tracking.flush_seconds
        uploader = Uploader(uri, output, folder, self._warn_once, resume_run_id)
        uploader.spool.own()
        told = told or Told(config.name, "config.yaml", config.model_dump(mode="json"))
        experiment, tags = config.tracking.experiment, {**git_state(), **config.tracking.tags, **(tags or {})}
        put = uploader.spool.put
        put({"kind": "start", "experiment": experiment, "run_name": told.name, **process})
        # The pointer needs the record's session, and is there before MLflow can hear of the run.
        self._unsent_runs = UnsentRuns(output, folder)
        self._unsent_runs.settle_own()
        put({"kind": "params", "params": _parameters(told.values), "tags": tags})
        text = redact(yaml.safe_dump(told.values, sort_keys=False))
        put({"kind": "text", "name": told.file, "text": text})
        self._uploader = uploader
        uploader.start()
        self._unsent_runs.thread.start()

    @_harmless
    def log(self, metrics: dict[str, float], step: int) -> None:
        """All metrics of a step. Of one that is made again, MLflow keeps what was measured first."""
        fresh = {}
        for given, number in metrics.items():
            name, value = legal_name(given), float(number)
            first = self._earlier.get((name, step))
            if first is None:
                fresh[name] = value
            elif not (self._differs or name.startswith(MEASURES_MACHINE) or _close(first, value)):
                self._differs = True
                text = f"{name} at step {step}: {first:g}, made again: {value:g}"
                self._put({"kind": "params", "params": {}, "tags": {DIFFERS_TAG: text}})
        if fresh:
            self._put({"kind": "metrics", "step": step, "metrics": fresh})

    @_harmless
    def go_back_to(self, step: int) -> None:
        """Say that a resume or a retry goes on from `step`: later ones, and its evaluation, are made again."""
        if self._uploader is None:
            return
        for record, _ in read_records(self._uploader.spool.path, "metrics"):
            if record is not None and record["step"] >= step:
                for name, value in record["metrics"].items():
                    self._earlier.setdefault((name, record["step"]), value)

    @_harmless
    def log_table(self, rows: list[dict[str, Any]], name: str) -> None:
        """Rows of JSON values as the table artifact NAME.json, replacing an earlier one of that name."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = [[row.get(column) for column in columns] for row in rows]
        self._put({"kind": "table", "name": f"{legal_name(name)}.json", "columns": columns, "data": data})

    @_harmless
    def log_text(self, name: str, text: str) -> None:
        """A text as the artifact NAME, without passwords in addresses, replacing one of that name."""
        self._put({"kind": "text", "name": name, "text": redact(text)})

    @_harmless
    def log_artifacts(self, folder: str | Path) -> None:
        """Every file below `folder`, a folder of the run folder. They are read later: leave them in place."""
        if self._uploader is None:
            return
        root, folder = self._uploader.spool.path.parent, Path(folder).absolute()
        for path in sorted(file for file in folder.rglob("*") if file.is_file()):
            place = path.parent.relative_to(folder.parent).as_posix()
            self._put({"kind": "artifact", "path": path.relative_to(root).as_posix(), "place": place})

    @_harmless
    def finish(self, status: Status) -> None:
        """Set the run's terminal status, and wait `tracking.flush_seconds` at most for what is left to send."""
        if self._uploader is None or self._unsent_runs is None:
            return
        self._unsent_runs.stop()
        if not self._uploader.finish(status, self._session, self._flush_seconds):
            rest = self._uploader.spool.path
            self._warn_once(
                "rest",
                f"MLflow has not received everything in {self._flush_seconds:g} s (tracking.flush_seconds); "
                f"the rest waits in {rest} and is sent by --resume or by the next run in this output folder",
            )
        self._unsent_runs.settle_own()

    def _put(self, record: dict[str, Any]) -> None:
        if self._uploader is not None:
            self._uploader.spool.put(record)

    def _warn_once(self, topic: str, text: str) -> None:
        with self._warning, contextlib.suppress(Exception):
            if topic not in self._warned:
                self._warned.add(topic)
                self._warn(text)


def _close(first: float, again: float) -> bool:
    """Whether two measurements agree up to rounding."""
    return math.isclose(first, again, rel_tol=1e-5, abs_tol=1e-6) or (math.isnan(first) and math.isnan(again))


def _parameters(values: dict[str, Any]) -> dict[str, str]:
    """Nested configuration -> dotted parameter names and texts within MLflow's limits."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in leaves(values)}
    return {legal_name(key): redact(text)[:PARAM_LENGTH] for key, text in texts.items()}
