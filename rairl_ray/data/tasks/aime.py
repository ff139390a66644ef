"""AIME 2024 and 2025: competition problems with whole answers from 0 to 999, for evaluation only."""

from __future__ import annotations

from functools import partial

from rairl_ray.data.quantities import parse_quantity
from rairl_ray.data.rows import BadRow, Row, optional_text_column, text_column
from rairl_ray.data.tasks.base import rules_of
from rairl_ray.data.tasks.experts import expert_completion
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, expert_text
from rairl_ray.types import Demonstration, Prompt

HUB_ID_2024, HUB_ID_2025 = "HuggingFaceH4/aime_2024", "yentinglin/aime_2025"
LARGEST = 999
YEAR, YEAR_2024, YEAR_2025 = "year", "2024", "2025"


def _parse(row: Row, prompt_id: str, columns: Columns) -> Demonstration:
    gold = _gold(text_column(row.values, columns.answer), columns.answer)
    year = optional_text_column(row.values, YEAR) or _year_of(prompt_id)
    prompt = Prompt(
        id=prompt_id,
        question=text_column(row.values, columns.prompt).strip(),
        answer=gold,
        metadata={} if year is None else {"category": year},
    )
    text = expert_text(row, columns)
    return Demonstration(prompt=prompt, completion=text and expert_completion(text))


def _year_of(prompt_id: str) -> str | None:
    """The hub sources are named after their year, and ids after their source."""
    name = prompt_id.split("/")[1]
    return name if name in (YEAR_2024, YEAR_2025) else None


def _gold(text: str, name: str) -> str:
    quantity = parse_quantity(text.strip(), units=False)
    value = None if quantity is None or quantity.percent else quantity.value
    if value is None or value.denominator != 1 or not 0 <= value <= LARGEST:
        raise BadRow(f"column {name!r} holds {text[:40]!r}, not a whole number from 0 to {LARGEST}")
    return str(value)


AIME = TableTask(
    name="aime",
    hub=Hub(eval=(Source(HUB_ID_2024, "train", name=YEAR_2024), Source(HUB_ID_2025, "train", name=YEAR_2025))),
    columns=Columns(prompt="problem", answer="answer", demonstration=None),
    parse=_parse,
    rules=partial(rules_of, grader="number"),
)
