"""The official GRPO reward (docs/method.md 4): four for the format and one for the answer, for our tags.

They are those of the well-known GRPO demo. Each is a pure function of the text and its grade, and linear in the
text's length; a group's advantages compare their sum.
"""

from __future__ import annotations

import re

from rairl_ray.data.completion_format import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    TAGS,
    THINK_CLOSE,
    THINK_OPEN,
    format_completion,
)
from rairl_ray.data.grading import Grade

COUNT, SOFT_FORMAT, STRICT_FORMAT, INTEGER, CORRECTNESS = NAMES = (
    "format_count",
    "soft_format",
    "strict_format",
    "integer",
    "correctness",
)
TAG_REWARD, FORMAT_REWARD, CORRECT_REWARD = 0.125, 0.5, 2.0
TAIL_PENALTY = 0.001
"""For each character after the closing answer tag."""

_TAG_LINES = (f"{THINK_OPEN}\n", f"\n{THINK_CLOSE}\n", f"\n{ANSWER_OPEN}\n")
_LAST_TAG_LINE = f"\n{ANSWER_CLOSE}"
_BETWEEN = re.compile(rf"{THINK_CLOSE}\s*{ANSWER_OPEN}")
_WHOLE_NUMBER = re.compile(r"-?[0-9]+")


def verifiable_rewards(grade: Grade, text: str) -> dict[str, float]:
    """The five rewards by name (`NAMES`) of a completion and its task's own verdict; their sum is at most 4."""
    whole_number = grade.answer is not None and _WHOLE_NUMBER.fullmatch(grade.answer) is not None
    return {
        COUNT: format_count(text),
        SOFT_FORMAT: FORMAT_REWARD * has_sections(text),
        STRICT_FORMAT: FORMAT_REWARD * has_exact_layout(text),
        INTEGER: FORMAT_REWARD * whole_number,
        CORRECTNESS: CORRECT_REWARD * grade.correct,
    }


def format_count(text: str) -> float:
    """0.125 for each tag that stands exactly once with its newlines, less 0.001 a character after the last."""
    found = sum(text.count(line) == 1 for line in _TAG_LINES)
    if text.count(_LAST_TAG_LINE) != 1:
        return TAG_REWARD * found
    tail = len(text) - text.index(_LAST_TAG_LINE) - len(_LAST_TAG_LINE)
    return TAG_REWARD * (found + 1) - TAIL_PENALTY * tail


def has_sections(text: str) -> bool:
    """Whether a think section and, with nothing but whitespace between, an answer section stand anywhere."""
    opened, closed = text.find(THINK_OPEN), text.rfind(ANSWER_CLOSE)
    if opened < 0 or closed < 0:
        return False
    return _BETWEEN.search(text, opened + len(THINK_OPEN), closed) is not None


def has_exact_layout(text: str) -> bool:
    """Whether the text is what `format_completion` writes, each tag once: newlines included, nothing around."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    think = text[text.index(THINK_OPEN) + len(THINK_OPEN) : text.find(THINK_CLOSE)]
    answer = text[text.index(ANSWER_OPEN) + len(ANSWER_OPEN) : text.find(ANSWER_CLOSE)]
    return text == format_completion(think[1:-1], answer[1:-1])
