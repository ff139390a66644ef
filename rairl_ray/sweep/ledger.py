"""MLflow's side of a sweep: one parent run, which all its trials' runs name, and what the sweep came to.

The parent is tracked as any run is (tracking/tracker.py), from a folder of its own beside the trials: its id
stays the same after a resume, and whoever runs next in the output folder closes what a killed sweep left
RUNNING. MLflow can cost a sweep a warning, never a trial.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from rairl_ray.config.described import density_name, model_name
from rairl_ray.config.load import dump_yaml
from rairl_ray.config.schema import RunConfig
from rairl_ray.display import Display
from rairl_ray.files import write_atomic
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import Trial, override, sweep_folder
from rairl_ray.sweep.result import STATES
from rairl_ray.tracking.tracker import Status, Told, Tracker

LEDGER = "ledger"
PARENT = "mlflow.parentRunId"
RESULTS = ("table.csv", "best*.yaml", "summary.json")


class Ledger:
    """The parent run of a sweep. `config` of any trial says where MLflow is."""

    def __init__(self, file: SweepFile, config: RunConfig, display: Display) -> None:
        self._file, self._tracker = file, Tracker(warn=display.note)
        self._config = config.model_copy(update={"name": f"{file.name}/{LEDGER}"})
        self._folder = sweep_folder(file) / LEDGER
        self._display = display
        self.status: Status = "FAILED"
        """How the sweep ended, once that is known."""

    @contextmanager
    def open(self) -> Iterator[None]:
        """The parent is RUNNING in here, and has `status` afterwards."""
        self._start()
        try:
            yield
        except KeyboardInterrupt:
            self.status = "KILLED"
            raise
        finally:
            self._conclude()
            self._tracker.finish(self.status)

    def parent(self) -> str | None:
        """The parent's id, for which it waits `tracking.flush_seconds`; None where there is none by then."""
        seconds = self._config.tracking.flush_seconds
        found = self._tracker.id_within(seconds)
        if found is None and self._config.tracking.uri != "none":
            self._display.note(f"MLflow gave the sweep no run in {seconds:g} s: its trials have no parent")
        return found

    def _conclude(self) -> None:
        """The best trial's metrics, the number of trials in each state, and the files of the end."""
        folder = sweep_folder(self._file)
        with suppress(OSError, ValueError):
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            best = summary.get("best", {})  # a Pareto front has no single one
            values = {k: v for k, v in best.items() if "/" in k and isinstance(v, int | float)}
            states = {f"trials/{state}": summary["states"].get(state, 0) for state in STATES}
            self._tracker.log(values | states, step=0)
        for path in (path for name in RESULTS for path in sorted(folder.glob(name))):
            with suppress(OSError):
                self._tracker.log_text(path.name, path.read_text(encoding="utf-8"))

    def _start(self) -> None:
        try:
            self._folder.mkdir(exist_ok=True)
            # Where MLflow is, for whoever has to close the run of a killed sweep.
            write_atomic(self._folder / "config.yaml", dump_yaml(self._config))
        except OSError as error:
            self._display.note(f"tracking of the sweep is off: {error}")
            return
        told = Told(self._file.name, "sweep.yaml", self._file.model_dump(mode="json"))
        tags = {"rairl.sweep": self._file.name}
        self._tracker.start(self._config, self._folder, tags=tags, told=told)


def below(file: SweepFile, item: Trial, parent: str | None) -> str:
    """The override that puts a trial's run below the parent and says what it varies."""
    config = item.config
    tags = {
        "rairl.sweep": file.name,
        "rairl.trial": item.id,
        "rairl.density": density_name(config),
        "rairl.task": config.data.task,
        "rairl.backbone": model_name(config.model.policy),
        "rairl.seed": str(config.seed),
    }
    return override("tracking.tags", tags | ({PARENT: parent} if parent else {}))
