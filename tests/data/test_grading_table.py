"""Every hand-written verdict of grading_table.py, and hostile text for every grader."""

from __future__ import annotations

import time

import pytest

from rairl_ray.config.schema import Data
from rairl_ray.data.completion_format import format_completion
from rairl_ray.data.grading import Grade, grade_answer
from rairl_ray.data.tasks import task_rules
from rairl_ray.types import Prompt
from tests.grading_table import OPTIONS, TABLES


def verdict(grader: str, gold: str, text: str) -> Grade:
    if grader == "countdown":
        prompt = Prompt(
            id="c", question="?", answer=None, metadata={"numbers": [2, 3, 5, 10], "target": int(gold)}
        )
        return task_rules(Data(task="countdown")).grader(prompt, text)
    return grade_answer(text, gold, grader, OPTIONS if grader == "choice" else None)


def test_the_table_is_large_and_has_no_row_twice() -> None:
    rows = [(grader, *row) for grader, table in TABLES.items() for row in table]
    assert len(rows) >= 150 and len({row[:3] for row in rows}) == len(rows)
    assert all(sum(row[2] for row in table) >= 3 for table in TABLES.values())


@pytest.mark.parametrize(
    ("grader", "gold", "answer", "right"),
    [(grader, *row) for grader, table in TABLES.items() for row in table],
)
def test_a_hand_written_verdict(grader: str, gold: str, answer: str, right: bool) -> None:
    assert verdict(grader, gold, format_completion("x", answer)).correct is right


SIZE = 1_000_000

HOSTILE: dict[str, str] = {
    "empty": "",
    "a megabyte of prose": "so it goes " * (SIZE // 11),
    "a megabyte in the answer": format_completion("x", "9" * SIZE),
    "a megabyte of reasoning": format_completion("9+9=18\n" * (SIZE // 7), "19"),
    "no tags": "the answer is 18",
    "nested answers": "<answer>" * 1000 + "18" + "</answer>" * 1000,
    "nested thinking": "<think>" * 50_000 + "</think>" * 50_000 + "<answer>\n17\n</answer>",
    "several answers": "<answer>18</answer><answer>19</answer>",
    "an answer in the reasoning": "<think>\n<answer>18</answer>\n</think>\n<answer>\n19\n</answer>",
    "many boxes": "\\boxed{18}" * 20_000 + "\\boxed{19}",
    "control characters": format_completion("x", "1\x008\x07\x1b[31m\x7f"),
    "null bytes alone": "\x00" * 100_000,
    "right to left": format_completion("x", "\u202e81\u202c or \u05d0\u05d1"),
    "arabic digits": format_completion("x", "\u0661\u0669"),
    "combining marks": format_completion("x", "1" + "\u0301" * 500 + "9"),
    "zero width": format_completion("x", "1\u200b9"),
    "half a surrogate": format_completion("x", "\ud800 19"),
    "line separators": format_completion("x", "1\u20289\u2029"),
    "a power tower": format_completion("x", "9^{9^{9^{9}}}"),
    "a factorial": format_completion("x", "99999999!!"),
    "a deep fraction": format_completion("x", "\\frac{1}{" * 60 + "2" + "}" * 60),
    "unbalanced braces": format_completion("x", "{" * 150 + "\\sqrt{" * 5),
    "a huge exponent": format_completion("x", "1e99999999"),
    "a long product": format_completion("x", "*".join(["99999"] * 30)),
    "python": format_completion("x", "__import__('os').system('true')"),
    "parentheses": format_completion("x", "(" * 99 + "19" + ")" * 99),
    "minus signs": format_completion("x", "-" * 1999),
    "commas": format_completion("x", "1," * 900),
    "a tag cut off": "<think>\nx\n</think>\n<answer>\n18\n</answ",
}


@pytest.mark.parametrize("grader", list(TABLES))
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_text_is_wrong_and_costs_little(grader: str, name: str) -> None:
    start = time.process_time()
    gold = {"choice": "C", "countdown": "21"}.get(grader, "18")
    assert not verdict(grader, gold, HOSTILE[name]).correct
    assert time.process_time() - start < 3
