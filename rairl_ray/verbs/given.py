"""Completions from a file (`eval.input`): read, checked row by row, tied to their problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rairl_ray.config.schema import RunConfig
from rairl_ray.data.choices import read_options
from rairl_ray.data.rows import BadRow, BadRowReport, optional_text_column, read_file
from rairl_ray.data.tasks import make_task
from rairl_ray.errors import DataError
from rairl_ray.rewards.lines import completion_of, question_of
from rairl_ray.types import Prompt

SCORES = ("unit_scores", "reward_model_score", "score")
LOGPROBS = ("policy_logprobs", "policy_log_probs")


def given_rows(file: Path, config: RunConfig, tokens: Callable[[str, str], int]) -> list[dict[str, Any]]:
    """One row a completion, in the file's order: problem, generation, and what it brings of scores.

    Rows of one question are one problem; `generation_idx` is their place in it, by order where it is missing. A
    question without an `answer` takes the one of the task's held-out problem with the same text.

    Args:
        tokens: (question, completion) -> number of completion tokens, for rows that do not say.

    Raises:
        DataError: a bad row, with its line number; two rows of one question with one generation_idx.
    """
    report = BadRowReport(str(file), config.data.on_bad_row)
    problems = _Problems(config)
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, int]] = set()
    for place, _, values in read_file(file, report):
        try:
            row = _row(values, problems, config, tokens)
            key = (row["prompt_id"], row["generation_idx"])
            if key in seen:
                raise BadRow(f"generation_idx {key[1]} of this question occurs twice")
        except BadRow as error:
            report.add(place, error)
            continue
        seen.add(key)
        problems.count[key[0]] = problems.count.get(key[0], 0) + 1
        rows.append(row)
    report.finish(len(rows))
    return rows


class _Problems:
    """Problems by their question; the task's own are loaded at the first question that lacks something."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._known: dict[str, Prompt] | None = None
        self._ids: dict[str, str] = {}
        self.count: dict[str, int] = {}
        """Prompt id -> rows so far."""

    def id_of(self, question: str, given: object) -> str:
        return self._ids.setdefault(question, str(given) if given is not None else f"input/{len(self._ids)}")

    def known(self, question: str) -> Prompt | None:
        if self._known is None:
            try:
                task = make_task(self._config.data, self._config.seed)
            except DataError as error:
                raise DataError(
                    f"eval.input={self._config.eval.input}: a row has no answer, and the task's own data "
                    f"cannot be read: {error}"
                ) from None
            self._known = {item.prompt.question.strip(): item.prompt for item in task.eval}
        return self._known.get(question.strip())


def _row(
    values: Mapping[str, Any], problems: _Problems, config: RunConfig, tokens: Callable[[str, str], int]
) -> dict[str, Any]:
    question, generation = question_of(values), completion_of(values)
    answer, metadata = optional_text_column(values, "answer"), values.get("metadata") or {}
    if not isinstance(metadata, Mapping):
        raise BadRow(f"column 'metadata' holds {type(metadata).__name__}, not a mapping")
    metadata = dict(metadata)
    options = read_options(values.get("options"))
    if options and "options" not in metadata:
        metadata["options"] = options
    if values.get("category") is not None:
        metadata.setdefault("category", str(values["category"]))
    if answer is None:
        known = problems.known(question)
        if known is None or known.answer is None:
            raise BadRow(f"no column 'answer', and the question is none of data.task={config.data.task}'s")
        answer, metadata = known.answer, {**known.metadata, **metadata}
    prompt_id = problems.id_of(question, values.get("prompt_id"))
    logprobs = _numbers(values, LOGPROBS)
    count = values.get("tokens")
    return {
        "prompt_id": prompt_id,
        "question": question,
        "answer": answer,
        "metadata": metadata,
        "generation": generation,
        "generation_idx": _index(values, problems.count.get(prompt_id, 0)),
        "finish_reason": values.get("finish_reason") or "stop",
        "tokens": count if isinstance(count, int) else len(logprobs or ()) or tokens(question, generation),
        **({} if logprobs is None else {"policy_logprobs": logprobs}),
        **_scores(values, config),
    }


def _index(values: Mapping[str, Any], default: int) -> int:
    value = values.get("generation_idx", default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise BadRow(f"generation_idx={value!r} is no whole number from 0 on")
    return value


def _scores(values: Mapping[str, Any], config: RunConfig) -> dict[str, Any]:
    """The rewards that a row brings: a number, or a list with null at tokens without one."""
    name = next((name for name in SCORES if values.get(name) is not None), None)
    if name is None:
        return {}
    value = values[name]
    if isinstance(value, list):
        units = [score for score in value if score is not None]
        if not units or not all(_is_number(score) for score in units):
            raise BadRow(f"column {name!r} is neither a number nor a list of numbers and nulls")
        ends = values.get("unit_char_ends")
        fits = isinstance(ends, list) and len(ends) == len(units)
        return {"unit_scores": units, **({"unit_char_ends": ends} if fits else {})}
    if not _is_number(value):
        raise BadRow(f"column {name!r} is neither a number nor a list of numbers and nulls")
    return {"reward_model_score": float(value)}


def _numbers(values: Mapping[str, Any], columns: tuple[str, ...]) -> list[float] | None:
    name = next((name for name in columns if values.get(name) is not None), None)
    if name is None:
        return None
    value = values[name]
    if not isinstance(value, list) or not all(_is_number(number) for number in value):
        raise BadRow(f"column {name!r} is not a list of numbers")
    return [float(number) for number in value]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
