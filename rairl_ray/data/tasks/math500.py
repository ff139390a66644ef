"""MATH-500: competition mathematics with LaTeX answers, seven subjects and five levels; a test split alone."""

from __future__ import annotations

from functools import partial

from rairl_ray.data.rows import Row, optional_text_column, text_column
from rairl_ray.data.tasks.base import rules_of
from rairl_ray.data.tasks.experts import expert_completion
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, expert_text
from rairl_ray.types import Demonstration, Prompt

HUB_ID = "HuggingFaceH4/MATH-500"
METADATA = {"category": "subject", "level": "level"}


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    gold = text_column(row.values, columns.answer).strip()
    found = {key: optional_text_column(row.values, name) for key, name in METADATA.items()}
    prompt = Prompt(
        id=prompt_id,
        question=text_column(row.values, columns.prompt).strip(),
        answer=gold,
        metadata={key: value for key, value in found.items() if value is not None},
    )
    text = expert_text(row, columns)
    return Demonstration(prompt=prompt, completion=text and expert_completion(text))


MATH500 = TableTask(
    name="math500",
    hub=Hub(eval=(Source(HUB_ID, "test"),)),
    columns=Columns(prompt="problem", answer="answer", demonstration="solution"),
    parse=_parse,
    rules=partial(rules_of, grader="math"),
)
