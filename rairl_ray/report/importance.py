"""How much of a sweep's variance each axis explains: Optuna's fANOVA over its trials."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import optuna
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from rairl_ray.report.collect import Sweep
from rairl_ray.report.labels import label_of
from rairl_ray.report.parts import Absent, Figure, Number, Part, Table
from rairl_ray.report.style import COLOURS, new_figure, shortened
from rairl_ray.report.sweeps import results
from rairl_ray.sweep.file import LISTS, Axis, axes

FEWEST = 8
"""Trials below which a forest says nothing."""


def importances(sweep: Sweep) -> dict[str, float]:
    """Axis -> its share of the variance that single axes explain; the largest first, only axes of all trials.

    Raises Absent for fewer than two such axes, too few trials, or trials that all reached the same.
    """
    found = results(sweep)
    every = [axis for axis in axes(sweep.file) if all(axis.key in result.values for result in found)]
    varied = [axis for axis in every if len({_encoded(axis, result.values) for result in found}) > 1]
    if len(varied) < 2:
        raise Absent("fewer than two axes vary and count in every trial")
    if len(found) < FEWEST:
        raise Absent(f"{len(found)} trials have a result; importance takes {FEWEST} or more")
    if np.ptp([result.value for result in found]) == 0:
        raise Absent("all trials reached the same")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize")
    distributions = {axis.key: _distribution(axis) for axis in varied}
    for result in found:
        params = {axis.key: _encoded(axis, result.values) for axis in varied}
        made = optuna.trial.create_trial(params=params, distributions=distributions, value=result.value)
        study.add_trial(made)
    return dict(get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0)))


def importance_parts(sweep: Sweep) -> list[Part]:
    """Figure and table."""
    shares = importances(sweep)
    label = label_of(sweep.file.metrics[0])[0]
    left_out = [axis.key for axis in axes(sweep.file) if axis.key not in shares]
    note = (
        f"Share of the variance of {label} over all trials that each axis alone explains, by fANOVA (a random "
    )
    note += "forest). It says how much an axis matters within its values here, not which value is best."
    note += f" Left out, since they do not vary or count in some trials only: {', '.join(left_out)}." * bool(
        left_out
    )
    rows = [(key, Number(value=share, kind="percent")) for key, share in shares.items()]
    table = Table(
        name="importance", title="Importance of axes", columns=("axis", "share"), rows=rows, note=note
    )
    return [_figure(shares, note), table]


def _figure(shares: dict[str, float], note: str) -> Figure:
    drawing, panel = new_figure(height=0.7 + 0.25 * len(shares))
    names = [shortened(".".join(key.split(".")[-2:]), 30) for key in shares]
    panel.barh(range(len(shares)), [100 * share for share in shares.values()], color=COLOURS[0], height=0.6)
    panel.set_yticks(range(len(shares)), names)
    panel.invert_yaxis()
    panel.set(xlabel="share of the explained variance (%)", xlim=(0, 100))
    return Figure(name="importance", title="Importance of axes", drawing=drawing, note=note)


def _distribution(axis: Axis) -> Any:
    if axis.kind in LISTS:
        return optuna.distributions.CategoricalDistribution([json.dumps(value) for value in axis.values])
    low, high = axis.values
    if axis.kind == "randint":
        return optuna.distributions.IntDistribution(low, high - 1)
    return optuna.distributions.FloatDistribution(low, high, log=axis.kind == "loguniform")


def _encoded(axis: Axis, values: dict[str, Any]) -> Any:
    """Optuna knows no lists, and takes True for 1."""
    return json.dumps(values[axis.key]) if axis.kind in LISTS else values[axis.key]
