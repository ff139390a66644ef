"""pass@k: table and curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.evaluation.bootstrap import bootstrap
from rairl_ray.evaluation.passing import pass_at_k
from rairl_ray.report.arrays import samples
from rairl_ray.report.collect import Evaluation
from rairl_ray.report.labels import number_of, pattern_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import MARKERS, legend_below, line_looks, new_figure, percent_axis, whole_ticks

RESAMPLES = 300


def pass_at_k_parts(evaluations: Sequence[Evaluation]) -> list[Part]:
    """Table of pass@k as evaluated, and the curve over every k that the samples allow."""
    if not evaluations:
        raise Absent("there is no evaluation")
    found = {e.name: _reported(e) for e in evaluations}
    ks = sorted({k for reported in found.values() for k in reported})
    if not ks:
        raise Absent("no evaluation reports pass@k")
    rows: list[Sequence[Cell]] = [
        (name, *(reported.get(k) for k in ks)) for name, reported in found.items() if reported
    ]
    table = Table(
        name="pass_at_k",
        title="pass@k",
        columns=("evaluation", *(f"pass@{k}" for k in ks)),
        rows=rows,
        note="Chance that one of k samples is right; in brackets 95% bootstrap intervals over problems.",
    )
    curves = {e.name: _pass_curve(e) for e in evaluations if e.rows_path is not None}
    return [table, _pass_figure(curves)] if curves else [table]


def _reported(evaluation: Evaluation) -> dict[int, Number]:
    matches = [(metric, pattern_of(names.EVAL_PASS_AT).match(metric)) for metric in evaluation.summary]
    found = {int(match["k"]): metric for metric, match in matches if match and match["k"].isdigit()}
    return {k: number_of(metric, evaluation.summary[metric]) for k, metric in found.items()}


def _pass_curve(evaluation: Evaluation) -> np.ndarray:
    """[N, 3]: pass@k, low, high for k = 1..N."""
    correct_PN = samples(evaluation.rows).correct_PN
    count = correct_PN.shape[1]
    right_P = correct_PN.sum(axis=1)
    points = []
    for k in range(1, count + 1):
        values = [pass_at_k(count, int(m), k) for m in right_P]
        points.append(bootstrap(values, RESAMPLES, ("report", "pass@k")))
    return np.array(points)


def _pass_figure(curves: Mapping[str, np.ndarray]) -> Figure:
    drawing, axes = new_figure()
    for (name, points), look, marker in zip(curves.items(), line_looks(len(curves)), MARKERS * 9, strict=False):
        ks = np.arange(1, len(points) + 1)
        axes.plot(ks, 100 * points[:, 0], marker=marker, label=name, **look)
        axes.fill_between(ks, 100 * points[:, 1], 100 * points[:, 2], color=look["color"], alpha=0.15, lw=0)
    axes.set(xlabel="k (samples)", ylabel="pass@k (%)")
    whole_ticks(axes)
    percent_axis(axes)
    legend_below(axes)
    return Figure(
        name="pass_at_k_curve",
        title="pass@k",
        drawing=drawing,
        note="Bands: 95% bootstrap intervals over problems.",
    )
