"""A fork beside its run: the same held-out problems, so the difference is one of pairs.

Dimension letters: P problems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.evaluation.bootstrap import bootstrap
from rairl_ray.evaluation.reranking import rerank_at_k
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.evaluation.summary import by_problem
from rairl_ray.report.collect import Run
from rairl_ray.report.labels import label_of
from rairl_ray.report.parts import Absent, Cell, Number, Part, Table
from rairl_ray.runfolder import RunFolder

RESAMPLES = 2000
METRICS = (names.EVAL_PASS_AT_1, names.EVAL_RERANK_AT_1)


def fork_parts(runs: Sequence[Run]) -> list[Part]:
    """A row a fork whose run is there too: what was changed, and the difference with its interval."""
    by_folder = {run.path.resolve(): run for run in runs}
    rows: list[Sequence[Cell]] = []
    lacking: list[str] = []
    for run in runs:
        origin = RunFolder(run.path).read_fork()
        if origin is None:
            continue
        parent = by_folder.get(RunFolder(origin["run"]).root.resolve())
        if parent is None:
            lacking.append(f"{run.label} (its run {origin['run']} is not among what is reported; name it too)")
            continue
        try:
            problems, found = paired(parent, run)
        except Absent as reason:
            lacking.append(f"{run.label} ({reason})")
            continue
        at = f"{parent.label}@{origin['step']}"
        changed = ", ".join(origin["changed"]) or "nothing"
        rows.append((run.label, at, changed, Number(value=problems, kind="count"), *found))
    if not rows:
        raise Absent(
            f"left out: {', '.join(lacking)}" if lacking else "none of the runs is a fork of another one"
        )
    note = "A fork and its run draw the same prompts, and are evaluated on the same problems. In brackets: "
    note += "95% bootstrap intervals over problems of the difference within each problem."
    if lacking:
        note += f" Left out: {', '.join(lacking)}."
    columns = (
        "fork",
        "of",
        "changed",
        "problems",
        *(f"{label_of(metric)[0]}, difference" for metric in METRICS),
    )
    return [Table(name="forks", title="Forks against their runs", columns=columns, rows=rows, note=note)]


def paired(parent: Run, fork: Run) -> tuple[int, list[Number | None]]:
    """Problems that both main evaluations have, and fork minus parent of each of METRICS (None without it)."""
    before, after = _numbers(parent.main.rows), _numbers(fork.main.rows)
    shared = [key for key in before if key in after]
    if not shared:
        raise Absent(f"{fork.label} and {parent.label} were not evaluated on the same problems")
    found: list[Number | None] = []
    for index, metric in enumerate(METRICS):
        changes_P = np.array([after[key][index] - before[key][index] for key in shared])
        if np.isnan(changes_P).all():
            found.append(None)
            continue
        value, low, high = bootstrap(changes_P, RESAMPLES, ("forks",))
        found.append(Number(value=value, low=low, high=high, kind=label_of(metric)[1]))
    return len(shared), found


def _numbers(rows: Sequence[EvalRow]) -> dict[str, tuple[float, float]]:
    """Problem -> its pass@1, and the correctness of its best-scored sample (NaN without scores)."""
    found = {}
    for samples in by_problem(rows):
        correct = np.array([[row.correct for row in samples]])
        best = float("nan")
        if all(row.score is not None for row in samples):
            best = float(rerank_at_k(np.array([[row.score for row in samples]]), correct, 1)[0])
        found[samples[0].prompt_id] = (float(correct.mean()), best)
    return found
