"""`search.type: optuna`: Ray Tune's OptunaSearch draws the points, each of which runs with every seed.

`points.jsonl` says what was drawn, the run folders how it went. A resume tells a new Optuna study both, in the
same order; since every draw has a key of its own, the search goes on as if it had never stopped.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from rairl_ray.errors import ConfigError
from rairl_ray.files import append_line
from rairl_ray.keys import key_seed
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import LISTS, Axis, SweepFile, axes
from rairl_ray.sweep.points import Drawn, Trial, at_point, drawn, drawn_file, misfits, that_count, trial_folder
from rairl_ray.sweep.result import FINISHED, STOPPED, final_values, trial_state
from rairl_ray.sweep.stopping import stop_request

REPEAT = "drawn before"
MOST_REFUSED = 100
"""Draws in a row that give no new good point, before the search ends."""


class Points(Searcher):
    """The trials of an optuna sweep, handed to Tune one by one.

    A point that breaks a rule, or that ASHA stopped, is told to Optuna as pruned, which TPE avoids; one
    that was drawn before, or that failed, as failed, which it passes over. Only good new points count in
    `trials`.
    """

    def __init__(self, file: SweepFile, left: Sequence[Trial], spec: Callable[[Trial], dict[str, Any]]) -> None:
        """Args: left: trials of earlier draws that are to run first; spec: what a trial's process needs."""
        super().__init__(metric=_one_or_list(file.metrics), mode=_one_or_list(file.modes))
        self._file, self._spec, self._waiting = file, spec, deque(left)
        self._axes = axes(file)
        self._drawn = drawn(file)
        self._live: dict[str, str] = {}
        """Tune's id of a trial -> ours."""
        self._points: dict[int, list[Trial]] = {}
        """Number of a draw -> its trials, where it has any."""
        self._open: dict[int, set[str]] = {}
        """Number of a draw -> its trials that are to end."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._search = OptunaSearch(
            space=self._suggested,
            metric=_one_or_list(file.metrics),
            mode=_one_or_list(file.modes),
            points_to_evaluate=[self._encoded(row.values) for row in self._drawn],
            sampler=KeyedTpe(file.search.seed),
        )
        for number, row in enumerate(self._drawn):
            self._search.suggest(str(number))
            if row.refused is None:
                self._points[number] = at_point(file, row.values)
                self._open[number] = {item.id for item in self._points[number]} & {item.id for item in left}
            if not self._open.get(number):
                self._tell(number)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial. Draws a point where none waits; nothing once the sweep was asked to stop."""
        if stop_request(self._file).exists():
            return None
        kept = sum(row.refused is None for row in self._drawn)
        if not self._waiting and kept < (self._file.trials or 0):
            self._draw()
        if not self._waiting:
            return str(Searcher.FINISHED)
        item = self._waiting.popleft()
        self._live[trial_id] = item.id
        return {"spec": self._spec(item)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Optuna hears of a point when all its trials have ended. The values are those of the run folders."""
        name = self._live.pop(trial_id)
        number = next(number for number, names in self._open.items() if name in names)
        self._open[number].remove(name)
        if not self._open[number]:
            self._tell(number)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the sweep's folder has all of it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is restored from Tune's snapshot."""

    def _draw(self) -> None:
        """Draw until a point is new and good, or too many were not."""
        for _ in range(MOST_REFUSED):
            number = len(self._drawn)
            values = self._decoded(self._search.suggest(str(number)))
            found, refused = self._judged(values)
            self._drawn.append(Drawn(values, refused))
            append_line(drawn_file(self._file), json.dumps({"values": values, "refused": refused}))
            if refused is None:
                self._waiting += found
                self._points[number] = found
                self._open[number] = {item.id for item in found}
                return
            self._tell(number)

    def _judged(self, values: dict[str, Any]) -> tuple[list[Trial], str | None]:
        """The trials of a point, or why it has none."""
        if any(_same(row.values, values) for row in self._drawn if row.refused is None):
            return [], REPEAT
        try:
            found = at_point(self._file, values)
        except ConfigError as error:
            return [], str(error)
        return found, "\n".join(misfits(self._file, found[0].config)) or None

    def _tell(self, number: int) -> None:
        """Tell Optuna how a point went."""
        row = self._drawn[number]
        value, error = None, row.refused == REPEAT
        if row.refused is None:
            value, error = reached(self._file, self._points[number])
        self._search.on_trial_complete(str(number), value, error)

    def _suggested(self, study_trial: Any) -> None:
        """Optuna's define-by-run function: asks for an axis only where its condition holds."""
        that_count(self._axes, self._file.overrides, lambda axis: _asked(study_trial, axis))

    def _encoded(self, values: dict[str, Any]) -> dict[str, Any]:
        kinds = {axis.key: axis.kind for axis in self._axes}
        return {key: json.dumps(value) if kinds[key] in LISTS else value for key, value in values.items()}

    def _decoded(self, found: dict[str, Any]) -> dict[str, Any]:
        counting = [axis for axis in self._axes if axis.key in found]
        return {a.key: json.loads(found[a.key]) if a.kind in LISTS else found[a.key] for a in counting}


def reached(file: SweepFile, point: Sequence[Trial]) -> tuple[dict[str, float] | None, bool]:
    """The mean of each metric over a point's trials; (None, whether it failed) where one has no value."""
    states = {trial_state(file, item) for item in point}
    if STOPPED in states:
        return None, False
    if states != {FINISHED}:
        return None, True
    found = [final_values(RunFolder(trial_folder(file, item.id))) for item in point]
    means = {
        metric: math.fsum(values.get(metric, math.nan) for values in found) / len(found)
        for metric in file.metrics
    }
    return (means, False) if all(map(math.isfinite, means.values())) else (None, True)


def _one_or_list(names: Sequence[str]) -> Any:
    """As Tune and Optuna want it."""
    return names[0] if len(names) == 1 else list(names)


def _asked(study_trial: Any, axis: Axis) -> Any:
    """One value from Optuna. Those of a list travel as JSON: Optuna knows no lists, and takes True for 1."""
    if axis.kind in LISTS:
        return json.loads(
            study_trial.suggest_categorical(axis.key, [json.dumps(value) for value in axis.values])
        )
    low, high = axis.values
    if axis.kind == "randint":
        return study_trial.suggest_int(axis.key, low, high - 1)
    return study_trial.suggest_float(axis.key, low, high, log=axis.kind == "loguniform")


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


class KeyedTpe(optuna.samplers.BaseSampler):
    """Optuna's TPE, whose randomness depends on the seed and on the number of the draw alone."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tpe = optuna.samplers.TPESampler(seed=0)

    def before_trial(self, study: Any, trial: Any) -> None:
        self._tpe = optuna.samplers.TPESampler(seed=key_seed("optuna", self._seed, trial.number) % 2**32)

    def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
        return self._tpe.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
        return self._tpe.sample_relative(study, trial, search_space)

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return self._tpe.sample_independent(study, trial, name, distribution)
