"""Every policy under every reward: the matrix as a figure and a table for each metric."""

from __future__ import annotations

import re

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.report.collect import Transfer
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import WIDTH, new_figure

DRAWN = (names.EVAL_RERANK_AT_1, names.DISCRIMINATOR_AUROC, names.CALIBRATION_AUROC, names.EVAL_PASS_AT_1)
"""Metrics that get a figure; all get a table."""


def transfer_parts(transfer: Transfer) -> list[Part]:
    """Tables of all metrics (policies down, rewards across) and figures of the main ones."""
    metrics = list(dict.fromkeys(metric for cell in transfer.cells.values() for metric in cell))
    if not metrics:
        raise Absent(f"{transfer.path} has no numbers")
    parts: list[Part] = [_figure(transfer, metric) for metric in metrics if metric in DRAWN]
    return [*parts, *(_table(transfer, metric) for metric in metrics)]


def _cell(transfer: Transfer, policy: str, reward: str, metric: str) -> Number | None:
    entry = transfer.cells.get((policy, reward), {}).get(metric)
    return None if entry is None else number_of(metric, entry)


def _table(transfer: Transfer, metric: str) -> Table:
    label = label_of(metric)[0]
    rows: list[tuple[Cell, ...]] = [
        (policy, *(_cell(transfer, policy, reward, metric) for reward in transfer.rewards))
        for policy in transfer.policies
    ]
    return Table(
        name="transfer_" + re.sub(r"\W+", "_", metric),
        title=f"Transfer: {label}",
        columns=("policy", *(f"reward of {reward}" for reward in transfer.rewards)),
        rows=rows,
    )


def _figure(transfer: Transfer, metric: str) -> Figure:
    label, kind = label_of(metric)
    scale, digits = (100.0, 1) if kind == "percent" else (1.0, 2)
    values = np.full((len(transfer.policies), len(transfer.rewards)), np.nan)
    for i, policy in enumerate(transfer.policies):
        for j, reward in enumerate(transfer.rewards):
            cell = _cell(transfer, policy, reward, metric)
            values[i, j] = np.nan if cell is None else scale * cell.value
    height = min(9.0, 1.0 + 0.34 * len(transfer.policies))
    drawing, axes = new_figure(height=height, width=WIDTH)
    # Blues are ordered by lightness, which every eye sees.
    shown = axes.imshow(values, cmap="Blues", aspect="auto")
    low, high = np.nanmin(values), np.nanmax(values)
    for (i, j), value in np.ndenumerate(values):
        dark = np.isfinite(value) and high > low and (value - low) / (high - low) > 0.6
        text = "–" if not np.isfinite(value) else f"{value:.{digits}f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(range(len(transfer.rewards)), transfer.rewards, rotation=30, ha="right")
    axes.set_yticks(range(len(transfer.policies)), transfer.policies)
    axes.set(xlabel="reward", ylabel="policy")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    drawing.colorbar(shown, ax=axes, label=f"{label} (%)" if kind == "percent" else label)
    name = "transfer_matrix_" + re.sub(r"\W+", "_", metric)
    return Figure(name=name, title=f"Transfer: {label}", drawing=drawing)
