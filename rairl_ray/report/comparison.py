"""Several runs side by side: every run, runs that differ only in their seed as one, densities, ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.config.described import density_name
from rairl_ray.config.load import NOT_HASHED, config_hash, differences
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.variants import DENSITIES
from rairl_ray.report.collect import Run
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import COLOURS, NEUTRAL, legend_below, new_figure, shortened
from rairl_ray.runfolder import Summary

COMPARED = (
    names.EVAL_PASS_AT_1,
    names.EVAL_RERANK_AT_1,
    names.DISCRIMINATOR_AUROC,
    names.CALIBRATION_AUROC,
    names.LOCALISATION_STEP_ACCURACY,
    names.LOCALISATION_CHANCE,
    names.EVAL_COMPLETION_TOKENS,
)
"""Columns of the comparison, each if a run has it."""

DRAWN = (names.EVAL_PASS_AT_1, names.EVAL_RERANK_AT_1, names.LOCALISATION_STEP_ACCURACY)

BARS = 16
"""Groups drawn as bars; the tables hold the rest."""
MOST_DIFFERENCES = 12
"""Keys that the ablation table names; runs of another algorithm differ in many."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs that differ only in their seed."""

    runs: Sequence[Run]
    summaries: Sequence[Summary]

    @property
    def label(self) -> str:
        return self.runs[0].label + (f" ({len(self.runs)} seeds)" if len(self.runs) > 1 else "")

    @property
    def config(self) -> RunConfig | None:
        return self.runs[0].config

    def number(self, metric: str) -> Number | None:
        """Mean and standard deviation over seeds; the summary's own interval for a single run."""
        entries = [summary[metric] for summary in self.summaries if metric in summary]
        if len(entries) < 2:
            return number_of(metric, entries[0]) if entries else None
        values = np.array([entry["value"] for entry in entries])
        return Number(value=float(values.mean()), std=float(values.std(ddof=1)), kind=label_of(metric)[1])


def best_first(groups: Sequence[Group]) -> list[Group]:
    """Groups by their mean pass@1; those without come last."""

    def rank(group: Group) -> float:
        number = group.number(names.EVAL_PASS_AT_1)
        return -number.value if number is not None and np.isfinite(number.value) else np.inf

    return sorted(groups, key=rank)


def run_table(runs: Sequence[Run]) -> list[Part]:
    """One row a run, with the interval over problems."""
    groups = [group_of([run]) for run in runs]
    seeds = [str(run.config.seed) if run.config else "–" for run in runs]
    evaluations = [run.main.name if run.evaluations else "–" for run in runs]
    metrics = _present(groups)
    rows = [
        (g.label, seed, evaluation, *(g.number(m) for m in metrics))
        for g, seed, evaluation in zip(groups, seeds, evaluations, strict=True)
    ]
    return [
        Table(
            name="runs",
            title="Every run",
            columns=("run", "seed", "evaluation", *(label_of(m)[0] for m in metrics)),
            rows=rows,
            note="In brackets: 95% bootstrap intervals over problems.",
        )
    ]


def seed_table(runs: Sequence[Run]) -> list[Part]:
    """One row for all seeds of a configuration."""
    groups = grouped(runs)
    if all(len(group.runs) == 1 for group in groups):
        raise Absent("no two runs differ only in their seed")
    metrics = _present(groups)
    rows = [(g.label, Number(value=len(g.runs), kind="count"), *(g.number(m) for m in metrics)) for g in groups]
    return [
        Table(
            name="seeds",
            title="Runs over seeds",
            columns=("run", "seeds", *(label_of(m)[0] for m in metrics)),
            rows=rows,
            note="Mean ± standard deviation over seeds; a run of one seed has its interval over problems.",
        )
    ]


def ablation_parts(runs: Sequence[Run]) -> list[Part]:
    """What differs from the first run, and what it does."""
    groups = [group for group in grouped(runs) if group.config is not None]
    if len(groups) < 2:
        raise Absent("there are not two different configurations")
    base = groups[0]
    metrics = _present(groups)
    rows: list[Sequence[Cell]] = []
    for group in groups:
        changes = "–" if group is base else _changes(base, group)
        rows.append((group.label, changes, *(group.number(metric) for metric in metrics)))
    table = Table(
        name="ablation",
        title=f"What differs from {base.label}",
        columns=("run", "differences", *(label_of(m)[0] for m in metrics)),
        rows=rows,
        note="Intervals as in the tables above. Seed, name and places are no differences.",
    )
    return [table, *_bars("ablation_bars", "All configurations", groups, [g.label for g in groups])]


def density_parts(runs: Sequence[Run]) -> list[Part]:
    """The reward's density as the axis, where runs differ in nothing else."""
    families: dict[str, list[Group]] = {}
    for group in grouped(runs):
        if group.config is not None and group.config.algorithm.needs.discriminator:
            families.setdefault(config_hash(_comparable(group.config, density=False)), []).append(group)
    family = max(families.values(), key=len, default=[])
    if len(family) < 2:
        raise Absent("no two runs differ only in reward.density")
    family = sorted(family, key=_coarse_to_fine)
    metrics = _present(family)
    densities = [density_name(group.config) for group in family if group.config is not None]
    rows = [
        (density, Number(value=len(group.runs), kind="count"), *(group.number(metric) for metric in metrics))
        for density, group in zip(densities, family, strict=True)
    ]
    table = Table(
        name="density",
        title="Reward density",
        columns=("density", "seeds", *(label_of(metric)[0] for metric in metrics)),
        rows=rows,
        note="Mean ± standard deviation over seeds; one seed has its 95% interval over problems.",
    )
    return [*_bars("density_bars", "Reward density", family, densities), table]


def _coarse_to_fine(group: Group) -> tuple[int, int]:
    assert group.config is not None
    density = group.config.reward.density
    return list(DENSITIES).index(density.type), -density.every


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by configuration without the seed, in the order of their first run."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        key = config_hash(_comparable(run.config)) if run.config else f"run {run.label}"
        members.setdefault(key, []).append(run)
    return [group_of(alike) for alike in members.values()]


def group_of(runs: Sequence[Run]) -> Group:
    """Runs of one configuration with the numbers of their main evaluations."""
    return Group(runs=runs, summaries=[_summary(run) for run in runs])


def _comparable(config: RunConfig, *, density: bool = True) -> RunConfig:
    """Without the seed, and without the path that a warm start fills in, which follows name and seed."""
    update: dict[str, object] = {"seed": 0}
    if config.warm_start is not None:
        policy = config.model.policy.model_copy(update={"path": None, "build": None})
        update["model"] = config.model.model_copy(update={"policy": policy})
    if not density:
        blank = type(config.reward.density)()
        update["reward"] = config.reward.model_copy(update={"density": blank})
    return config.model_copy(update=update)


def _changes(base: Group, group: Group) -> str:
    assert base.config is not None and group.config is not None
    found = [
        f"{key}={Path(str(new)).name if key == 'warm_start' and new else _value(new)}"
        for key, _, new in differences(_comparable(base.config), _comparable(group.config))
        if key.partition(".")[0] not in NOT_HASHED
    ]
    more = [f"and {len(found) - MOST_DIFFERENCES} more"] if len(found) > MOST_DIFFERENCES else []
    return ", ".join([*found[:MOST_DIFFERENCES], *more]) or "none"


def _value(value: object) -> str:
    return "none" if value is None else str(value)


def _summary(run: Run) -> Summary:
    """The main evaluation's numbers; none where there is none."""
    return run.main.summary if run.evaluations else {}


def _present(groups: Sequence[Group]) -> list[str]:
    present = [m for m in COMPARED if any(m in summary for g in groups for summary in g.summaries)]
    if not present:
        raise Absent("no run has been evaluated")
    return present


def _bars(name: str, title: str, groups: Sequence[Group], labels: Sequence[str]) -> list[Part]:
    """Bars a group for each main metric, with the interval or one standard deviation."""
    shown, labels = list(groups[:BARS]), list(labels[:BARS])
    metrics = [m for m in DRAWN if any(g.number(m) is not None for g in shown)]
    if not metrics:
        return []
    drawing, axes = new_figure(height=min(9.0, 0.9 + len(shown) * (0.12 + 0.13 * len(metrics))))
    height = 0.8 / len(metrics)
    for index, metric in enumerate(metrics):
        numbers = [group.number(metric) for group in shown]
        values = np.array([np.nan if x is None else x.value for x in numbers])
        errors = np.array([_reach(x) for x in numbers]).T
        places = np.arange(len(shown))[::-1] + 0.4 - height * (index + 0.5)
        hatch = (None, "///", "...")[index]
        axes.barh(places, 100 * values, height=0.9 * height, color=COLOURS[index], alpha=0.75, hatch=hatch,
                  edgecolor="white", lw=0, label=label_of(metric)[0])  # fmt: skip
        axes.errorbar(100 * values, places, xerr=100 * errors, fmt="none", ecolor="black", elinewidth=0.8)
    axes.set_yticks(np.arange(len(shown))[::-1], [shortened(x, 22) for x in labels])
    axes.set(xlabel="share (%)", xlim=(0, None))
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=NEUTRAL, lw=0.6)
    legend_below(axes)
    note = "Lines: 95% interval over problems, or one standard deviation over seeds."
    note += f" The first {BARS} of {len(groups)}." if len(groups) > BARS else ""
    return [Figure(name=name, title=title, drawing=drawing, note=note)]


def _reach(number: Number | None) -> tuple[float, float]:
    """How far the error line goes down and up."""
    if number is None:
        return 0.0, 0.0
    if np.isfinite(number.std):
        return number.std, number.std
    if np.isfinite(number.low) and np.isfinite(number.high):
        return max(0.0, number.value - number.low), max(0.0, number.high - number.value)
    return 0.0, 0.0
