"""Multiple choice: options and gold letter of a row, and which option an answer names, never more than one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from rairl_ray.data.rows import BadRow
from rairl_ray.types import Prompt

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_LENGTH = 2000

Options = Mapping[str, str]

_LEAD_IN = re.compile(
    r"^(?:the\s+)?(?:(?:correct|best|final)\s+)?(?:answer|option|choice)(?:\s+is)?\s*:?\s*", re.I
)
_LETTER_FIRST = re.compile(r"^\(?([A-Za-z])\s*(?:[.):,\-–]+|$)\s*(.*)$", re.DOTALL)
_MARKED_LETTER = re.compile(
    r"\(([A-Z])\)|(?<![A-Za-z'’])([B-HJ-Z])(?![A-Za-z'’])"
    r"|(?<![A-Za-z'’])([AI])(?=[.):,]|$|\s+(?:or|and|nor)\b)"  # elsewhere "A" is an article and "I" a pronoun
)


_LETTERED_LINE = re.compile(r"^[ \t]*\(?([A-Z])[.):][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)

_DENIED = re.compile(
    r"(?i:\bnot|n['’]t|\bneither|\bexcept)\s+(?i:(?:the|an?|option|answer|choice)\s+)*"
    r"(?:\||\(?[A-Z](?![A-Za-z'’]))"
)
"""An option is named to be refused; `_options_inside` leaves a bar where an option's text stood."""


def read_options(value: object) -> dict[str, str] | None:
    """Options as letter -> text: from a mapping, a list, either as JSON, or lines `A. text`; else None."""
    if isinstance(value, str):
        text = value
        try:
            value = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            return {m[1]: m[2] for m in _LETTERED_LINE.finditer(text)} or None
    if isinstance(value, Mapping):
        return {str(key).strip().upper(): str(text) for key, text in value.items() if text is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {letter: str(text) for letter, text in zip(LETTERS, value, strict=False)}
    return None


def choice_prompt(
    prompt_id: str,
    question: str,
    options: Options,
    answer: object,
    metadata: Mapping[str, object] | None = None,
) -> Prompt:
    """A problem with its options below the question, and its gold letter (None: it has none).

    Raises BadRow for an answer that is not exactly one of the options (see `gold_letter`).
    """
    lines = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return Prompt(
        id=prompt_id,
        question=f"{question}\n{lines}",
        answer=None if answer is None else gold_letter(answer, options),
        metadata={"options": dict(options), **(metadata or {})},
    )


def gold_letter(gold: object, options: Options) -> str:
    """The right option: by letter, by text, or (a whole number) by its place from 0.

    Raises BadRow where that is no option, or where a number is one option's place and another one's text.
    """
    place = gold if isinstance(gold, int) and not isinstance(gold, bool) else None
    by_text = letter_of(str(gold), options)
    letters = list(options)
    by_place = letters[place] if place is not None and 0 <= place < len(letters) else None
    if by_text and by_place and by_text != by_place:
        raise BadRow(f"the answer {gold} is the place of option {by_place} and names option {by_text}")
    letter = by_text or by_place
    if letter is None:
        raise BadRow(f"the answer {str(gold)[:40]!r} is none of the options ({', '.join(letters)})")
    return letter


def letter_of(gold: str, options: Options) -> str | None:
    """The option that a gold answer names by letter or by text."""
    letter = gold.strip().strip("().").strip().upper()
    return letter if letter in options else chosen_letter(gold, options)


def chosen_letter(text: str, options: Options) -> str | None:
    """The one option that `text` names; None if it names none or several."""
    text = _LEAD_IN.sub("", text.strip().strip("*`'\"")).strip()
    if not text or len(text) > MAX_LENGTH:
        return None
    whole = {letter for letter, option in options.items() if _normal(option) == _normal(text)}
    if whole:
        return whole.pop() if len(whole) == 1 else None
    first = _LETTER_FIRST.match(text)
    if first and first[1].upper() in options and not first[2].strip(". )"):
        return first[1].upper()
    named, rest = _options_inside(text, options)
    if _DENIED.search(rest):
        return None
    named |= {group for match in _MARKED_LETTER.finditer(rest) for group in match.groups() if group in options}
    if first and first[1] in options:
        named.add(first[1])
    return named.pop() if len(named) == 1 else None


def _options_inside(text: str, options: Options) -> tuple[set[str], str]:
    """Letters of the options whose text stands in `text` as whole words, and `text` without them.

    Longest first: an option that is only part of a longer one ("hepatitis" in "hepatitis B") is not named
    itself, and neither is a letter inside an option's text.
    """
    remaining = " ".join(text.split())
    found = set()
    for letter, option in sorted(options.items(), key=lambda item: -len(item[1])):
        words = _normal(option)
        if len(words) < 2:
            continue
        pattern = rf"(?<![\w.+-]){re.escape(words)}(?!\w|\.\d)"
        remaining, count = re.subn(pattern, " | ", remaining, flags=re.IGNORECASE)
        if count:
            found.add(letter)
    return found, remaining


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .,;:\"'`*")
