"""Which option of a multiple-choice problem an answer names: by letter or by text, never more than one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

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


def read_options(value: object) -> dict[str, str] | None:
    """Options as letter -> text, from a mapping or a list; None for anything else."""
    if isinstance(value, Mapping):
        return {str(key).strip().upper(): str(text) for key, text in value.items() if text is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {letter: str(text) for letter, text in zip(LETTERS, value, strict=False)}
    return None


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
