"""What a sweep found: its best configuration, what each axis does, and what each trial cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.config.load import dump_yaml
from rairl_ray.report.collect import Run, Sweep
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Absent, Cell, Figure, Listing, Number, Part, Table
from rairl_ray.report.seeds import over_seeds
from rairl_ray.report.style import COLOURS, new_figure, shortened
from rairl_ray.sweep.file import RANGES, Axis, axes
from rairl_ray.sweep.lineage import newest_exploits
from rairl_ray.sweep.points import planned

BINS = 3
"""A range's values are told in so many groups of equal size."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A trial with its value of the sweep's metric."""

    trial: str
    values: dict[str, Any]
    seed: int
    run: Run
    value: float


def results(sweep: Sweep) -> list[Result]:
    """The trials whose main evaluation has the sweep's metric, in the sweep's order. Raises Absent for none."""
    found, now = [], newest_exploits(sweep.file)
    for trial, (values, seed) in planned(sweep.file).items():
        values = now[trial].values if trial in now else values
        run = sweep.runs.get(trial)
        entry = run.main.summary.get(sweep.file.metrics[0]) if run is not None and run.evaluations else None
        if run is not None and entry is not None and math.isfinite(entry["value"]):
            found.append(Result(trial=trial, values=values, seed=seed, run=run, value=entry["value"]))
    if not found:
        raise Absent(f"no trial has {sweep.file.metrics[0]} yet")
    return found


def best_first(sweep: Sweep, found: Sequence[Result]) -> list[Result]:
    return sorted(found, key=lambda result: result.value, reverse=sweep.file.modes[0] == "max")


# --- the best -------------------------------------------------------------------------------------------


def best_parts(sweep: Sweep) -> list[Part]:
    """The best trial's values, where its experiment file lies, and the file itself to unfold."""
    best = best_first(sweep, results(sweep))[0]
    file, metric = sweep.path / "best.yaml", sweep.file.metrics[0]
    place = f"As an experiment file: {file}." if file.is_file() else "best.yaml is written when the sweep ends."
    number = number_of(metric, best.run.main.summary[metric])
    table = Table(
        name="best",
        title="Best configuration",
        columns=("trial", label_of(metric)[0], *best.values, "seed"),
        rows=[(best.trial, number, *map(_text, best.values.values()), str(best.seed))],
        note=f"{place} The best of many trials is also the luckiest: train it anew with other seeds.",
    )
    if file.is_file():
        return [table, Listing(title="best.yaml", text=file.read_text(encoding="utf-8"))]
    if best.run.config is None:
        return [table]
    return [table, Listing(title="The best trial's configuration", text=dump_yaml(best.run.config))]


# --- the axes -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Level:
    """One value of an axis (or a group of a range's values) and what it reaches."""

    axis: str
    name: str
    trials: int
    mean: Number | None
    against_first: Number | None
    """The difference from the axis's first value."""


def levels(sweep: Sweep, found: Sequence[Result]) -> list[Level]:
    """Mean and difference of each value of each axis, over seeds."""
    kind, made = label_of(sweep.file.metrics[0])[1], []
    for axis in axes(sweep.file):
        counted = [result for result in found if axis.key in result.values]
        groups = _groups(axis, counted)
        for name, members in groups.items():
            first = next(iter(groups.values()))
            made.append(
                Level(
                    axis=axis.key,
                    name=name,
                    trials=len(members),
                    mean=over_seeds(_by_seed(members), kind),
                    against_first=None if members is first else _difference(axis, first, members, kind),
                )
            )
    return made


def _groups(axis: Axis, found: Sequence[Result]) -> dict[str, list[Result]]:
    """The trials of each value, in the file's order; a range's in groups of about equal size."""
    if axis.kind not in RANGES:
        groups = {_text(value): [r for r in found if r.values[axis.key] == value] for value in axis.values}
        return {name: members for name, members in groups.items() if members}
    numbers = sorted({result.values[axis.key] for result in found})
    split = [part.tolist() for part in np.array_split(np.array(numbers), BINS) if part.size]
    return {
        f"{part[0]:.3g} to {part[-1]:.3g}": [r for r in found if part[0] <= r.values[axis.key] <= part[-1]]
        for part in split
    }


def _by_seed(found: Sequence[Result]) -> dict[int, list[float]]:
    by_seed: dict[int, list[float]] = {}
    for result in found:
        by_seed.setdefault(result.seed, []).append(result.value)
    return by_seed


def _difference(axis: Axis, first: Sequence[Result], other: Sequence[Result], kind: Any) -> Number | None:
    """Over pairs of trials that agree in all else; for ranges, or without any, over the seeds' means."""

    def rest(result: Result) -> str:
        others = {key: value for key, value in result.values.items() if key != axis.key}
        return json.dumps([others, result.seed], sort_keys=True)

    before = {rest(result): result for result in first}
    pairs: dict[int, list[float]] = {}
    for result in other if axis.kind not in RANGES else ():
        if (match := before.get(rest(result))) is not None:
            pairs.setdefault(result.seed, []).append(result.value - match.value)
    if not pairs:
        old, new = _by_seed(first), _by_seed(other)
        pairs = {seed: [float(np.mean(new[seed]) - np.mean(old[seed]))] for seed in old if seed in new}
    return over_seeds(pairs, kind)


def effect_parts(sweep: Sweep) -> list[Part]:
    """Table and figure of each axis's values."""
    found = results(sweep)
    made = levels(sweep, found)
    if not made:
        raise Absent("the sweep has no axis")
    label = label_of(sweep.file.metrics[0])[0]
    rows: list[Sequence[Cell]] = [
        (lv.axis, lv.name, Number(value=lv.trials, kind="count"), lv.mean, lv.against_first) for lv in made
    ]
    seeds = len({result.seed for result in found})
    note = f"In brackets: 95% intervals (Student's t) over {seeds} seeds; a seed counts by its mean. "
    note += "Differences from the axis's first value: of trials that agree in all else, where there are any."
    table = Table(
        name="axes",
        title="Effect of each axis",
        columns=("axis", "value", "trials", label, "difference from the first"),
        rows=rows,
        note=note if seeds > 1 else "One seed: no intervals. Differences are from the axis's first value.",
    )
    return [_effect_figure(sweep, made), table]


def _effect_figure(sweep: Sweep, made: Sequence[Level]) -> Figure:
    label, kind = label_of(sweep.file.metrics[0])
    scale = 100.0 if kind == "percent" else 1.0
    keys = list(dict.fromkeys(level.axis for level in made))
    drawing, panel = new_figure(height=min(9.0, 0.7 + 0.17 * (len(made) + len(keys))))
    place, ticks, texts = 0.0, [], []
    for index, key in enumerate(keys):
        ticks.append(place)
        texts.append(shortened(".".join(key.split(".")[-2:]), 26))
        for level in (level for level in made if level.axis == key):
            place -= 1
            ticks.append(place)
            texts.append(shortened(level.name, 22) + "  ")
            if level.mean is None:
                continue
            reach = np.nan_to_num(level.mean.high - level.mean.value)
            panel.errorbar(
                scale * level.mean.value, place, xerr=scale * reach, fmt="o",
                color=COLOURS[index % len(COLOURS)], elinewidth=1.0, capsize=2,
            )  # fmt: skip
        place -= 1.3
    panel.set_yticks(ticks, texts)
    for tick, text in zip(panel.yaxis.get_major_ticks(), texts, strict=True):
        if not text.endswith("  "):
            tick.label1.set_fontweight("bold")
            tick.gridline.set_visible(False)
            tick.tick1line.set_visible(False)
    panel.set(xlabel=f"{label} (%)" if kind == "percent" else label)
    note = "Means over seeds with their 95% intervals; of a range, thirds of its values."
    return Figure(name="axes_effects", title="Effect of each axis", drawing=drawing, note=note)


# --- cost -----------------------------------------------------------------------------------------------


def cost_parts(sweep: Sweep) -> list[Part]:
    """Steps, time and sampled tokens of every trial that began, and of all together."""
    metric = sweep.file.metrics[0]
    rows: list[Sequence[Cell]] = []
    total = np.zeros(3)
    for trial, run in sweep.runs.items():
        cost = np.array(cost_of(run))
        total += cost
        entry = run.main.summary.get(metric) if run.evaluations else None
        rows.append((trial, *_cost_cells(cost), None if entry is None else number_of(metric, entry)))
    if not any(run.metrics for run in sweep.runs.values()):
        raise Absent("no trial has made a step yet")
    rows.append((f"all {len(sweep.runs)}", *_cost_cells(total), None))
    columns = ("trial", "steps", "hours", "seconds a step", "sampled tokens", label_of(metric)[0])
    note = "Time of all steps, with warm-up and evaluations between them, without starting up. A step's time "
    note += "depends on how many trials shared the machines."
    return [Table(name="cost", title="Cost of each trial", columns=columns, rows=rows, note=note)]


def cost_of(run: Run) -> tuple[float, float, float]:
    """(steps, seconds, sampled tokens) of a run's metrics.jsonl; the last row of a step counts."""

    def column(name: str) -> dict[float, float]:
        return {row["step"]: row[name] for row in run.metrics if math.isfinite(row.get(name, math.nan))}

    seconds, tokens = column(names.TIME_STEP), column(names.ROLLOUT_TOKENS)
    return len(seconds), sum(seconds.values()), sum(tokens.values())


def _cost_cells(cost: np.ndarray) -> list[Cell]:
    steps, seconds, tokens = (float(x) for x in cost)
    return [
        Number(value=steps, kind="count"),
        Number(value=seconds / 3600),
        Number(value=seconds / steps if steps else math.nan),
        Number(value=tokens, kind="count"),
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
