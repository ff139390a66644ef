"""Parallel coordinates: a line a point of a sweep, through its value of every axis to what it reached."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from rairl_ray.report.collect import Sweep
from rairl_ray.report.labels import label_of
from rairl_ray.report.parts import Absent, Figure, Part
from rairl_ray.report.style import NEUTRAL, WIDTH, WRONG, new_figure, shortened
from rairl_ray.report.sweeps import results
from rairl_ray.sweep.file import RANGES, Axis, axes

WIDEST = 7.0
SPREAD = 0.05
"""Of an axis's height: lines that share a listed value lie so far apart, the better ones above."""
NOT_COUNTED = "–"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A point of the space with the mean of its seeds."""

    values: dict[str, Any]
    value: float


def lines(sweep: Sweep) -> list[Line]:
    """The points that have a result, worst first, so that the best are drawn last."""
    by_point: dict[str, list[float]] = {}
    points: dict[str, dict[str, Any]] = {}
    for result in results(sweep):
        key = json.dumps(result.values, sort_keys=True)
        points[key] = result.values
        by_point.setdefault(key, []).append(result.value)
    made = [Line(values=points[key], value=float(np.mean(found))) for key, found in by_point.items()]
    return sorted(made, key=lambda line: line.value, reverse=sweep.file.modes[0] == "min")


def heights(axis: Axis, found: Sequence[Line]) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """([lines] heights in 0..1, ticks as (height, text)); listed values evenly, ranges by their scale."""
    counted = [axis.key in line.values for line in found]
    floor = 0.14 if not all(counted) else 0.0
    ticks = [(0.0, NOT_COUNTED)] if floor else []
    if axis.kind in RANGES:
        low, high = (math.log(x) if axis.kind == "loguniform" else float(x) for x in axis.values)
        numbers = np.array([line.values.get(axis.key, axis.values[0]) for line in found], dtype=float)
        numbers = np.log(numbers) if axis.kind == "loguniform" else numbers
        places = np.where(counted, floor + (1 - floor) * (numbers - low) / (high - low), 0.0)
        return places, [*ticks, (floor, f"{axis.values[0]:g}"), (1.0, f"{axis.values[1]:g}")]
    texts = [json.dumps(value).strip('"') for value in axis.values]
    steps = np.linspace(floor, 1, len(texts)) if len(texts) > 1 or floor else np.array([0.5])
    steps = steps[-len(texts) :]
    place = dict(zip(map(json.dumps, axis.values), steps, strict=True))
    at = [
        place.get(json.dumps(line.values[axis.key]), 0.0) if axis.key in line.values else 0.0 for line in found
    ]
    rank = np.argsort(np.argsort([line.value for line in found]))
    spread = SPREAD * (2 * rank / max(1, len(found) - 1) - 1)
    return np.array(at) + spread, [*ticks, *zip(map(float, steps), texts, strict=True)]


def parallel_coordinates(sweep: Sweep) -> list[Part]:
    """The figure; the metric is the last axis and the lines' colour."""
    found, every = lines(sweep), axes(sweep.file)
    if not every:
        raise Absent("the sweep has no axis")
    if len(found) < 2:
        raise Absent("fewer than two points have a result")
    label, kind = label_of(sweep.file.metrics[0])
    values = np.array([line.value for line in found]) * (100.0 if kind == "percent" else 1.0)
    low, high = float(values.min()), float(values.max())
    share = (values - low) / (high - low) if high > low else np.full(len(values), 0.5)
    columns = [heights(axis, found) for axis in every]
    shown = [*columns, (share, [(0.0, f"{low:.3g}"), (1.0, f"{high:.3g}")])]
    drawing, panel = new_figure(height=2.6, width=min(WIDEST, max(WIDTH, 1.35 * len(shown))))
    colours = matplotlib.colormaps["viridis"]
    places = np.arange(len(shown))
    for index in range(len(found)):
        best = index == len(found) - 1
        panel.plot(
            places, [column[index] for column, _ in shown],
            color=WRONG if best else colours(0.95 * share[index]), lw=2.0 if best else 0.9,
            alpha=1.0 if best else 0.75, zorder=3 if best else 2,
        )  # fmt: skip
    titles = [".".join(axis.key.split(".")[-2:]) for axis in every]
    titles.append(f"{label} (%)" if kind == "percent" else label)
    _dress(panel, [ticks for _, ticks in shown], titles)
    note = f"A line a point ({len(found)}), the mean of its seeds; yellow is high, dark low, orange the best. "
    note += "Lines that share a listed value lie side by side."
    return [Figure(name="parallel_coordinates", title="All points", drawing=drawing, note=note)]


def _dress(panel: Axes, ticks: Sequence[Sequence[tuple[float, str]]], titles: Sequence[str]) -> None:
    """Vertical axes with their own ticks, and what each is."""
    for place, marks in enumerate(ticks):
        panel.axvline(place, color=NEUTRAL, lw=0.8, zorder=1)
        for height, text in marks:
            panel.text(
                place + 0.03, height, shortened(text, 14), fontsize=6.5, va="center", zorder=4,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
            )  # fmt: skip
    panel.tick_params(axis="x", length=0)
    panel.set_xticks(range(len(titles)), [shortened(text, 20) for text in titles])
    panel.set(yticks=[], xlim=(-0.1, len(titles) - 0.6), ylim=(-0.1, 1.1))
    panel.grid(False)
    panel.spines[:].set_visible(False)
