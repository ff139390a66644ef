"""Reading ONE number out of a short answer, where ALL of the answer is understood.

An answer is [words that lead to it] [sign] [currency] NUMBER [scale] [percent] [units and what is counted],
or a chain of equal sides of which one is such a number. Everything else ("18 or 20", "never 18", "twice 18",
"18 squared", "9:30", "x >= 18") is no number: what is not understood is never graded by its luckier half."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rairl_ray.data import expression_values, expressions
from rairl_ray.data.notation import MONEY, is_name, plain, without_label
from rairl_ray.data.unit_words import allowed_after, allowed_before, begins_with_unit, in_digits, words_after
from rairl_ray.data.units import Units, ratio, units_of

MAX_LENGTH = 100
"""Longer strings are prose, not a number; it also bounds the size of every integer made here."""


class Quantity(NamedTuple):
    value: Fraction
    percent: bool
    decimal: bool = False
    """Written with a decimal point: a printed value, which may be rounded in its seventh digit."""
    units: Units = ()
    """What is measured, where known units stand beside the number."""
    compound: bool = False
    """5 feet 6 inches: a number only together with its unit."""


_GROUPED = (
    r"\d{1,3}(?:,\d{3})+(?:\.\d+)?",
    r"\d{1,3}(?: \d{3})+(?:[.,]\d{1,2}(?!\d)|\.\d+)?",
    r"\d{1,3}(?:'\d{3})+(?:\.\d+)?",
    r"\d{1,3}(?:\.\d{3})+,\d+",
    r"\d{1,3}(?:\.\d{3}){2,}",
    r"\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?",
)
"""Thousands as English, French and SI, Swiss, German and Indian texts write them."""
_NUMBER = rf"(?:{'|'.join(_GROUPED)}|\d+(?:\.\d+)?|\.\d+)(?![\d]|[.,'_]\d)"
_SIGNS = "$€£¥₹¢¤"
"""Currencies that are told apart, and any other."""
_CODES = rf"(?:US|CA|AU|NZ|HK|C|A)?[{_SIGNS}]|USD|EUR|GBP|INR|JPY|CNY|RMB|CHF|CAD|AUD|Rs\.?"
_AMOUNT = re.compile(
    rf"(?:(?P<word>negative|minus)\s+|(?P<sign>[-+])\s*)?(?:(?P<money>{_CODES})\s*)?(?P<inner>-)?"
    rf"(?:(?P<whole>\d+)(?:\s*-\s*|\s+and\s+|\s+)(?P<top>\d+)\s*/\s*(?P<bottom>\d+)"
    rf"|(?P<number>{_NUMBER})(?:[eE](?P<e>[-+]?\d{{1,2}})|\s*(?:\*|[xX])\s*10\s*\^\s*\{{?(?P<ten>-?\d{{1,2}})\}}?"
    rf"|\s*\^\s*\{{?(?P<power>-?\d{{1,3}})\}}?|\s*/\s*(?P<under>{_NUMBER}))?)(?!\d|\s*[\^_]|[.:]\d)",
    re.IGNORECASE,
)
_PART = rf"{_NUMBER}\s?[A-Za-z]+\.?"
_COMPOUND = re.compile(rf"{_PART}(?:(?:,?\s+and\s+|\s*){_PART}){{1,2}}")
_FRACTION = re.compile(r"\\frac\s*(?:\{\s*(-?[\d.,]+)\s*\}|(\d))\s*(?:\{\s*([\d.,]+)\s*\}|(\d))(?!\d)")
_APPROXIMATE = re.compile(r"(?:\\approx|~)\s*")
_PERCENT = re.compile(r"\s*(?:%|per\s?cent\b|percentage points?\b|pct\b)", re.IGNORECASE)
_SCALE = re.compile(
    r"\s*(hundred|thousand|million|billion|trillion|dozen|lakh|crore|mil|mln|mn|bn|tn)s?\b(?![-'])",
    re.IGNORECASE,
)
_LETTER_SCALE = re.compile(r"([kKMBT]|(?<=\d)mm?)(?![\w^])|\s([k])(?![\w^])")
_SCALES = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "lakh": 10**5, "crore": 10**7, "mil": 10**6, "mln": 10**6, "mn": 10**6, "bn": 10**9, "tn": 10**12,
    "k": 10**3, "m": 10**6, "mm": 10**6, "b": 10**9, "t": 10**12,
}  # fmt: skip
_TIMES = re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)")
_ORDINAL = re.compile(r"\A(?:st|nd|rd|th)\b")


def parse_quantity(text: str, *, units: bool = True) -> Quantity | None:
    """The number that all of `text` says, exactly; None if there is none, several, or anything not understood.

    With `units` (the grader `number`), sentences may lead to the number, things may be counted, sides of an
    equation are compared and letters may scale (2k); without, in mathematics, only units and currency may
    stand beside it."""
    return None if len(text) > 4 * MAX_LENGTH else _parse(plain(text), units)


@lru_cache(maxsize=8192)
def _parse(text: str, units: bool) -> Quantity | None:
    if len(text) > MAX_LENGTH:
        return None
    if not re.search(r"\d", text):
        text = in_digits(without_label(text))
    text = _marked(text, "()[]{}" if units or "," not in text else "")
    bare = without_label(text.removeprefix("=").lstrip())
    if _COMPOUND.fullmatch(bare):
        return _compound(re.findall(_PART, bare))
    if not units:
        return _quantity(without_label(text), units=False)
    text = text.removeprefix("=")
    sides = text.split("=")
    if len(sides) == 1:
        return _quantity(text, units=True)
    return _equation(sides)


def _compound(texts: Sequence[str]) -> Quantity | None:
    """Parts in ever smaller units of one kind, as a number of the first: 2 hours 30 minutes."""
    if re.search(r"\dh|\bh", texts[0]):
        texts = [re.sub(r"(?<=\d)\s?m$", " min", text) for text in texts]  # 2h 30m
    parts = [part for text in texts if (part := _quantity(text, units=True)) is not None and part.units]
    times = [ratio(parts[0].units, part.units) for part in parts]
    if len(parts) < len(texts) or None in times or times != sorted(set(times), key=lambda t: -(t or 0)):
        return None
    value = sum((part.value * (t or 0) for part, t in zip(parts, times, strict=True)), Fraction(0))
    return Quantity(value, False, any(part.decimal for part in parts), parts[0].units, compound=True)


def _equation(sides: list[str]) -> Quantity | None:
    """A chain of sides that all say the same; the first or the last may be what is asked for: `x = 540`."""
    names = [
        is_name(without_label(side)) or (allowed_before(side.strip()) and bool(side.strip())) for side in sides
    ]
    if names[0] or (len(sides) == 2 and names[1]):
        sides = [side for side, name in zip(sides, names, strict=True) if not name]
    found = [_quantity(side, units=True) for side in sides]
    said = [quantity for quantity in found if quantity is not None]
    if not said:
        return None
    for side, quantity in zip(sides, found, strict=True):
        value = _computed(side) if quantity is None else None
        same = value is not None and _close(value, said[-1].value, True)
        if not (same if quantity is None else _same(quantity, said[-1])):
            return None
    return said[-1]


def _same(one: Quantity, other: Quantity) -> bool:
    """Whether two sides say the same: numbers as they stand, or 60 minutes = 1 hour."""
    times = ratio(one.units, other.units)
    return times is not None and _close(one.value, other.value * times, True)


def _computed(side: str) -> Fraction | None:
    """The value of arithmetic such as `the total is ¤5 + ¤13`."""
    node = expressions.parse(_TIMES.sub("*", re.sub(rf"[{_SIGNS}%]", "", without_label(side.strip()))))
    return None if node is None else expression_values.rational(node)


def _marked(text: str, brackets: str) -> str:
    """Currency signs as those of `_SIGNS`, fractions in a line, without `brackets` around all of it."""
    text = "".join(map(_sign, text))
    text = text.replace("\\Omega", "Ω").replace("\\mu ", "µ")
    text = _FRACTION.sub(lambda m: f" {m[1] or m[2]}/{m[3] or m[4]}", text)
    text = " ".join(text.split())
    for opening, closing in zip(brackets[::2], brackets[1::2], strict=True):
        inner = text[1:-1]
        if text.startswith(opening) and text.endswith(closing) and not {opening, closing} & set(inner):
            text = inner.strip()
    return text


def _sign(char: str) -> str:
    if char == MONEY or unicodedata.category(char) != "Sc":
        return "$" if char == MONEY else char
    same = unicodedata.normalize("NFKC", char)  # full width
    return same if same in _SIGNS else "¤"


def _quantity(text: str, units: bool) -> Quantity | None:
    text = text.strip()
    match = _AMOUNT.search(text)
    if match is None or (not units and match["word"] and match.start()):
        return None
    before, after = text[: match.start()], text[match.end() :]
    if before and before[-1] not in " :(~*":
        return None
    before = _APPROXIMATE.sub("", before)
    value = _value(match)
    if value is None or (before.strip() and not (units and allowed_before(before.rstrip()))):
        return None
    scale, after = _scaled(after, units, match["money"] is not None)
    percent = _PERCENT.match(after)
    after = after[percent.end() :] if percent else _ORDINAL.sub("", after, count=1)
    behind = re.match(rf"\s*([{_SIGNS}])", after)
    after = after[behind.end() :] if behind else after
    if after[:1].isalpha() and not (units and begins_with_unit(after)):
        return None  # 2x is not 2
    words = words_after(after)
    if words is None or not allowed_after(words, float(value)) or re.match(r"\s*!", after):
        return None
    if not units and re.match(r"\s*[A-Za-z](?![A-Za-z])", after) and not re.match(r"\s[mgshLJNWVC]\b", after):
        return None
    currency = match["money"] or (behind[1] if behind else "")
    measured = () if percent else units_of(words, currency)
    return Quantity(value * scale, percent is not None, "." in match[0], measured)


def _scaled(after: str, units: bool, money: bool) -> tuple[int, str]:
    scale = 1
    while (match := _SCALE.match(after)) is not None:
        scale, after = scale * _SCALES[match[1].lower()], after[match.end() :]
    letter = _LETTER_SCALE.match(after) if units and scale == 1 else None
    if letter is None and units and money and scale == 1:
        letter = re.match(r"(mm?)(?![\w^])", after)
    if letter is not None and (letter[0] not in ("m", "mm") or money):
        scale, after = _SCALES[letter[0].strip().lower()], after[letter.end() :]
    return scale, after


def _value(match: re.Match[str]) -> Fraction | None:
    if match["whole"]:
        top, bottom = int(match["top"]), int(match["bottom"])
        if not 0 < top < bottom:
            return None
        value = int(match["whole"]) + Fraction(top, bottom)
    else:
        value = _decimal(match["number"])
        if match["e"] or match["ten"]:
            value *= Fraction(10) ** int(match["e"] or match["ten"])
        elif match["power"]:
            exponent = int(match["power"])
            if (value == 0 and exponent < 0) or abs(exponent) * value.numerator.bit_length() > 1000:
                return None
            value **= exponent
        elif match["under"]:
            under = _decimal(match["under"])
            if under == 0:
                return None
            value /= under
    minus = (match["sign"] == "-") + (match["inner"] is not None) + (match["word"] is not None)
    return None if minus > 1 else -value if minus else value


def _decimal(text: str) -> Fraction:
    if re.fullmatch(rf"{_GROUPED[3]}|{_GROUPED[4]}", text):
        text = text.replace(".", "").replace(",", ".")
    elif re.fullmatch(r"\d{1,3}(?: \d{3})+,\d{1,2}", text):
        text = text.replace(",", ".")
    return Fraction(re.sub(r"[, ']", "", text))


def equal_quantities(gold: Quantity, answer: Quantity) -> bool:
    """Exact, but for the seventh digit of what is printed as a decimal: 0.3333333 is 1/3.

    Where gold is a percentage, 50% is 50 or 0.5. Where the answer alone is one, its sign is a unit (50% for
    50), or gold is a ratio (50% for 0.5): a count is not 100 times itself (500% is not 5).
    Where both name units, these are compared, too: 2 hours are 120 minutes, and 15 m^2 are no 15 cm^2."""
    times = ratio(gold.units, answer.units)
    if (gold.compound or answer.compound) and not (gold.units and answer.units):
        return False
    if times is None or (gold.percent != answer.percent and (gold.units or answer.units)):
        return False
    answer = answer._replace(value=answer.value * times)
    decimal = gold.decimal or answer.decimal
    if gold.percent == answer.percent or _close(gold.value, answer.value, decimal):
        return _close(gold.value, answer.value, decimal)
    if gold.percent:
        return _close(gold.value / 100, answer.value, decimal)
    return gold.value.denominator != 1 and _close(gold.value, answer.value / 100, decimal)


def same_quantity(one: Quantity, other: Quantity) -> bool:
    """Exactly the same number as it is written, of the same unit where both name one."""
    times = ratio(one.units, other.units)
    return times is not None and one.value == other.value * times


def canonical(quantity: Quantity) -> str:
    """Equal numbers are equal strings: '18' for 18.0, '7/2' for 3.5, '1/2' for 50% and 0.5."""
    return str(quantity.value / 100 if quantity.percent else quantity.value)


def _close(a: Fraction, b: Fraction, decimal: bool) -> bool:
    if a == b:
        return True
    if a.denominator == 1 or b.denominator == 1 or not decimal:
        return False
    return abs(a - b) <= Fraction(1, 10**6) * max(abs(a), abs(b))
