"""pass@1 by the problems' category (MMLU-Pro's subjects, say)."""

from __future__ import annotations

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.report.collect import Evaluation
from rairl_ray.report.labels import number_of, pattern_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import RIGHT, new_figure, shortened


def category_parts(evaluation: Evaluation) -> list[Part]:
    """Table and bars of the summary's categories, the best first."""
    found: dict[str, dict[str, float]] = {}
    for metric, entry in evaluation.summary.items():
        match = pattern_of(names.EVAL_CATEGORY_PASS_AT_1).match(metric)
        if match:
            found[match["category"]] = entry
    if not found:
        raise Absent("the problems have no categories")
    ordered = sorted(found.items(), key=lambda item: (-item[1]["value"], item[0]))
    rows: list[tuple[Cell, ...]] = [
        (name, number_of(names.EVAL_PASS_AT_1, entry), Number(value=entry.get("n", np.nan), kind="count"))
        for name, entry in ordered
    ]
    table = Table(
        name="categories", title="pass@1 by category", columns=("category", "pass@1", "problems"), rows=rows
    )
    values = np.array([[entry.get(part, np.nan) for part in ("value", "low", "high")] for _, entry in ordered])
    drawing, axes = new_figure(height=min(9.0, 0.7 + 0.22 * len(ordered)))
    places = np.arange(len(ordered))[::-1]
    axes.barh(places, 100 * values[:, 0], height=0.7, color=RIGHT, alpha=0.75)
    sizes = 100 * np.abs(values[:, 1:] - values[:, :1]).T
    axes.errorbar(
        100 * values[:, 0], places, xerr=np.nan_to_num(sizes), fmt="none", ecolor="black", elinewidth=0.8
    )
    axes.set_yticks(places, [shortened(name, 24) for name, _ in ordered])
    axes.set(xlabel="pass@1 (%)", xlim=(0, None))
    axes.grid(axis="y", visible=False)
    note = "Bars: 95% bootstrap intervals over problems."
    return [Figure(name="categories_bars", title="pass@1 by category", drawing=drawing, note=note), table]
