"""GSM8K with chains of thought of a reasoning model that end in a boxed answer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from rairl_ray.data.grading import extract_answer, grade_answer
from rairl_ray.data.quantities import parse_quantity
from rairl_ray.data.rows import BadRow, Row
from rairl_ray.data.tasks.base import rules_of
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, plain_row
from rairl_ray.types import Demonstration

HUB_ID = "camel-ai/gsm8k_distilled"


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    """A chain that ends in another answer than the gold one is no expert."""
    read = plain_row(row, prompt_id, columns, _gold)
    wrong = read.completion and not grade_answer(read.completion, read.prompt.answer, "number").correct
    return replace(read, completion=None) if wrong else read


def _gold(text: str, name: str) -> str:
    """The boxed answer or the one after `####`, or a column that is only the number."""
    gold = extract_answer(text) or text.strip()
    if parse_quantity(gold) is None:
        raise BadRow(f"column {name!r} has no number in a box or after ####")
    return gold


GSM8K_DISTILLED = TableTask(
    name="gsm8k_distilled",
    hub=Hub(train=(Source(HUB_ID, "train"),)),
    # The data set spells its column so.
    columns=Columns(prompt="problem", answer="groud_truth_solution", demonstration="reasoning_solution"),
    parse=_parse,
    rules=partial(rules_of, grader="number"),
)
