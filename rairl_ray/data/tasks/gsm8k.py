"""GSM8K: grade-school word problems; experts are the worked solutions of the data or any other chains."""

from __future__ import annotations

from rairl_ray.config.schema import Data, Fields
from rairl_ray.data.completion_format import REASONING_SYSTEM_PROMPT
from rairl_ray.data.grading import Grade, grade_answer
from rairl_ray.data.quantities import parse_quantity
from rairl_ray.data.rows import BadRow, Row, column, optional_text_column, text_column
from rairl_ray.data.tasks.base import Task, content_hash
from rairl_ray.data.tasks.experts import expert_completion
from rairl_ray.data.tasks.table import read_splits
from rairl_ray.types import Demonstration, Prompt

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"
_DEFAULTS = Fields()


class _Columns:
    """The data set's own column names, wherever the configuration leaves the general ones."""

    def __init__(self, fields: Fields) -> None:
        self.prompt = "question" if fields.prompt == _DEFAULTS.prompt else fields.prompt
        self.answer = fields.answer or "answer"
        self.demonstration = (
            "answer" if fields.demonstration == _DEFAULTS.demonstration else fields.demonstration
        )

    def parse(self, row: Row, prompt_id: str) -> Demonstration:
        gold = _gold_number(text_column(row.values, self.answer), self.answer)
        prompt = Prompt(id=prompt_id, question=text_column(row.values, self.prompt).strip(), answer=gold)
        text = None
        if self.demonstration is not None:
            column(row.values, self.demonstration)  # a missing column is an error; an empty one means no expert
            text = optional_text_column(row.values, self.demonstration)
        return Demonstration(prompt=prompt, completion=text and expert_completion(text, gold))


def _gold_number(text: str, name: str) -> str:
    """The number after `####`, or a column that is only the number."""
    gold = text.rpartition("####")[2].strip()
    if "=" in gold or parse_quantity(gold, units=False) is None:
        raise BadRow(f"column {name!r} ends in no number after ####")
    return gold.replace(",", "")


def grade(prompt: Prompt, text: str) -> Grade:
    return grade_answer(text, prompt.answer, "number")


def make_gsm8k(data: Data) -> Task:
    if data.path is None and data.config_name is None:
        data = data.model_copy(update={"config_name": HUB_CONFIG})
    columns = _Columns(data.fields)
    train, evaluation = read_splits(data, "gsm8k", data.path or HUB_ID, columns.prompt, columns.parse)
    return Task(
        name="gsm8k",
        system_prompt=REASONING_SYSTEM_PROMPT if data.system_prompt is None else data.system_prompt,
        train=train,
        eval=evaluation,
        data_hash=content_hash(train, evaluation),
        grader=grade,
    )
