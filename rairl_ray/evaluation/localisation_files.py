"""Reading traces split in steps, with the label of the first wrong one, from files in the public layouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

from rairl_ray.data.rows import BadRow, BadRowReport, column, optional_text_column, read_file, text_column
from rairl_ray.errors import DataError

QUESTIONS = ("question", "prompt", "problem")
STEPS = ("steps", "model_output_steps")
IDS = ("id", "uuid")
LABELS = {
    "first_error_step": 0,
    "label": 0,
    "first_error_step_1based": 1,
    "model_output_solution_first_error_step": 1,
}
"""Column with the first wrong step -> the number of a trace's first step there. null and "N/A" say that all
steps are right, where steps count from 0 (as ProcessBench's `label`) also -1."""


@dataclass(frozen=True, kw_only=True)
class LabelledSteps:
    """One trace of a localisation file."""

    id: str
    question: str
    steps: tuple[str, ...]
    """[S] texts, at least one."""
    first_error: int | None
    """Index of the first wrong step from 0; -1: all are right; None: the file has no label for this trace."""
    final_answer_correct: bool | None
    """Whether the trace's answer is right, where the file says so."""
    step_scores: tuple[float, ...] | None
    """[S] the file's own score of each step, where the caller named its column."""
    line: int
    """Row of the file, from 1."""

    @property
    def completion(self) -> str:
        """The steps as one text, a line end between them."""
        return "\n".join(self.steps)

    @property
    def step_char_ends(self) -> list[int]:
        """[S] character end (exclusive) of each step in `completion`; the line end after a step is its own."""
        ends = list(accumulate(len(step) + 1 for step in self.steps))
        return [*ends[:-1], ends[-1] - 1]


def read_labelled_steps(
    path: Path,
    *,
    scores: str | None = None,
    labels: Literal["required", "optional"] = "required",
    on_bad_row: Literal["fail", "skip"] = "fail",
) -> list[LabelledSteps]:
    """The traces of a .jsonl, .json or .parquet file; scores: column with one number a step.

    Raises DataError naming file and line for rows without a question, steps or (`required`) a label, a label
    outside the steps, scores of another number than the steps, and an id that occurs twice.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give one with the columns question, steps and a label")
    report = BadRowReport(str(path), on_bad_row)
    traces: dict[str, LabelledSteps] = {}
    for place, position, values in read_file(path, report):
        try:
            trace = _trace(values, position + 1, scores)
            if trace.first_error is None and labels == "required":
                raise BadRow(f"no column with the first wrong step ({', '.join(LABELS)})")
            if trace.id in traces:
                raise BadRow(f"id {trace.id!r} is that of row {traces[trace.id].line} too")
        except BadRow as error:
            report.add(place, error)
        else:
            traces[trace.id] = trace
    report.finish(len(traces))
    return list(traces.values())


def _trace(values: Mapping[str, object], line: int, scores: str | None) -> LabelledSteps:
    steps = _first(values, STEPS)
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise BadRow("the steps are no list of texts with at least one")
    if not any(step.strip() for step in steps):
        raise BadRow("the steps are all empty")
    question = next((name for name in QUESTIONS if name in values), QUESTIONS[0])
    ids = [text for name in IDS if (text := optional_text_column(values, name)) is not None]
    answer = values.get("final_answer_correct")
    if answer is not None and not isinstance(answer, bool):
        raise BadRow(f"column 'final_answer_correct' holds {answer!r}, not true or false")
    return LabelledSteps(
        id=ids[0] if ids else str(line),
        question=text_column(values, question),
        steps=tuple(steps),
        first_error=_first_error(values, len(steps)),
        final_answer_correct=answer,
        step_scores=None if scores is None else _scores(values, scores, len(steps)),
        line=line,
    )


def _first(values: Mapping[str, object], columns: tuple[str, ...]) -> object:
    return column(values, next((name for name in columns if name in values), columns[0]))


def _first_error(values: Mapping[str, object], count: int) -> int | None:
    found = {name: _index(name, values[name], base, count) for name, base in LABELS.items() if name in values}
    if len(set(found.values())) > 1:
        raise BadRow(f"columns {', '.join(found)} name different steps")
    return next(iter(found.values()), None)


def _index(name: str, value: object, base: int, count: int) -> int:
    """Index from 0, -1 for "all steps are right"."""
    if value is None or (isinstance(value, str) and value.strip().upper() == "N/A"):
        return -1
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise BadRow(f"column {name!r} holds {value!r}, not the number of a step")
    if base == 0 and number == -1:
        return -1
    if not base <= number < base + count:
        none = "-1 or null" if base == 0 else 'null or "N/A"'
        raise BadRow(
            f"column {name!r} is {number}; its {count} steps count from {base} to {base + count - 1}, "
            f"and {none} says that all are right"
        )
    return number - base


def _scores(values: Mapping[str, object], name: str, count: int) -> tuple[float, ...]:
    numbers = column(values, name)
    if not isinstance(numbers, list) or len(numbers) != count:
        held = f"{len(numbers)} values" if isinstance(numbers, list) else repr(numbers)
        raise BadRow(f"column {name!r} holds {held}, not one number for each of the {count} steps")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise BadRow(f"column {name!r} holds {number!r}, not a finite number")
    return tuple(float(number) for number in numbers)
