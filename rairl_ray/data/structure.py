"""What a plain answer is made of: numerals of a base, times, ratios, matrices, sets, lists, intervals."""

from __future__ import annotations

import re
from collections.abc import Callable

from rairl_ray.data import expression_values, expressions
from rairl_ray.data.quantities import parse_quantity

_BASE = re.compile(r"([0-9A-F]+)_\{?(\d+)\}?")
_CLOCK = re.compile(r"(\d{1,2}):([0-5]\d)(?:\s*([ap])\.?\s?m\.?)?", re.IGNORECASE)
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)")
_MATRIX = re.compile(r"\\begin\{([bp]?matrix|array|smallmatrix)\}(?:\{[lcr| ]*\})?(.*)\\end\{\1\}", re.DOTALL)
_SEPARATORS = re.compile(r"\s+(?:and|or)\s+|\s*;\s*")
_OPEN, _CLOSE = "([{", ")]}"


def based_numeral(text: str) -> tuple[str, str] | None:
    match = _BASE.fullmatch(text.replace(" ", ""))
    return (match[1].lstrip("0") or "0", match[2]) if match else None


def clock(text: str) -> tuple[int, bool] | None:
    """(minutes of the day, whether the half of the day is known)."""
    match = _CLOCK.fullmatch(text)
    if match is None or int(match[1]) > 24:
        return None
    hours, half = int(match[1]), (match[3] or "").lower()
    if half:
        hours = hours % 12 + (12 if half == "p" else 0)
    return 60 * hours + int(match[2]), bool(half) or hours > 12 or hours == 0


def ratio(text: str) -> str | None:
    match = _RATIO.fullmatch(text)
    node = expressions.parse(f"({match[1]})/({match[2]})") if match else None
    value = None if node is None else expression_values.rational(node)
    return None if value is None else str(value)


# --- containers ----------------------------------------------------------------------------------


def matrix(text: str) -> list[str] | None:
    """[rows and columns, entries ...]."""
    match = _MATRIX.fullmatch(text.strip("() []") if "matrix" in text else text)
    if match is None:
        return None
    rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if row.strip()]
    return [f"{len(rows)} x {len(rows[0]) if rows else 0}", *(entry.strip() for row in rows for entry in row)]


def is_set(text: str) -> bool:
    return _inside_set(text) is not None


def _inside_set(text: str) -> str | None:
    r"""What stands in \{...\}, or in {...} around all of the text."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return text[2:-2].strip()
    return text[1:-1].strip() if text.startswith("{") and text.endswith("}") and _encloses(text) else None


def listed(text: str) -> list[str]:
    """Items of a set or a bare list; `1 \\pm 2` is two."""
    inside = _inside_set(text)
    items = _commas(_SEPARATORS.sub(", ", text)) if inside is None else _items(inside)
    return [each for item in items for each in _signs(item)]


def _signs(text: str) -> list[str]:
    if not re.search(r"\\[pm][pm](?![A-Za-z])", text):
        return [text]
    return [
        re.sub(r"\\pm(?![A-Za-z])", plus, re.sub(r"\\mp(?![A-Za-z])", minus, text)).lstrip("+ ")
        for plus, minus in (("+", "-"), ("-", "+"))
    ]


def bracketed(text: str) -> tuple[str, list[str]] | None:
    """(its two brackets, items) of a tuple or an interval; None for anything else, or one item."""
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or not _encloses(text):
        return None
    items = _items(text[1:-1])
    return (text[0] + text[-1], items) if len(items) > 1 else None


def _encloses(text: str) -> bool:
    depth = 0
    for place, char in enumerate(text):
        depth += (char in _OPEN) - (char in _CLOSE)
        if depth == 0 and place < len(text) - 1:
            return False
    return depth == 0


def _commas(text: str) -> list[str]:
    """A bare list; 1,234 is a number."""
    return [text] if parse_quantity(text, units=False) is not None else _items(text)


def _items(text: str) -> list[str]:
    """Split at commas outside of brackets; where some have a space behind them, those alone separate."""
    spaced = re.search(r",\s", text) is not None
    return split(text, lambda rest: int(rest[0] == "," and (not spaced or rest[1:2] in (" ", "\\", ""))))


def union(text: str) -> list[str]:
    """Parts of a union of sets; one where there is no sign of it."""
    return split(text, lambda rest: 4 if re.match(r"\\cup(?![A-Za-z])", rest) else 0)


def split(text: str, separator: Callable[[str], int]) -> list[str]:
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        char = text[place]
        depth += (char in _OPEN) - (char in _CLOSE)
        length = separator(text[place:]) if depth == 0 else 0
        if length:
            parts.append(text[start:place].strip())
            start = place + length
        place += max(1, length)
    parts.append(text[start:].strip())
    return parts
