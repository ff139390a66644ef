"""Any table of prompts, with answers and expert texts where it has them: jsonl, json, csv, parquet or a hub id.

Besides the columns of `data.fields`, `options` (see `choices.options_in`; needed by `grader: choice`, shown
below the question) and `corrupted_reasonings` (a list of wrong chains that the data ships) are read.
"""

from __future__ import annotations

from functools import partial

from rairl_ray.config.schema import Data, Fields
from rairl_ray.data.choices import choice_prompt, options_in
from rairl_ray.data.rows import BadRow, Row, column, optional_text_column, text_column
from rairl_ray.data.tasks.base import Task, TaskRules, content_hash, rules_of
from rairl_ray.data.tasks.experts import expert_completion
from rairl_ray.data.tasks.table import read_splits
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.types import Demonstration, Prompt

OPTIONS_COLUMN = "options"
CORRUPTED_COLUMN = "corrupted_reasonings"
_DEFAULTS = Fields()


def _parse(data: Data, row: Row, prompt_id: str) -> Demonstration:
    question = text_column(row.values, data.fields.prompt).strip()
    answer = _optional(row, data.fields.answer, _DEFAULTS.answer)
    if data.grader == "choice":
        options = options_in(row.values)
        if not options:
            raise BadRow(
                f"data.grader=choice needs a column {OPTIONS_COLUMN!r} with a list or letters to texts"
            )
        gold = None if answer is None else column(row.values, data.fields.answer or "")
        prompt = choice_prompt(prompt_id, question, options, gold)
    else:
        prompt = Prompt(id=prompt_id, question=question, answer=answer)
    target = _optional(row, data.fields.demonstration, _DEFAULTS.demonstration)
    return Demonstration(
        prompt=prompt,
        completion=target and expert_completion(target),
        corrupted=_corrupted(row),
    )


def _optional(row: Row, name: str | None, default: str | None) -> str | None:
    """A column that the data may lack. One that the user named must be there, though it may be empty."""
    if name is None:
        return None
    if name != default and name.split(".")[0] not in row.values and name not in row.values:
        raise BadRow(f"no column {name!r} (there are: {', '.join(map(str, row.values))})")
    return optional_text_column(row.values, name)


def _corrupted(row: Row) -> tuple[str, ...]:
    value = row.values.get(CORRUPTED_COLUMN)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise BadRow(f"column {CORRUPTED_COLUMN!r} is not a list of texts")
    return tuple(expert_completion(text) for text in value)


class JsonlTask:
    """The task of any table; its grader is `data.grader`."""

    def rules(self, data: Data) -> TaskRules:
        return rules_of(data, data.grader)

    def make(self, data: Data) -> Task:
        if data.path is None:
            raise ConfigError("data.path is not set; data.task=jsonl needs a file, a folder or a hub id")
        train, evaluation = read_splits(data, "jsonl", lambda row: data.fields.prompt, partial(_parse, data))
        if all(row.prompt.answer is None for row in evaluation) and all(
            row.completion is None for row in train
        ):
            raise DataError(
                f"data.path={data.path}: rows have neither answers (data.fields.answer={data.fields.answer}) "
                f"nor experts (data.fields.demonstration={data.fields.demonstration}); name the columns"
            )
        rules = self.rules(data)
        return Task(
            name="jsonl",
            system_prompt=rules.system_prompt,
            train=train,
            eval=evaluation,
            data_hash=content_hash(train, evaluation),
            grader=rules.grader,
        )
