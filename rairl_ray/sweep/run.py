"""`launch.py sweep`: Ray Tune over the trials of a sweep file, resumable, with a table at its end."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from rairl_ray.config.load import config_hash, warm_start_chain
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.yamlfile import Dumper
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, ResumeError, RunFailure
from rairl_ray.files import json_text, write_atomic
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import SweepFile, axes
from rairl_ray.sweep.points import Trial, trial_folder, trials
from rairl_ray.sweep.supervise import OUTPUT, final_values, finished, last_line, run_trial
from rairl_ray.trainer.parts import cluster, place
from rairl_ray.trainer.run import made_by, train

SAVED = "sweep.json"
TUNE = "tune"
REPEATABLE = {"seeds", "trials", "max_concurrent", "failures", "budget"}
"""Keys that a resume may change: they add trials or say how many run at once, never what one is."""


def sweep(file: SweepFile, resume: bool = False, display: Display | None = None) -> int:
    """Run every trial; returns 0, or 1 where some failed.

    Raises:
        UserError: bad points, a sweep of this name with other settings, a trial that the cluster cannot hold.
    """
    planned = trials(file)
    folder = Path(file.output_dir).absolute() / file.name
    _claim(file, folder, resume)
    display = display or Display(file.name, len(planned))
    display.note(f"sweep folder: {folder}")
    with cluster(planned[0].config):
        room = _room(planned[0].config)
        concurrent = min(file.max_concurrent or room, room)
        display.note(f"{len(planned)} trials, {concurrent} at once (the cluster holds {room})")
        started = {item.id: _with_warm_start(file, item, display) for item in planned}
        _tune(file, planned, started, folder, concurrent, display)
    return _conclude(file, folder, display)


def _claim(file: SweepFile, folder: Path, resume: bool) -> None:
    """One sweep a name: a resume must agree with what was started, key by key."""
    saved = folder / SAVED
    if saved.is_file() != resume:
        if resume:
            raise ResumeError(f"--resume: {folder} is no sweep; leave --resume out to start it")
        raise ConfigError(f"name={file.name}: {folder} is a sweep already; add --resume, or rename")
    if resume:
        earlier = SweepFile.model_validate_json(saved.read_text())
        changed = [
            f"{key} (sweep: {getattr(earlier, key)}, now: {getattr(file, key)})"
            for key in SweepFile.model_fields
            if key not in REPEATABLE and getattr(earlier, key) != getattr(file, key)
        ]
        if changed:
            raise ResumeError(f"--resume: the file contradicts the sweep in {', '.join(changed)}; rename it")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(saved, file.model_dump_json(indent=1) + "\n")


def _room(config: RunConfig) -> int:
    """How many such runs the idle cluster holds at once. Raises PlacementError for none."""
    plan = place(config)
    total = ray.cluster_resources()
    names = {name for bundle in plan.bundles for name, amount in bundle.items() if amount}
    return max(1, min(int(total.get(name, 0.0) / plan.total(name) + 1e-6) for name in names))


def _with_warm_start(file: SweepFile, item: Trial, display: Display) -> tuple[str, ...]:
    """The trial's overrides, its warm start trained: once for all trials that share it, before they begin."""
    if item.config.warm_start is None:
        return item.overrides
    earlier = warm_start_chain(item.config)[0]
    name = f"{file.name}/warm_starts/{Path(item.config.warm_start).stem}-{config_hash(earlier)}"
    earlier = earlier.model_copy(update={"name": name})
    policy = RunFolder(Path(earlier.output_dir) / name)
    if not made_by(policy, earlier):
        display.note(f"warm start of {item.id}: trained first, into {policy.root}")
        if train(earlier):
            raise KeyboardInterrupt
    path = policy.final_policy
    return (*item.overrides, "warm_start=null", f"model.policy.path={path}", "model.policy.build=null")


class Progress(tune.Callback):
    """Tells when a trial ends."""

    def __init__(self, file: SweepFile, total: int, display: Display) -> None:
        self._file, self._total, self._display, self._done = file, total, display, 0

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps its callbacks on disk; a terminal cannot be kept."""
        return {**self.__dict__, "_display": None}

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._done += 1
        value = trial.last_result.get(self._file.metric, math.nan)
        name = Path(trial.config["spec"]["folder"]).name
        self._display.note(f"{self._done}/{self._total} {name}: {self._file.metric}={value:.4f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = Path(trial.config["spec"]["folder"]).name
        self._display.note(f"{name}: failed; {last_line(Path(trial.config['folder']) / OUTPUT)}")


def _tune(
    file: SweepFile,
    planned: Sequence[Trial],
    overrides: dict[str, tuple[str, ...]],
    folder: Path,
    concurrent: int,
    display: Display,
) -> None:
    """Hand the trials to Ray Tune, whose own state (ASHA's rungs) continues where there is one."""
    specs = [
        {
            "folder": str(trial_folder(file, item.id)),
            "base": file.base,
            "overrides": list(overrides[item.id]),
            "metric": file.metric,
            "cwd": os.getcwd(),
        }
        for item in planned
    ]
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    scheduler = None
    if file.scheduler.type == "asha":
        scheduler = ASHAScheduler(
            grace_period=file.scheduler.grace,
            reduction_factor=file.scheduler.reduction,
            max_t=file.scheduler.longest,
        )
    # A trial's own process only watches. Tune takes no empty request, and a byte of memory is in nobody's way.
    trainable = tune.with_resources(_trainable, tune.PlacementGroupFactory([{"memory": 1}]))
    hours = file.budget.hours
    tuner = tune.Tuner(
        trainable,
        param_space={"spec": tune.grid_search(specs)},
        tune_config=tune.TuneConfig(
            metric=file.metric,
            mode=file.mode,
            scheduler=scheduler,
            max_concurrent_trials=concurrent,
            time_budget_s=None if hours is None else hours * 3600,
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=file.failures.max_per_trial),
            verbose=0,
            callbacks=[Progress(file, len(specs), display)],
        ),
    )
    with display:
        tuner.fit()


def _trainable(config: dict[str, Any]) -> None:
    run_trial(config["spec"])


def _conclude(file: SweepFile, folder: Path, display: Display) -> int:
    """table.csv, summary.json and best.yaml from the trials' own folders."""
    rows = [_row(file, item) for item in trials(file)]
    done = [row for row in rows if row["state"] == "finished"]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(folder / "table.csv", "w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(output, columns)
        writer.writeheader()
        writer.writerows(rows)
    if not done:
        raise RunFailure(f"{folder}: no trial finished; the trials' {OUTPUT} files say why")
    sign = 1 if file.mode == "max" else -1
    best = max(done, key=lambda row: sign * row[file.metric])
    summary = {"metric": file.metric, "trials": len(rows), "finished": len(done), "best": best}
    write_atomic(folder / "summary.json", json_text(summary, indent=1) + "\n")
    _write_best(file, folder, best)
    ordered = sorted(rows, key=lambda row: sign * row.get(file.metric, -sign * math.inf), reverse=True)
    display.table(file.name, ordered, ["trial", "state", file.metric])
    display.finish(
        [
            f"table: {folder / 'table.csv'}",
            f"best: {best['trial']}, as an experiment file: {folder / 'best.yaml'}",
            f"figures: python launch.py report {folder}",
        ]
    )
    return 0 if len(done) == len(rows) else 1


def _row(file: SweepFile, item: Trial) -> dict[str, Any]:
    folder = RunFolder(trial_folder(file, item.id))
    state = "finished" if finished(folder) else "unfinished" if folder.config.is_file() else "not started"
    values = final_values(folder) if state == "finished" else {}
    return {"trial": item.id, "state": state, **item.values, "seed": item.seed, **values}


def _write_best(file: SweepFile, folder: Path, best: dict[str, Any]) -> None:
    """A file that `train` takes: the base and the best point's values."""
    import yaml

    nested: dict[str, Any] = {"base": os.path.relpath(file.base, folder), "name": f"{file.name}-best"}
    for key, value in {**file.overrides, **{axis.key: best.get(axis.key) for axis in axes(file)}}.items():
        if value is None:
            continue
        place = nested
        *parents, last = key.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    nested["seed"] = best["seed"]
    write_atomic(folder / "best.yaml", yaml.dump(nested, Dumper=Dumper, sort_keys=False))
