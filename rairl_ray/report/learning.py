"""Learning curves: the metrics of every step, runs of one configuration in one colour."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.report.collect import Run
from rairl_ray.report.labels import label_of
from rairl_ray.report.parts import Absent, Figure, Part
from rairl_ray.report.style import NEUTRAL, legend_below, line_looks, new_figure, percent_axis, whole_ticks

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

LINES = 6
"""Families with a colour of their own; the rest is grey."""

Family = tuple[str, Sequence[Run]]
"""(label, runs that differ only in their seed)."""


def learning_curves(families: Sequence[Family]) -> list[Part]:
    """One figure a metric, all runs in it, the first families in colour; warm-up (steps up to 0) is shaded."""
    if not any(run.metrics for _, runs in families for run in runs):
        raise Absent("there is no metrics.jsonl")
    figures = [figure for metric in LEARNING if (figure := _learning_figure(metric, families)) is not None]
    if not figures:
        raise Absent("metrics.jsonl has none of the metrics that are drawn")
    return list(figures)


def _learning_figure(metric: str, families: Sequence[Family]) -> Figure | None:
    lines = {label: [p for run in runs if len(p := _points(run, metric))] for label, runs in families}
    lines = {label: group for label, group in lines.items() if group}
    if not lines:
        return None
    name, kind = label_of(metric)
    drawing, axes = new_figure()
    grey: dict[str, Any] = {"color": NEUTRAL, "alpha": 0.4, "lw": 0.7, "zorder": 1}
    looks = [*line_looks(min(LINES, len(lines))), *[grey] * max(0, len(lines) - LINES)]
    for index, ((label, group), look) in enumerate(zip(lines.items(), looks, strict=True)):
        shown = label if index < LINES else f"{len(lines) - LINES} others" if index == LINES else None
        for number, points in enumerate(group):
            axes.plot(
                points[:, 0],
                (100.0 if kind == "percent" else 1.0) * points[:, 1],
                label=None if number else shown,
                **{
                    "marker": "o" if len(points) <= 12 else None,
                    "lw": 1.4 if len(families) == 1 else 1.0,
                    **look,
                },
            )
    ends = [points[[0, -1], 0] for group in lines.values() for points in group]
    first, last = float(np.min(ends)), float(np.max(ends))
    note = "One line a run." if sum(map(len, lines.values())) > len(lines) else ""
    if first < 0:
        axes.axvspan(first, 0, color="#f0f0f0", lw=0, zorder=0)
        note += " Shaded: the discriminator's warm-up, before the policy moves."
    axes.set(
        xlabel="policy step" if last > 0 else "warm-up step",
        ylabel=f"{name} (%)" if kind == "percent" else name,
    )
    whole_ticks(axes)
    if kind == "percent":
        percent_axis(axes)
    if first == last:
        axes.set_xlim(first - 1, first + 1)
    legend_below(axes)
    return Figure(name="curve_" + re.sub(r"\W+", "_", metric), title=name, drawing=drawing, note=note.strip())


def _points(run: Run, metric: str) -> np.ndarray:
    """[steps, 2] of the finite values; the last row of a step counts."""
    found = {row["step"]: row[metric] for row in run.metrics if "step" in row and metric in row}
    points = np.array(sorted(found.items()), dtype=np.float64).reshape(-1, 2)
    return points[np.isfinite(points[:, 1])]
