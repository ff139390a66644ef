"""The one completion format of every task (docs/method.md 5) and the system prompts that ask for it."""

from __future__ import annotations

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

REASONING_SYSTEM_PROMPT = (
    "You solve problems step by step. Write your reasoning first, one step per line, inside <think> and "
    "</think>. Then write only the final result inside <answer> and </answer>. Reply in exactly this form:\n"
    "<think>\nyour steps\n</think>\n<answer>\nyour final result\n</answer>"
)

_ANSWER_TAG = re.compile(r"</?answer>")


def format_completion(think: str, answer: str) -> str:
    """`<think>\\n...\\n</think>\\n<answer>\\n...\\n</answer>`; an empty think section has one newline."""
    body = f"{think}\n" if think else ""
    return f"{THINK_OPEN}\n{body}{THINK_CLOSE}\n{ANSWER_OPEN}\n{answer}\n{ANSWER_CLOSE}"


def is_well_formed(text: str) -> bool:
    """Each tag exactly once and in order, a non-empty answer, nothing but whitespace between and around."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return False
    think_open, think_close, answer_open, answer_close = (text.index(tag) for tag in TAGS)
    return (
        think_open < think_close < answer_open < answer_close
        and not text[:think_open].strip()
        and not text[think_close + len(THINK_CLOSE) : answer_open].strip()
        and not text[answer_close + len(ANSWER_CLOSE) :].strip()
        and bool(text[answer_open + len(ANSWER_OPEN) : answer_close].strip())
    )


def answer_sections(text: str) -> list[str] | None:
    """Contents of all `<answer>` sections in order; None if one is opened and never closed.

    One pass over the tags, so a megabyte of unclosed tags costs no more than a megabyte of text.
    """
    sections: list[str] = []
    opened: int | None = None
    for tag in _ANSWER_TAG.finditer(text):
        if tag.group() == ANSWER_OPEN:
            if opened is not None:
                return None
            opened = tag.end()
        elif opened is not None:
            sections.append(text[opened : tag.start()].strip())
            opened = None
    return None if opened is not None else sections
