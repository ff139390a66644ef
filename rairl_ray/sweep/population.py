"""`scheduler.type: pbt`: Tune's PopulationBasedTraining decides, and an exploit is a fork of a checkpoint.

report of the metric ──> Tune: is the member among the worst? which good one is its donor? which values?
    ──> a line in lineage.jsonl ──> MEMBER/forks/N: the donor's newest checkpoint under the new values
    ──> the member's watcher (supervise.py) ends its run and goes on in the new folder

Tune's own way, a checkpoint through its storage and a pause of the trial, is not used, nor is its restore: what
it knows of each member is rebuilt from the folders (lineage.py).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.errors import ConfigError, UserError
from rairl_ray.keys import key_seed
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import LISTS, Axis, SweepFile, axes, mutated
from rairl_ray.sweep.ledger import below
from rairl_ray.sweep.lineage import Exploit, fork_folder, planned_exploits, standing, write_exploit
from rairl_ray.sweep.points import FORKS, drawn_value, newest_folder, override, trial
from rairl_ray.sweep.schedulers import id_of
from rairl_ray.sweep.supervise import REPORT
from rairl_ray.trainer.fork import Fork, fork_of, take_over
from rairl_ray.trainer.run_context import save_config

ATTEMPTS = 20
"""Draws of new values before a fork takes the donor's own."""


def check_side_by_side(file: SweepFile, members: int, places: int) -> None:
    """Refuse a population whose members would wait for each other. Raises ConfigError."""
    if file.scheduler.type == "pbt" and members > places:
        raise ConfigError(
            f"scheduler.type=pbt: {members} members and {places} run at once, but they are compared while they "
            "run; give fewer trials, a higher max_concurrent, smaller placements or a larger cluster"
        )


class Population(PopulationBasedTraining):
    """Tune's PBT over runs that are processes of their own."""

    def __init__(self, file: SweepFile, parent: str | None, tell: Callable[[str], None]) -> None:
        """Args: parent: MLflow's run of the sweep; tell: takes a line for the screen."""
        settings = file.scheduler
        self._file, self._parent, self._tell = file, parent, tell
        self._axes = [axis for axis in axes(file) if axis.key in mutated(file)]
        super().__init__(
            time_attr=REPORT,
            perturbation_interval=settings.interval,
            burn_in_period=settings.grace,
            hyperparam_mutations={"spec": {"values": {a.key: _distribution(a) for a in self._axes}}},
            quantile_fraction=settings.quantile,
            resample_probability=settings.resample,
            perturbation_factors=settings.factors,
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Where a sweep is resumed, the member stands where it stood."""
        super().on_trial_add(tune_controller, trial)
        stands, state = standing(self._file, id_of(trial)), self._trial_state[trial]
        state.last_score, state.last_perturbation_time = stands.score, stands.judged
        state.last_train_time = stands.trained

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Every member goes on. Tune would pause one where another one waits, but here all run side by side."""
        if REPORT in result and math.isfinite(result[self._file.metrics[0]]):
            super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE)

    def _checkpoint_or_exploit(
        self, trial: Any, tune_controller: Any, upper_quantile: list[Any], lower_quantile: list[Any]
    ) -> None:
        """Tune's hook: a bad member becomes a fork of a better one, unless it is at its end."""
        state, end = self._trial_state[trial], trial.config["spec"]["steps"]
        if trial not in lower_quantile or state.last_result["step"] >= end:
            return
        member = id_of(trial)
        with _keyed("donor", self._file.search.seed, member, state.last_result[REPORT]):
            donor = random.choice(upper_quantile)
        if self._trial_state[donor].last_score <= state.last_score:
            return
        store = CheckpointStore(newest_folder(self._file, id_of(donor)))
        steps = [step for step in store.steps() if 0 < step < end]
        if not steps:
            self._tell(f"{member}: goes on as it is: {id_of(donor)} has no checkpoint yet")
            return
        try:
            row = self._exploited(trial, donor, steps[-1])
        except (UserError, OSError) as error:
            self._tell(f"{member}: goes on as it is: {error}")
            return
        spec = trial.config["spec"]
        trial.set_config({**trial.config, "spec": {**spec, "values": row.values}})
        state.last_perturbation_time = state.last_train_time = row.donor_judged
        self._num_perturbations += 1
        self._tell(f"{member}: goes on as a fork of {row.origin} with {row.told}")

    def _exploited(self, trial: Any, donor: Any, from_step: int) -> Exploit:
        """Write down and make the fork. Raises UserError or OSError."""
        member, state, better = id_of(trial), self._trial_state[trial], self._trial_state[donor]
        root = newest_folder(self._file, id_of(donor))
        row = Exploit(
            member=member,
            number=1 + sum(earlier.member == member for earlier in planned_exploits(self._file)),
            report=state.last_result[REPORT],
            step=int(state.last_result["step"]),
            score=state.last_score,
            donor=id_of(donor),
            donor_fork=int(root.name) if root.parent.name == FORKS else 0,
            donor_score=better.last_score,
            donor_judged=better.last_perturbation_time,
            from_step=from_step,
            values=donor.config["spec"]["values"],
        )
        for attempt in range(ATTEMPTS):
            with _keyed("values", self._file.search.seed, member, row.report, attempt):
                config, _ = self._get_new_config(trial, donor)
            values = {**config["spec"]["values"]}
            values |= {axis.key: _within(axis, values[axis.key]) for axis in self._axes}
            try:
                fork = self._fork(dataclasses.replace(row, values=values), root)
            except ConfigError:
                continue
            row = dataclasses.replace(row, values=values)
            break
        else:
            fork = self._fork(row, root)
        write_exploit(self._file, row)
        _make(fork, fork_folder(self._file, row))
        return row

    def _fork(self, row: Exploit, root: Any) -> Fork:
        """The fork of a donor's folder, checked. Raises ConfigError where its values contradict each other."""
        (seed,) = self._file.seeds
        item = dataclasses.replace(trial(self._file, row.values, seed), id=row.member)
        values = {axis.key: row.values[axis.key] for axis in self._axes}
        values["name"] = f"{self._file.name}/trials/{row.member}/{FORKS}/{row.number}"
        words = [override(key, value) for key, value in values.items()]
        return fork_of(f"{root}@{row.from_step}", [*words, below(self._file, item, self._parent)])


def _make(fork: Fork, target: Any) -> None:
    """Fill the fork's folder beside its place, then move it there: it is there whole or not at all."""
    temporary = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    folder = RunFolder(temporary)
    folder.create()
    save_config(folder, fork.config)
    take_over(fork, folder)
    folder.truncate_to_step(fork.step)
    temporary.rename(target)


def _distribution(axis: Axis) -> Any:
    """As Tune's mutations want it: a list whose neighbours are near, or what draws a value of a range."""
    return list(axis.values) if axis.kind in LISTS else functools.partial(drawn_value, axis, random)


def _within(axis: Axis, value: Any) -> Any:
    """A factor may lead out of a range."""
    if axis.kind in LISTS:
        return value
    low, high = axis.values
    return min(max(value, low), high - 1 if axis.kind == "randint" else high)


@contextmanager
def _keyed(*parts: object) -> Iterator[None]:
    """Tune draws from the process's own generator: in here it is a keyed one."""
    before = random.getstate()
    random.seed(key_seed("pbt", *parts))
    try:
        yield
    finally:
        random.setstate(before)
