"""Rows as arrays: P problems with N samples each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.report.parts import Absent


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The problems that have the largest number of samples; others (failed groups) are left out."""

    groups: Sequence[Sequence[EvalRow]]
    """[P][N] rows."""
    correct_PN: np.ndarray
    scores_PN: np.ndarray
    """NaN where no reward scored the sample."""


def samples(rows: Sequence[EvalRow]) -> Samples:
    """Rows of one evaluation by problem."""
    problems: dict[str, list[EvalRow]] = defaultdict(list)
    for row in rows:
        problems[row.prompt_id].append(row)
    most = max(len(group) for group in problems.values())
    groups = [sorted(g, key=lambda row: row.generation_idx) for g in problems.values() if len(g) == most]
    shape = (len(groups), most)
    flat = [row for group in groups for row in group]
    return Samples(
        groups=groups,
        correct_PN=np.array([row.correct for row in flat], dtype=bool).reshape(shape),
        scores_PN=np.array([score_of(row) for row in flat]).reshape(shape),
    )


def scored(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The rows with a score. Raises Absent if there are none."""
    found = [row for row in rows if np.isfinite(score_of(row))]
    if not found:
        raise Absent("no reward scored these rows")
    return found


def score_of(row: EvalRow) -> float:
    return float("nan") if row.score is None else float(row.score)


def rewards_of(unit_scores: Sequence[float | None]) -> np.ndarray:
    """[U] rewards of a trace's units, null as NaN."""
    return np.array([np.nan if x is None else x for x in unit_scores], dtype=np.float64)
