"""`launch.py sweep`: Ray Tune over the trials of a sweep file, resumable, with a table at its end.

A resume gives Tune the trials that are neither finished nor stopped early. What a scheduler (`schedulers.py`),
Optuna (`search.py`) and a population (`population.py`) know of all trials comes from their folders.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune

from rairl_ray.actors.joining import present_nodes
from rairl_ray.actors.placement import room
from rairl_ray.config.load import load_config
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, ResumeError, RunFailure
from rairl_ray.files import write_atomic
from rairl_ray.runfolder import RunFolder
from rairl_ray.storage import local_folder, plain
from rairl_ray.sweep.budget import GpuMeter
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.ledger import Ledger, below
from rairl_ray.sweep.lineage import check_population, values_now
from rairl_ray.sweep.points import (
    SAVED,
    Trial,
    drawn_file,
    examples,
    newest_folder,
    started_with,
    sweep_folder,
    to_draw,
    trial_folder,
    trial_log,
    trials,
    warm_start,
)
from rairl_ray.sweep.population import Population, check_side_by_side
from rairl_ray.sweep.remote import bring_trials, mirrored_sweep, spec_for
from rairl_ray.sweep.result import DONE, FINISHED, conclude, final_values, last_line, state_of, trial_state
from rairl_ray.sweep.schedulers import id_of, scheduler_of
from rairl_ray.sweep.search import Points
from rairl_ray.sweep.status import SweepDisplay
from rairl_ray.sweep.stopping import WHOLE, forget_requests, leave_request, listening, stop_request
from rairl_ray.sweep.supervise import WHY, trainable
from rairl_ray.trainer.outputs import staged
from rairl_ray.trainer.run import filled_in, made_by, train
from rairl_ray.trainer.run_context import code_version, refuse_other
from rairl_ray.trainer.worker_groups import cluster, place

TUNE = "tune"
LOST_WORKERS = 100
"""How often a trial may lose the worker that watches it, mostly with its node, and goes on elsewhere."""
CODE = "code_version"
"""File of the version of the code that started the sweep."""
REPEATABLE = {"seeds", "trials", "max_concurrent", "failures", "budget", "address"}
"""Keys that a resume may change: they add trials or say how many run at once and where, never what one is."""


def sweep(file: SweepFile, resume: bool = False, display: Display | None = None) -> int:
    """Run every trial; returns 0, 1 where some failed or were not drawn, 130 where it was stopped.

    Raises:
        UserError: bad points, a sweep of this name with other settings or at work, a base that has changed
            since, a trial that the cluster cannot hold.
        RunFailure: no finished trial has the metric.
    """
    with mirrored_sweep(file, resume, Display(file.name, 0).note):
        return _swept(file, resume, display)


def _swept(file: SweepFile, resume: bool, display: Display | None) -> int:
    planned = trials(file)
    check_population(file, planned)
    samples = examples(file) if file.search.type == "optuna" else []
    _refuse_other_warm_starts(file, samples)
    folder = sweep_folder(file)
    if resume and not (folder / SAVED).is_file():
        raise ResumeError(f"--resume: {folder} is no sweep; leave --resume out to start it")
    folder.mkdir(parents=True, exist_ok=True)
    display = display or SweepDisplay(file, len(planned) + to_draw(file))
    with RunFolder(folder).lock():
        _refuse_other_sweep(file, folder, resume)
        forget_requests(file)
        for item in planned:
            _refuse_other_run(file, item)
        write_atomic(folder / SAVED, file.model_dump_json(indent=1) + "\n")
        _tell_other_code(folder / CODE, display)
        display.note(f"sweep folder: {folder}")
        left = [item for item in planned if trial_state(file, item) not in DONE]
        ledger = Ledger(file, staged([*planned, *samples][0].config), display)
        with ledger.open():
            if left or to_draw(file):
                _run(file, left, [*left, *samples], ledger, display)
            return _ended(file, ledger, display)


def _ended(file: SweepFile, ledger: Ledger, display: Display) -> int:
    """The end in the folder and in MLflow; the exit code."""
    stopped = stop_request(file).exists()
    bring_trials(file, [item.id for item in trials(file)], display.note)
    try:
        code = conclude(file, trials(file), display)
    except RunFailure as failure:
        if not stopped:
            raise
        display.note(str(failure))
        code = 1
    missing = to_draw(file)
    if stopped and (code or missing):
        display.note(f"{file.name} was stopped; go on with --resume")
        ledger.status = "KILLED"
        return 130
    if missing:
        display.note(f"{missing} trials were not drawn; {drawn_file(file)} says what was refused")
        code = 1
    ledger.status = "FAILED" if code else "FINISHED"
    return code


def _run(
    file: SweepFile, left: Sequence[Trial], samples: Sequence[Trial], ledger: Ledger, display: Display
) -> None:
    """Args: samples: trials that tell the size of all, and their warm starts."""
    with cluster(samples[0].config), listening(file, display):
        placement = place(samples[0].config)
        GpuMeter(file).check(placement)
        most = max(1, room(placement, present_nodes()))
        concurrent = min(file.max_concurrent or most, most)
        check_side_by_side(file, len(left), concurrent)
        count = len(left) + to_draw(file)
        display.note(f"{count} trials to run, {concurrent} at once (the cluster holds {most})")
        for item in samples:
            train_warm_start(file, item, display)
        _tune(file, left, concurrent, ledger.parent(), display)


def _refuse_other_warm_starts(file: SweepFile, samples: Sequence[Trial]) -> None:
    """Warm starts are trained before the trials, so points that are not known yet must not bring their own."""
    names: dict[int, str] = {}
    for item in samples:
        earlier = warm_start(file, item)
        if earlier is not None and names.setdefault(item.seed, earlier.name) != earlier.name:
            raise ConfigError(
                f"space: its values change the warm start {item.config.warm_start}; search.type=optuna draws "
                "while trials run: take out the axis that does, or use search.type=random"
            )


def _tell_other_code(file: Path, display: Display) -> None:
    """A sweep whose trials were made by two versions of the code is allowed, and said."""
    now, before = code_version(), file.read_text().strip() if file.is_file() else None
    if before not in (None, now):
        display.note(f"the sweep was started by code {before}, this is {now}")
    write_atomic(file, (before or now) + "\n")


def _refuse_other_sweep(file: SweepFile, folder: Path, resume: bool) -> None:
    """One sweep a name: a resume must agree with what was started, key by key."""
    saved = folder / SAVED
    if saved.is_file() and not resume:
        raise ConfigError(f"name={file.name}: {folder} is a sweep already; add --resume, or rename")
    if resume:
        earlier = SweepFile.model_validate_json(saved.read_text())
        before, now = _compared(earlier), _compared(file)
        changed = [f"{key} (sweep: {before[key]}, now: {now[key]})" for key in now if before[key] != now[key]]
        if changed:
            raise ResumeError(f"--resume: the file contradicts the sweep in {', '.join(changed)}; rename it")


def _compared(file: SweepFile) -> dict[str, Any]:
    """What a resume may not change. Of a remote sweep the checkout with its bases may lie elsewhere."""
    values = {key: getattr(file, key) for key in SweepFile.model_fields if key not in REPEATABLE}
    if "://" in file.output_dir:
        values |= {"base": sorted(file.bases) if file.base else (), "output_dir": plain(file.output_dir)}
    return values


def _refuse_other_run(file: SweepFile, item: Trial) -> None:
    """A base that was edited since would mix experiments. Raises ResumeError with every differing key."""
    folder = trial_folder(file, item.id)
    if RunFolder(folder).config.is_file():
        config = item.config if file.fork else load_config(item.base, started_with(file, item))
        refuse_other(staged(config), folder, str(folder))


def train_warm_start(file: SweepFile, item: Trial, display: Display) -> None:
    """Train a warm start that is not there yet; an interrupted one goes on."""
    earlier = warm_start(file, item)
    if earlier is None:
        return
    folder = RunFolder(local_folder(earlier.output_dir) / earlier.name)
    if not made_by(folder, filled_in(staged(earlier))):
        display.note(f"warm start of {item.id}: trained first, into {folder.root}")
        if train(earlier, str(folder.root) if folder.config.is_file() else None):
            raise KeyboardInterrupt


class Progress(tune.Callback):
    """Tells when a trial ends. An error here would end the sweep: it takes whatever Tune knows of a trial."""

    def __init__(self, file: SweepFile, total: int, display: Display | None, alike: bool = False) -> None:
        """Args: alike: whether one trial that lacks a metric of the sweep shows that all will."""
        self._file, self._total, self._display, self._done = file, total, display, 0
        self._alike = alike
        self.running: set[str] = set()
        self.meter = GpuMeter(file)

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks on disk; a terminal cannot be kept."""
        return {**self.__dict__, "_display": None}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.running.add(id_of(trial))
        self.meter.starts(id_of(trial), trial.config["spec"]["gpus"])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial)
        bring_trials(self._file, [id_of(trial)], self.note)
        if any(stop_request(self._file, name).exists() for name in (WHOLE, id_of(trial))):
            self.note(f"{id_of(trial)}: stopped; --resume goes on with it")
            return
        state = state_of(self._file, id_of(trial))
        if state not in DONE:
            why = (trial.last_result or {}).get(WHY) or last_line(trial_log(self._file, id_of(trial)))
            self.note(f"{id_of(trial)}: failed; {why}")
            return
        self._done += 1
        last = trial.last_result or {}
        values = ", ".join(f"{metric}={last.get(metric, math.nan):.4f}" for metric in self._file.metrics)
        self.note(f"{self._done}/{self._total} {id_of(trial)}: {values}")
        if self._alike and state == FINISHED:
            self._stop_for_lack(final_values(RunFolder(newest_folder(self._file, id_of(trial)))))

    def _stop_for_lack(self, there: Mapping[str, float]) -> None:
        """Nobody waits a night for a metric that no trial will have."""
        lacking = [metric for metric in self._file.metrics if metric not in there]
        if lacking and not stop_request(self._file).exists():
            names = ", ".join(sorted(there)) or "none"
            self.note(f"metric={lacking[0]}: no trial will have it, so the sweep stops; there are {names}")
            leave_request(stop_request(self._file))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.note(f"{id_of(trial)}: lost its worker, mostly with its node; goes on from its newest checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial)
        self.note(f"{id_of(trial)}: lost; the worker that watched it died more than {LOST_WORKERS} times")

    def _ended(self, trial: Any) -> None:
        self.running.discard(id_of(trial))
        self.meter.ends(id_of(trial))

    def note(self, text: str) -> None:
        if self._display is not None:
            self._display.note(text)


class Halt(tune.Stopper):
    """Ends a sweep that was asked to stop once the trials that ran have left, or whose GPU hours are spent."""

    def __init__(self, file: SweepFile, progress: Progress) -> None:
        self._file, self._progress, self._spent = file, progress, False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if self._progress.meter.exhausted and not self._spent:
            self._spent = True
            self._progress.meter.save()
            spent = f"budget.gpu_hours={self._file.budget.gpu_hours:g} is spent"
            self._progress.note(f"{spent}: trials that run are stopped; --resume with a larger one goes on")
        return self._spent or (stop_request(self._file).exists() and not self._progress.running)


def _tune(
    file: SweepFile, left: Sequence[Trial], concurrent: int, parent: str | None, display: Display
) -> None:
    """Hand the trials to Ray Tune."""
    searched, population = file.search.type == "optuna", file.scheduler.type == "pbt"
    total = len(left) + to_draw(file)
    spec = functools.partial(_spec, file, parent)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Tune writes pages about a worker that was lost; `Progress` says it in a line.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # ours lets trials save
    # A trial's own process only watches. Tune takes no empty request, and a byte of memory is in nobody's way.
    watched = tune.with_resources(trainable, tune.PlacementGroupFactory([{"memory": 1}]))
    hours = file.budget.hours
    alike = len({item.config.algorithm.type for item in left}) <= 1
    progress = Progress(file, total, display, alike)
    tuner = tune.Tuner(
        watched,
        param_space={} if searched else {"spec": tune.grid_search([spec(item) for item in left])},
        tune_config=tune.TuneConfig(
            metric=file.metrics[0] if len(file.metrics) == 1 else None,
            mode=file.modes[0] if len(file.metrics) == 1 else None,
            search_alg=Points(file, left, spec) if searched else None,
            num_samples=total if searched else 1,
            scheduler=Population(file, parent, progress.note) if population else scheduler_of(file),
            max_concurrent_trials=concurrent,
            time_budget_s=None if hours is None else hours * 3600,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(sweep_folder(file)),
            failure_config=tune.FailureConfig(max_failures=LOST_WORKERS),
            verbose=0,
            stop=Halt(file, progress),
            callbacks=[progress],
        ),
    )
    with display:
        tuner.fit()


def _spec(file: SweepFile, parent: str | None, item: Trial) -> dict[str, Any]:
    """What `run_trial` needs. `parent`: MLflow's run of the sweep."""
    return {
        "folder": str(trial_folder(file, item.id)),
        "log": str(trial_log(file, item.id)),
        "base": item.base,
        "fork": file.fork,
        "overrides": [*started_with(file, item), below(file, item, parent)],
        "metrics": list(file.metrics),
        "gpus": place(item.config).total("GPU") if file.budget.gpu_hours else 0.0,
        "values": values_now(file, item.id, item.values),
        "steps": item.config.trainer.steps,
        "cwd": os.getcwd(),
        "failures": file.failures.max_per_trial,
        "stops": [str(stop_request(file)), str(stop_request(file, item.id))],
        **spec_for(file),
    }
