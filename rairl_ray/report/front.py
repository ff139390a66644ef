"""The Pareto front of a sweep with several metrics: the trials that no other one beats in all of them."""

from __future__ import annotations

from collections.abc import Sequence

from rairl_ray.report.collect import Sweep
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Cell, Figure, Part, Table
from rairl_ray.report.style import COLOURS, new_figure
from rairl_ray.report.sweeps import Result, results
from rairl_ray.sweep.result import front


def front_parts(sweep: Sweep) -> list[Part]:
    """A table of the front, its trials ordered by the first metric, and a figure of the first two metrics."""
    metrics = sweep.file.metrics
    found = [result for result in results(sweep) if _values(result, metrics) is not None]
    signs = [1 if mode == "max" else -1 for mode in sweep.file.modes]
    merits = [
        [sign * value for sign, value in zip(signs, _values(result, metrics) or (), strict=True)]
        for result in found
    ]
    best = sorted(front(merits), key=lambda number: merits[number], reverse=True)
    rows: list[Sequence[Cell]] = []
    for number in best:
        summary = found[number].run.main.summary
        rows.append((found[number].trial, *(number_of(metric, summary[metric]) for metric in metrics)))
    note = (
        "No other trial is as good in every metric and better in one. Experiment files: best-1.yaml and so on "
    )
    note += f"in {sweep.path}, in this order, once the sweep has ended."
    table = Table(
        name="front",
        title="Pareto front",
        columns=("trial", *(label_of(metric)[0] for metric in metrics)),
        rows=rows,
        note=note,
    )
    return [_figure(metrics[:2], found, best), table]


def _values(result: Result, metrics: Sequence[str]) -> list[float] | None:
    summary = result.run.main.summary
    return [summary[metric]["value"] for metric in metrics] if set(metrics) <= set(summary) else None


def _figure(metrics: Sequence[str], found: Sequence[Result], best: Sequence[int]) -> Figure:
    drawing, panel = new_figure(height=2.6)
    points = [_values(result, metrics) or [] for result in found]
    rest = [point for number, point in enumerate(points) if number not in best]
    if rest:
        panel.plot(*zip(*rest, strict=True), "o", color="0.7", markersize=4, label="others")
    panel.plot(*zip(*(points[number] for number in best), strict=True), "o-", color=COLOURS[0], label="front")
    panel.set(xlabel=label_of(metrics[0])[0], ylabel=label_of(metrics[1])[0])
    panel.legend()
    note = "A point a trial; the line joins those of the front."
    return Figure(name="front", title="Pareto front", drawing=drawing, note=note)
