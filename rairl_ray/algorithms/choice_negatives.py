"""The `choice` perturbation: a distractor for the answer, and a chain to match (docs/method.md 3)."""

from __future__ import annotations

import random
import re

from rairl_ray.algorithms.completion_text import Edit, Source, apply_edits

_CONCLUSION = r"(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?\**"


def other_choice(source: Source, draw: random.Random) -> str | None:
    """Answer and conclusion name a distractor, by letter and by text, where they named the right option.

    Needs `prompt.metadata["options"]` (letter -> text, or a list) and a gold letter or option text.
    """
    right = _right_letter(source)
    if right is None or source.answer is None:
        return None
    same = source.options[right].casefold()
    distractors = [letter for letter, text in source.options.items() if text.casefold() != same]
    if not distractors:
        return None
    wrong = draw.choice(distractors)
    edits = _answer_edits(source, right, wrong)
    if not edits:
        return None
    return apply_edits(source.text, [*_reasoning_edits(source, right, wrong), *edits])[0]


def _right_letter(source: Source) -> str | None:
    if not source.options or source.gold is None:
        return None
    gold = source.gold.strip()
    if gold.upper() in source.options:
        return gold.upper()
    named = [letter for letter, text in source.options.items() if text.casefold() == gold.casefold()]
    return named[0] if len(named) == 1 else None


def _answer_edits(source: Source, right: str, wrong: str) -> list[Edit]:
    assert source.answer is not None
    start, end = source.answer
    letters = re.compile(rf"(?<![A-Za-z'’]){right}(?![A-Za-z'’])")
    letter = letters.search(source.text, start, end)
    edits = [Edit(*letter.span(), wrong)] if letter else []
    named = _option_text(source.options[right]).search(source.text, start, end)
    if named and not (letter and letter.start() >= named.start() and letter.end() <= named.end()):
        edits.append(Edit(*named.span(), source.options[wrong]))
    return sorted(edits)


def _reasoning_edits(source: Source, right: str, wrong: str) -> list[Edit]:
    """Every "answer is (B)" of the reasoning, and the last mention of the right option's text."""
    start, end = source.reasoning
    pattern = re.compile(rf"{_CONCLUSION}(?P<letter>{right})(?![A-Za-z'’])", re.IGNORECASE)
    edits = [Edit(*m.span("letter"), wrong) for m in pattern.finditer(source.text, start, end)]
    mentions = list(_option_text(source.options[right]).finditer(source.text, start, end))
    if mentions:
        edits.append(Edit(*mentions[-1].span(), source.options[wrong]))
    edits.sort()
    return [e for i, e in enumerate(edits) if i == 0 or e.start >= edits[i - 1].end]


def _option_text(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text.strip())}(?!\w)", re.IGNORECASE)
