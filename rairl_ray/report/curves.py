"""pass@k and learning curves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.evaluation.bootstrap import bootstrap
from rairl_ray.evaluation.passing import pass_at_k
from rairl_ray.report.arrays import samples
from rairl_ray.report.collect import Evaluation, Run
from rairl_ray.report.labels import label_of, number_of, pattern_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import MARKERS, NEUTRAL, legend_below, line_looks, new_figure, whole_ticks

LEARNING = (
    names.EVAL_PASS_AT_1,
    names.REWARD_MEAN,
    names.DISCRIMINATOR_AUROC,
    names.DISCRIMINATOR_LOSS,
    names.POLICY_LOSS,
    names.POLICY_KL,
    names.ROLLOUT_COMPLETION_TOKENS,
)
"""Metrics of metrics.jsonl that get a curve, each if the run has it."""

LINES = 7
"""Runs with a colour of their own; more are grey."""

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
    longest = max(len(points) for points in curves.values())
    whole_ticks(axes, range(1, longest + 1))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]) if axes.get_ylim()[0] < 5 else None)
    legend_below(axes)
    return Figure(
        name="pass_at_k_curve",
        title="pass@k",
        drawing=drawing,
        note="Bands: 95% bootstrap intervals over problems.",
    )


def learning_curves(runs: Sequence[Run]) -> list[Part]:
    """One figure a metric, all runs in it. Warm-up rows (steps up to 0) are shaded."""
    if not any(run.metrics for run in runs):
        raise Absent("there is no metrics.jsonl")
    figures = [figure for metric in LEARNING if (figure := _learning_figure(metric, runs)) is not None]
    if not figures:
        raise Absent("metrics.jsonl has none of the metrics that are drawn")
    return list(figures)


def _learning_figure(metric: str, runs: Sequence[Run]) -> Figure | None:
    lines = {run.label: points for run in runs if len(points := _points(run, metric))}
    if not lines:
        return None
    label, kind = label_of(metric)
    scale = 100.0 if kind == "percent" else 1.0
    drawing, axes = new_figure()
    few = len(lines) <= LINES
    looks = line_looks(len(lines)) if few else [{"color": NEUTRAL, "alpha": 0.6, "lw": 0.8}] * len(lines)
    for (name, points), look in zip(lines.items(), looks, strict=True):
        marker = "o" if len(points) <= 12 else None
        axes.plot(points[:, 0], scale * points[:, 1], label=name, marker=marker, **look)
    first = min(points[0, 0] for points in lines.values())
    last = max(points[-1, 0] for points in lines.values())
    if first < 0:
        axes.axvspan(first, 0, color="#f0f0f0", lw=0, zorder=0)
        if last > 0:
            axes.text(first, 1.0, " warm-up", transform=axes.get_xaxis_transform(), va="top", fontsize=7)
    axes.set(xlabel="policy step", ylabel=f"{label} (%)" if kind == "percent" else label)
    if few:
        legend_below(axes)
    note = "" if few else f"{len(lines)} runs."
    if first < 0:
        note += " Shaded: the discriminator's warm-up, before the policy moves."
    name = "curve_" + re.sub(r"\W+", "_", metric)
    return Figure(name=name, title=label, drawing=drawing, note=note.strip())


def _points(run: Run, metric: str) -> np.ndarray:
    """[steps, 2] of the finite values; the last row of a step counts."""
    found = {row["step"]: row[metric] for row in run.metrics if "step" in row and metric in row}
    points = np.array(sorted(found.items()), dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])]
