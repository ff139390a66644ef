"""Reading ONE number out of a short answer: commas, signs, decimals, fractions, percent, currency, units.

Anything that could be read as two numbers ("18 or 20", "3-5", "9:30", "1,23") is no number: a hedged
answer must never be graded by its luckier half.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

MAX_LENGTH = 100
"""Longer strings are prose, not a number; it also bounds the size of every integer made here."""


class Quantity(NamedTuple):
    value: Fraction
    percent: bool


_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\d.,])(?P<sign>(?<![A-Za-z)])[-+]\s*)?[$€£¥]?\s?(?P<inner>-)?"
    rf"(?:(?P<whole>\d+)\s+(?=\d+\s*/\s*\d))?"
    rf"(?P<number>{_UNSIGNED})(?P<exponent>[eE][-+]?\d{{1,2}}(?!\d))?"
    rf"(?:\s*/\s*(?P<denominator>{_UNSIGNED}))?"
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}\s*\{\s*([\d.]+)\s*\}|(\d)(\d))")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mbox)\s*\{([^{}]*)\}")
_UNIT_WORDS = re.compile(r"[A-Za-z°²³€£¥$.,!;:'’/\s-]*")
_SYMBOLS = re.compile(r"[$€£¥°.\s]*")
_HEDGES = re.compile(r"\b(?:not|or|nor|between|than|except|isn['’]t|half|third|quarter)\b", re.IGNORECASE)
_PERCENT = re.compile(r"%|\bper\s?cent\b|\bpercent(?:age)?\b", re.IGNORECASE)
_SCALE = re.compile(r"\s*(hundred|thousand|million|billion|dozen)s?\b", re.IGNORECASE)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_REPLACEMENTS = {"−": "-", "–": "-", "\u00a0": " ", "\u202f": " ", "\\$": "$", "\\%": "%", "\\ ": " ",
                 "^\\circ": "°", "^{\\circ}": "°"}  # fmt: skip
_THOUSANDS = re.compile(r"(?<=\d)(?:\\,|\\!|\{,\}|,\\!)(?=\d{3})")
_BOLD = re.compile(r"(?<!\S)\*\*([^*]+)\*\*(?!\S)")


def parse_quantity(text: str, *, units: bool = True) -> Quantity | None:
    """The single number in `text`, exactly; None if there is none, several, or anything beside it.

    With `units`, words may stand around the number ("18 dollars", "x = 18"); without, only currency,
    percent and degree signs may, since in mathematics "2x" is not 2.
    """
    return None if len(text) > MAX_LENGTH else _parse(text, units)


@lru_cache(maxsize=4096)
def _parse(text: str, units: bool) -> Quantity | None:
    text = _plain(text)
    if text.count("=") == 1:
        text = text.split("=")[1]
    matches = list(_NUMBER.finditer(text))
    if len(matches) != 1:
        return None
    match = matches[0]
    before, after = text[: match.start()], text[match.end() :]
    scale = _SCALE.match(after)
    if units and scale:
        after = after[scale.end() :]
    percent = bool(_PERCENT.search(after))
    rest = before + " " + _PERCENT.sub("", after, count=1)
    allowed = _UNIT_WORDS if units else _SYMBOLS
    if not allowed.fullmatch(rest) or _HEDGES.search(rest) or before.rstrip().endswith("-"):
        return None
    value = _value(match)
    if value is None:
        return None
    return Quantity(value * (_SCALES[scale.group(1).lower()] if units and scale else 1), percent)


def equal_quantities(gold: Quantity, answer: Quantity) -> bool:
    """Exact for integers, else to a relative 1e-6 (a printed decimal of a fraction).

    A percent sign on one side only is either a unit ("50%" for gold 50) or a hundredth ("50%" for 0.5).
    """
    if gold.percent == answer.percent:
        return _close(gold.value, answer.value)
    percent, plain = (gold.value, answer.value) if gold.percent else (answer.value, gold.value)
    return _close(percent, plain) or _close(percent / 100, plain)


def canonical(quantity: Quantity) -> str:
    """Equal numbers are equal strings: '18' for 18.0, '7/2' for 3.5, '50%' for 50 percent."""
    return f"{quantity.value}{'%' if quantity.percent else ''}"


def _plain(text: str) -> str:
    for old, new in _REPLACEMENTS.items():
        text = text.replace(old, new)
    text = _THOUSANDS.sub(",", text).replace("\\,", " ").replace("\\!", "")
    text = _BOLD.sub(r"\1", text).strip("*` ")
    text = _LATEX_TEXT.sub(r" \1 ", text)
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]} ", text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=[\d$.])", "-", text, flags=re.IGNORECASE)
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1]
    if len(text) > 2 and text.startswith("$") and text.endswith("$"):  # LaTeX mathematics, not a currency
        text = text[1:-1]
    return re.sub(r"-\s+(?=-?[\d/])", "-", text)


def _value(match: re.Match[str]) -> Fraction | None:
    value = Fraction(match["number"].replace(",", "") + (match["exponent"] or ""))
    if match["denominator"]:
        denominator = Fraction(match["denominator"].replace(",", ""))
        if denominator == 0:
            return None
        value /= denominator
    if match["whole"]:
        value += int(match["whole"])
    signs = (match["sign"] or "").strip() + (match["inner"] or "")
    return -value if signs.count("-") % 2 else value


def _close(a: Fraction, b: Fraction) -> bool:
    if a == b:
        return True
    if a.denominator == 1 and b.denominator == 1:
        return False
    return abs(a - b) <= Fraction(1, 10**6) * max(abs(a), abs(b))
