"""MMLU-Pro: up to ten options in fourteen categories; experts are model-written chains."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from rairl_ray.data.choices import choice_prompt, read_options
from rairl_ray.data.grading import extract_answer
from rairl_ray.data.rows import BadRow, Row, column, optional_text_column, text_column
from rairl_ray.data.tasks.base import CHOICE_SYSTEM_PROMPT, rules_of
from rairl_ray.data.tasks.experts import composed_completion
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask
from rairl_ray.types import Demonstration

HUB_ID = "TIGER-Lab/MMLU-Pro"
OPTIONS, INDEX, CATEGORY, OUTPUTS, COT = "options", "answer_index", "category", "outputs", "cot_content"
_LEAD_IN = re.compile(r"^\s*(?:A:\s*)?Let's think step by step\.\s*")


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    options = read_options(column(row.values, OPTIONS))
    if not options:
        raise BadRow(f"column {OPTIONS!r} holds no options; give a list, or letters to texts")
    question = text_column(row.values, columns.prompt).strip()
    category = optional_text_column(row.values, CATEGORY)
    metadata: dict[str, object] = {} if category is None else {"category": category}
    prompt = choice_prompt(prompt_id, question, options, column(row.values, columns.answer), metadata)
    gold = prompt.answer
    if gold is None:
        raise BadRow(f"column {columns.answer!r} is null")
    _check_index(row.values, list(options), gold)
    text = _expert(row.values, columns, gold)
    return Demonstration(prompt=prompt, completion=text and composed_completion(text, gold))


def _check_index(values: Mapping[str, object], letters: list[str], gold: str) -> None:
    """`answer_index`, where it is there, is the place of the answer."""
    index = values.get(INDEX)
    if index is not None and index != letters.index(gold):
        raise BadRow(f"{INDEX} {index!r} is not the place of the answer {gold} (from 0)")


def _expert(values: Mapping[str, object], columns: Columns, gold: str) -> str | None:
    """A column named by `data.fields.demonstration`, else the first right chain of `outputs`, else
    `cot_content`.

    A chain is right if it was graded so and says the letter itself: where none could be read, the upstream
    evaluation guessed one at random, and some of those guesses count as correct.
    """
    if columns.demonstration not in (None, OUTPUTS):
        column(values, columns.demonstration)
        return optional_text_column(values, columns.demonstration)
    if columns.demonstration is None:
        return None
    outputs = values.get(OUTPUTS)
    said = re.compile(rf"answer is:?\s*\**\s*\(?{gold}\b", re.IGNORECASE)
    for output in outputs if isinstance(outputs, list) else ():
        if not isinstance(output, Mapping) or not isinstance(output.get("text"), str):
            raise BadRow(f"column {OUTPUTS!r} is not a list of objects with text, pred and correct")
        chain, right = output["text"], output.get("correct") is True and output.get("pred") == gold
        if right and (said.search(chain) or extract_answer(chain) == gold):
            return str(chain)
    text = optional_text_column(values, COT)
    return text and _LEAD_IN.sub("", text)


MMLU_PRO = TableTask(
    name="mmlu_pro",
    hub=Hub((Source(HUB_ID, "validation"),), (Source(HUB_ID, "test"),)),
    columns=Columns(prompt="question", answer="answer", demonstration=OUTPUTS),
    parse=_parse,
    rules=partial(rules_of, grader="choice", system_prompt=CHOICE_SYSTEM_PROMPT),
)
