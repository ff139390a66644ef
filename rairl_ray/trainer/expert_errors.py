"""Wrong demonstrations: those made wrong on purpose (`data.expert_error_rate`), and those that are counted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import overload

from rairl_ray import metrics as names
from rairl_ray.algorithms.negatives import KINDS, perturb
from rairl_ray.data.grading import extract_answer
from rairl_ray.data.tasks.base import Task
from rairl_ray.data.tasks.generated import GeneratedSplit
from rairl_ray.keys import keyed_random
from rairl_ray.types import Demonstration

STREAM = "expert error"
PROBED = 500
"""Generated demonstrations whose share of errors is counted: the others are made while the run goes on."""
SHOWN = 3

_log = logging.getLogger(__name__)


def chosen(prompt_id: str, rate: float) -> bool:
    """Whether this example is to be corrupted: a function of id and rate alone, nested as the rate grows."""
    return keyed_random(STREAM, "chosen", prompt_id).random() < rate


def corrupted(demonstration: Demonstration) -> Demonstration | None:
    """The demonstration with one perturbation of any kind, the same at each call; None if none applies."""
    copies, _ = perturb(demonstration, count=1, kinds=tuple(KINDS), key=(STREAM, demonstration.prompt.id))
    return replace(demonstration, completion=copies[0].text) if copies else None


class ErringExperts(Sequence[Demonstration]):
    """Demonstrations of which a keyed share is corrupted, each when it is asked for."""

    def __init__(self, rows: Sequence[Demonstration], rate: float) -> None:
        self._rows, self._rate = rows, rate

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Demonstration: ...

    @overload
    def __getitem__(self, index: slice) -> list[Demonstration]: ...

    def __getitem__(self, index: int | slice) -> Demonstration | list[Demonstration]:
        if isinstance(index, slice):
            return [self._made(row) for row in self._rows[index]]
        return self._made(self._rows[index])

    def _made(self, row: Demonstration) -> Demonstration:
        if row.completion is None or not chosen(row.prompt.id, self._rate):
            return row
        return corrupted(row) or row


def with_expert_errors(task: Task, rate: float) -> Task:
    """The task with a share `rate` of its TRAINING demonstrations corrupted; logs the share that really is.

    An expert that no perturbation can make wrong stays as it is, and is counted. Rows of files are corrupted
    here and now, generated ones when they are asked for.
    """
    if rate == 0:
        return task
    erring = ErringExperts(task.train, rate)
    generated = isinstance(task.train, GeneratedSplit)
    train: Sequence[Demonstration] = erring if generated else list(erring)
    number = min(PROBED, len(train)) if generated else len(train)
    before, after = task.train[:number], train[:number]
    experts = sum(row.completion is not None for row in before)
    wrong = sum(old.completion != new.completion for old, new in zip(before, after, strict=True))
    wanted = sum(row.completion is not None and chosen(row.prompt.id, rate) for row in before)
    _log.warning(
        "data.expert_error_rate=%g: %d of %s%d demonstrations corrupted (%.1f%%); %d could not be",
        rate, wrong, "the first " if generated else "", experts, 100 * wrong / max(1, experts), wanted - wrong,
    )  # fmt: skip
    content = f"{task.data_hash}\x1f{STREAM}\x1f{rate}"
    return replace(task, train=train, data_hash=hashlib.sha256(content.encode()).hexdigest()[:16])


def counted_errors(task: Task) -> dict[str, float]:
    """`data/expert_error_rate`: the share of experts that conclude another answer than the gold one.

    Warns with their number and the first ids, and of experts that mark no answer (those count as neither).
    Empty where no expert has a gold answer to be compared with."""
    number = min(PROBED, len(task.train)) if isinstance(task.train, GeneratedSplit | ErringExperts) else None
    wrong: list[str] = []
    unmarked = graded = 0
    for row in task.train[:number]:
        if row.completion is None or (row.prompt.answer is None and not row.prompt.metadata):
            continue
        grade = task.grade(row.prompt, row.completion)
        if grade.answer is None and extract_answer(row.completion) is None:
            unmarked += 1
            continue
        graded += 1
        if not grade.correct:
            wrong.append(row.prompt.id)
    if unmarked:
        _log.warning(
            "data: %d experts mark no answer; they are left as they are, without an answer section", unmarked
        )
    if wrong:
        _log.warning(
            "data: %d of %d experts conclude another answer than the gold one (such as %s); they stay experts",
            len(wrong), graded, ", ".join(wrong[:SHOWN]),
        )  # fmt: skip
    return {names.DATA_EXPERT_ERROR_RATE: len(wrong) / graded} if graded else {}
