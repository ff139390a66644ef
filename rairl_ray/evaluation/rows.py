"""One evaluated generation, and its JSON line."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rairl_ray.errors import DataError
from rairl_ray.files import read_json_lines, stream_json_lines, write_json_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalRow:
    """A graded sample; the reward's fields are None where no discriminator scored it."""

    prompt_id: str
    question: str
    generation: str
    """The completion's text."""
    generation_idx: int
    """0..N-1 within its problem."""
    answer: str | None
    """Gold answer."""
    correct: bool
    extracted: str | None
    """The answer that the grader found in the generation; None where it found none."""
    format_ok: bool
    finish_reason: str
    """"stop", or "length" for a truncated generation."""
    tokens: int
    """Completion tokens, with the end-of-sequence token."""
    policy_version: int | None
    """Number of policy updates; None for a model that no run of ours made."""
    discriminator_version: int | None = None
    unit_scores: Sequence[float] | None = None
    """[U] rewards of the scored units."""
    unit_char_ends: Sequence[int] | None = None
    """[U] character end (exclusive) of each unit in `generation`."""
    score: float | None = None
    """The selector's number for the whole generation, which reranks it."""
    policy_logprobs: Sequence[float] | None = None
    """[T] log-probability of each completion token under the policy, where it was asked for."""
    verifiable_rewards: Mapping[str, float] | None = None
    """Name -> value of each verifiable reward (format, correctness, ...), where they were asked for."""
    metadata: Mapping[str, object] = field(default_factory=dict)
    """What the problem's grader needs besides the answer (`Prompt.metadata`); `category` groups tables."""


_NAMES = frozenset(field.name for field in dataclasses.fields(EvalRow))

FILE_NAMES = {"question": "prompt", "score": "reward_model_score", "policy_logprobs": "policy_log_probs"}
"""Fields whose column in rows.jsonl is the official evaluator's (docs/method.md 6)."""


def row_values(row: EvalRow) -> dict[str, Any]:
    """The row's JSON object; fields that are None or empty are left out, but for the score."""
    values = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    optional = ("unit_scores", "unit_char_ends", "policy_logprobs", "verifiable_rewards", "metadata")
    return {
        FILE_NAMES.get(name, name): value for name, value in values.items() if name not in optional or value
    }


def write_rows(path: Path, rows: Iterable[EvalRow]) -> int:
    """Write rows.jsonl, one row a line, streamed, whole or not at all; NaN becomes null. The number of rows."""
    return write_json_lines(path, (row_values(row) for row in rows))


def read_rows(path: Path) -> list[EvalRow]:
    """Read rows.jsonl; columns that are not ours are ignored. Raises DataError naming file and row."""
    return [_row(path, number, values) for number, values in enumerate(read_json_lines(path), start=1)]


def read_numbers(path: Path) -> list[EvalRow]:
    """The rows without their texts, and with the mean of `policy_logprobs` alone: what `summarise` reads.

    Raises as `read_rows`.
    """
    rows: list[EvalRow] = []
    texts: dict[str | None, str | None] = {}
    categories: dict[str, dict[str, object]] = {}

    def once(text: Any) -> Any:
        """One object for equal texts: a file repeats few of them."""
        return texts.setdefault(text, text)

    for number, values in enumerate(stream_json_lines(path), start=1):
        row = _row(path, number, {**values, "generation": "", "prompt": ""})
        logprobs, units = row.policy_logprobs, row.unit_scores
        slim = dataclasses.replace(
            row,
            prompt_id=once(row.prompt_id),
            answer=once(row.answer),
            extracted=once(row.extracted),
            finish_reason=once(row.finish_reason),
            policy_logprobs=[float(np.mean(logprobs))] if logprobs else None,
            unit_scores=None if units is None else array("d", units),
            unit_char_ends=None,
            verifiable_rewards=None,
            metadata=categories.setdefault(
                repr(category := row.metadata.get("category")),
                {} if category is None else {"category": category},
            ),
        )
        rows.append(slim)
    return rows


def _row(path: Path, number: int, values: Mapping[str, Any]) -> EvalRow:
    ours = {column: name for name, column in FILE_NAMES.items()}
    named = {ours.get(column, column): value for column, value in values.items()}
    try:
        return EvalRow(**{name: value for name, value in named.items() if name in _NAMES})
    except TypeError as error:
        missing = str(error).split(": ")[-1]
        raise DataError(f"{path}: row {number} lacks {missing}; evaluate the run again") from error
