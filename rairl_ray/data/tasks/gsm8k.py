"""GSM8K: grade-school word problems; experts are the worked solutions of the data or any other chains."""

from __future__ import annotations

from functools import partial

from rairl_ray.data.quantities import parse_quantity
from rairl_ray.data.rows import BadRow
from rairl_ray.data.tasks.base import rules_of
from rairl_ray.data.tasks.table import Columns, Hub, Source, TableTask, plain_row

HUB_ID, HUB_CONFIG = "openai/gsm8k", "main"


def _gold_number(text: str, name: str) -> str:
    """The number after `####`, or a column that is only the number."""
    gold = text.rpartition("####")[2].strip()
    if "=" in gold or parse_quantity(gold, units=False) is None:
        raise BadRow(f"column {name!r} ends in no number after ####")
    return gold.replace(",", "")


GSM8K = TableTask(
    name="gsm8k",
    hub=Hub((Source(HUB_ID, "train", HUB_CONFIG),), (Source(HUB_ID, "test", HUB_CONFIG),)),
    columns=Columns(prompt="question", answer="answer", demonstration="answer"),
    parse=partial(plain_row, gold=_gold_number),
    rules=partial(rules_of, grader="number"),
)
