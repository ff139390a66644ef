"""MedQA: clinical multiple-choice questions (USMLE) with four or five options; the data has no experts."""

from __future__ import annotations

from functools import partial

from rairl_ray.data.choices import choice_prompt, read_options
from rairl_ray.data.rows import BadRow, Row, column, optional_text_column, text_column
from rairl_ray.data.tasks.base import CHOICE_SYSTEM_PROMPT, rules_of
from rairl_ray.data.tasks.experts import expert_completion
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, expert_text
from rairl_ray.types import Demonstration

HUB_ID = "GBaker/MedQA-USMLE-4-options"
OPTIONS, EXAM = "options", "meta_info"


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    options = read_options(column(row.values, OPTIONS))
    if not options:
        raise BadRow(f"column {OPTIONS!r} holds no options; give a list, or letters to texts")
    exam = optional_text_column(row.values, EXAM)
    question, answer = text_column(row.values, columns.prompt).strip(), column(row.values, columns.answer)
    metadata: dict[str, object] = {} if exam is None else {"category": exam}
    prompt = choice_prompt(prompt_id, question, options, answer, metadata)
    if prompt.answer is None:
        raise BadRow(f"column {columns.answer!r} is null")
    text = expert_text(row, columns)
    return Demonstration(prompt=prompt, completion=text and expert_completion(text))


MEDQA = TableTask(
    name="medqa",
    hub=Hub((Source(HUB_ID, "train"),), (Source(HUB_ID, "test"),)),
    columns=Columns(prompt="question", answer="answer_idx", demonstration=None),
    parse=_parse,
    rules=partial(rules_of, grader="choice", system_prompt=CHOICE_SYSTEM_PROMPT),
)
