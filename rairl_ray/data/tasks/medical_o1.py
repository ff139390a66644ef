"""medical-o1: open medical questions; experts are a chain of thought and a response in prose.

The data has no short answers: the gold answer is the expert's response, and only the same text is right. That
ranks no free answer; a file with short answers is read with `data.fields.answer`, and its own grading follows.
"""

from __future__ import annotations

from functools import partial

from rairl_ray.data.rows import Row, text_column
from rairl_ray.data.tasks.base import rules_of
from rairl_ray.data.tasks.experts import composed_completion
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, expert_text
from rairl_ray.types import Demonstration, Prompt

HUB_ID, HUB_CONFIG = "FreedomIntelligence/medical-o1-reasoning-SFT", "en"


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    answer = text_column(row.values, columns.answer).strip()
    prompt = Prompt(id=prompt_id, question=text_column(row.values, columns.prompt).strip(), answer=answer)
    text = expert_text(row, columns)
    return Demonstration(prompt=prompt, completion=text and composed_completion(text, answer))


MEDICAL_O1 = TableTask(
    name="medical_o1",
    hub=Hub(train=(Source(HUB_ID, "train", HUB_CONFIG),)),
    columns=Columns(prompt="Question", answer="Response", demonstration="Complex_CoT"),
    parse=_parse,
    rules=partial(rules_of, grader="text"),
)
