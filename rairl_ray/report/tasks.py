"""Densities against datasets: one number a task for each density, beside untrained, SFT and GRPO models."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rairl_ray import metrics as names
from rairl_ray.config.described import density_name
from rairl_ray.report.collect import Evaluation, Run
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Absent, Cell, Number, Part, Table
from rairl_ray.report.seeds import over_seeds

UNTRAINED, SFT, GRPO = "untrained", "SFT", "GRPO"
COARSE_TO_FINE = (UNTRAINED, SFT, GRPO, "sparse", "partial", "interval", "dense")


def density_by_task(runs: Sequence[Run], metric: str | None) -> list[Part]:
    """A table for pass@1, and one for the sweep's metric if it is another one."""
    found = [(method, task, seed, e) for run in runs for method, task, seed, e in _evaluated(run)]
    tasks = list(dict.fromkeys(task for _, task, _, _ in found))
    methods = sorted(dict.fromkeys(method for method, _, _, _ in found), key=_rank)
    if len(methods) < 2:
        raise Absent("the runs are of one density or method")
    parts: list[Part] = []
    for name in dict.fromkeys([names.EVAL_PASS_AT_1, metric or names.EVAL_PASS_AT_1]):
        rows: list[Sequence[Cell]] = []
        for method in methods:
            cells = [_cell([x for x in found if x[:2] == (method, task)], name) for task in tasks]
            if any(cell is not None for cell in cells):
                rows.append((method, *cells))
        if rows:
            label = label_of(name)[0]
            parts.append(
                Table(
                    name="density_by_task_" + re.sub(r"\W+", "_", name),
                    title=f"Density by dataset: {label}",
                    columns=("", *tasks),
                    rows=rows,
                    note="Mean over seeds with its 95% interval (Student's t), a seed counts by its mean; "
                    "one run alone has its interval over problems.",
                )
            )
    if not parts:
        raise Absent("no run has been evaluated")
    return parts


def _evaluated(run: Run) -> list[tuple[str, str, int, Evaluation]]:
    """(method, task, seed, evaluation) of a run; what SFT evaluates first is untrained."""
    if run.config is None or not run.evaluations:
        return []
    config = run.config
    place = (config.data.task, config.seed)
    found = [(method_of(run), *place, run.main)]
    start = run.evaluations.get("start")
    untrained = not config.algorithm.needs.rollouts and not config.warm_start
    if start is not None and start is not run.main and untrained:
        found.append((UNTRAINED, *place, start))
    return found


def method_of(run: Run) -> str:
    """The density of an adversarial run, else what trained the model; a run without a step is untrained."""
    assert run.config is not None
    if not run.metrics:
        return UNTRAINED
    kind = run.config.algorithm.type
    return {"sft": SFT, "grpo": GRPO}.get(kind) or density_name(run.config)


def _rank(method: str) -> tuple[int, int]:
    """Coarse densities before fine ones."""
    word, _, every = method.partition(" ")
    return COARSE_TO_FINE.index(word), -int(every or 0)


def _cell(found: Sequence[tuple[str, str, int, Evaluation]], metric: str) -> Number | None:
    have = [(seed, e.summary[metric]) for _, _, seed, e in found if metric in e.summary]
    if len(have) == 1:
        return number_of(metric, have[0][1])
    by_seed: dict[int, list[float]] = {}
    for seed, entry in have:
        by_seed.setdefault(seed, []).append(entry["value"])
    return over_seeds(by_seed, label_of(metric)[1])
