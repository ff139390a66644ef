"""Rows with generations become graded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from rairl_ray.algorithms.rewards import selected_score
from rairl_ray.config.schema import Eval
from rairl_ray.data.grading import Grade
from rairl_ray.data.verifiable_rewards import verifiable_rewards
from rairl_ray.errors import DataError
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.types import Prompt

Grader = Callable[[Prompt, str], Grade]


def graded(
    rows: Iterable[Mapping[str, Any]],
    grader: Grader,
    config: Eval,
    policy_version: int | None,
    completed: Callable[[str], str],
) -> Iterator[EvalRow]:
    """Grade one row after the other, as what the policy's template has prefilled and the generation together.

    Args:
        completed: `Renderer.completed` of the policy; a generation from elsewhere may lack what was prefilled.

    Raises:
        DataError: a problem without what its grader needs.
    """
    for number, row in enumerate(rows, start=1):
        prompt = Prompt(
            id=row["prompt_id"], question=row["question"], answer=row["answer"], metadata=row["metadata"]
        )
        text = completed(row["generation"])
        try:
            grade = grader(prompt, text)
        except KeyError as error:
            raise DataError(
                f"row {number}: its problem has no {error.args[0]!r}, which the task's grader needs; give a "
                "column `metadata` with it, or leave `answer` out so that the task's own problem is used"
            ) from None
        units = row.get("unit_scores")
        yield EvalRow(
            prompt_id=prompt.id,
            question=prompt.question,
            generation=row["generation"],
            generation_idx=row["generation_idx"],
            answer=prompt.answer,
            correct=grade.correct,
            extracted=grade.answer,
            format_ok=grade.format_ok,
            finish_reason=row["finish_reason"],
            tokens=row["tokens"],
            policy_version=policy_version,
            discriminator_version=row.get("discriminator_version"),
            unit_scores=units,
            unit_char_ends=row.get("unit_char_ends"),
            score=selected_score(np.asarray(units), config) if units else row.get("reward_model_score"),
            policy_logprobs=row.get("policy_logprobs"),
            verifiable_rewards=verifiable_rewards(grade, text),
            metadata=row["metadata"],
        )
