"""MedReason: medical questions, most of them multiple choice, with chains over a knowledge graph as experts."""

from __future__ import annotations

import re

from rairl_ray.config.schema import Data
from rairl_ray.data.choices import choice_prompt, read_options
from rairl_ray.data.grading import Grade
from rairl_ray.data.rows import Row, optional_text_column, text_column
from rairl_ray.data.tasks.base import CHOICE_SYSTEM_PROMPT, TaskRules, grade, rules_of
from rairl_ray.data.tasks.experts import composed_completion, own_answer
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, expert_text
from rairl_ray.types import Demonstration, Prompt

HUB_ID = "UCSC-VLAA/MedReason"
OPTIONS, SOURCE = "options", "dataset_name"
_EXPLANATION = re.compile(r"\.?\s*Explanation:.*", re.DOTALL)


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    """The answer column is an option's text, and may go on with `. Explanation: ...`."""
    question = text_column(row.values, columns.prompt).strip()
    answer = _EXPLANATION.sub("", text_column(row.values, columns.answer)).strip()
    options = read_options(row.values.get(OPTIONS))
    source = optional_text_column(row.values, SOURCE)
    metadata: dict[str, object] = {} if source is None else {"category": source}
    if options:
        prompt = choice_prompt(prompt_id, question, options, answer, metadata)
    else:
        prompt = Prompt(id=prompt_id, question=question, answer=answer, metadata=metadata)
    text = expert_text(row, columns)
    return Demonstration(
        prompt=prompt,
        completion=text and composed_completion(text, own_answer(text) or prompt.answer or answer),
    )


def _grade(prompt: Prompt, text: str) -> Grade:
    """A problem without options is graded as text."""
    return grade("choice" if "options" in prompt.metadata else "text", prompt, text)


def _rules(data: Data) -> TaskRules:
    return TaskRules(system_prompt=rules_of(data, "choice", CHOICE_SYSTEM_PROMPT).system_prompt, grader=_grade)


MEDREASON = TableTask(
    name="medreason",
    hub=Hub(train=(Source(HUB_ID, "train"),)),
    columns=Columns(prompt="question", answer="answer", demonstration="reasoning"),
    parse=_parse,
    rules=_rules,
)
