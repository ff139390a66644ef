"""Makes one intermediate result wrong and carries it faithfully to the answer (`propagated_error`).

That is the error that a policy really makes: after it every step is right given the wrong number, so only the
wrong step itself shows it, and the answer is wrong because of it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

from rairl_ray.algorithms.completion_text import Edit, Source, apply_edits
from rairl_ray.algorithms.equations import (
    Equation,
    Number,
    Token,
    evaluate,
    find_equations,
    find_numbers,
    write_number,
)

_WRONG_VALUES = 4


def propagated_error(source: Source, draw: random.Random) -> str | None:
    """The whole text after one such error, or None where none of a true equation reaches the answer."""
    equations = [e for e in source.equations if e.holds]
    chained = any(a.right == b.left for a, b in pairwise(equations))
    if not equations or source.answer is None or chained:
        return None  # in a = b = c the same number is result and operand
    numbers = find_numbers(source.text, skip_enumerators=False)
    by_end = {number.end: number for number in numbers}
    for index in draw.sample(range(len(equations)), len(equations)):
        result = _result(equations[index], by_end)
        if result is None:
            continue
        near = near_values(result, draw)
        for wrong in draw.sample(near, min(_WRONG_VALUES, len(near))):
            text = _carried(source, equations[index:], by_end, numbers, wrong)
            if text is not None:
                return text
    return None


def near_values(number: Number, draw: random.Random) -> list[Fraction]:
    """Other values near a number's own, of the same sign: off by a little, or one digit wrong."""
    steps = [1, -1, 2, -2] + ([10, -10] if abs(number.value) >= 20 * number.unit else [])
    values = [number.value + step * number.unit for step in steps]
    digits = str(int(abs(number.value) / number.unit))
    place = draw.randrange(len(digits))
    wrong_digit = Fraction(int(digits[:place] + draw.choice("123456789") + digits[place + 1 :])) * number.unit
    values.append(wrong_digit if number.value >= 0 else -wrong_digit)
    return [v for v in dict.fromkeys(values) if v != number.value and (v < 0) == (number.value < 0)]


@dataclass
class _Carry:
    """Which values have become which, from which character on (the newest last), and the edits so far."""

    edits: list[Edit] = field(default_factory=list)
    moved: list[tuple[int, Fraction, Fraction]] = field(default_factory=list)

    def now(self, value: Fraction, position: int) -> Fraction:
        return next((new for at, old, new in reversed(self.moved) if old == value and at <= position), value)


def _carried(
    source: Source,
    equations: Sequence[Equation],
    by_end: dict[int, Number],
    numbers: Sequence[Number],
    wrong: Fraction,
) -> str | None:
    """The text with the first equation's result made `wrong` and everything after it recomputed."""
    carry = _Carry()
    first = _result(equations[0], by_end)
    assert first is not None
    if not _replace(carry, first, wrong):
        return None
    for equation in equations[1:]:
        if not _recompute(carry, equation, by_end):
            return None
    in_equations = [(e.start, e.end) for e in equations]
    for number in numbers:
        readable = any(
            a <= number.start and number.end <= b for a, b in (source.reasoning, source.answer or (0, 0))
        )
        if not readable or any(start <= number.start < end for start, end in in_equations):
            continue
        new = carry.now(number.value, number.start)
        written = write_number(new, number)
        if written is None:
            return None
        if new != number.value:
            carry.edits.append(Edit(number.start, number.end, written))
    text = apply_edits(source.text, sorted(carry.edits))[0]
    return text if _answer_is_wrong(source, carry) and _only_the_error_is_false(text, carry) else None


def _recompute(carry: _Carry, equation: Equation, by_end: dict[int, Number]) -> bool:
    """Carry the wrong values into one later equation; False where its result cannot be written."""
    used: set[Fraction] = set()
    left = list(equation.left)
    for index, token in enumerate(equation.left):
        if token.kind != "number":
            continue
        number = by_end[token.end]
        value = abs(number.value)
        new = carry.now(value, token.start)
        if new == value or value in used:
            continue  # a second operand of the same value is a number of the problem
        used.add(value)
        written = write_number(new, Number(token.start, token.end, value, number.decimals, number.commas))
        if written is None or new < 0:
            return False
        carry.edits.append(Edit(token.start, token.end, written))
        left[index] = Token(token.kind, written, token.start, token.end)
    result = _result(equation, by_end)
    if not used:
        if result is not None:
            carry.moved.append((equation.end, result.value, result.value))  # computed afresh from here on
        return True
    value_now = evaluate(left)
    return result is not None and value_now is not None and _replace(carry, result, value_now)


def _replace(carry: _Carry, result: Number, new: Fraction) -> bool:
    written = write_number(new, result)
    if written is None or (new < 0) != (result.value < 0):
        return False
    carry.moved.append((result.end, result.value, new))
    if new != result.value:
        carry.edits.append(Edit(result.start, result.end, written))
    return True


def _result(equation: Equation, by_end: dict[int, Number]) -> Number | None:
    """The right side where it is one plain number."""
    number = by_end.get(equation.end)
    return number if number is not None and number.value == equation.right_value else None


def _answer_is_wrong(source: Source, carry: _Carry) -> bool:
    start, end = source.answer or (0, 0)
    written = [edit.new for edit in carry.edits if start <= edit.start and edit.end <= end]
    return any(Fraction(new.replace(",", "")) != source.gold_value for new in written)


def _only_the_error_is_false(text: str, carry: _Carry) -> bool:
    first = min(edit.start for edit in carry.edits)
    after = [equation for equation in find_equations(text) if equation.end > first]
    return bool(after) and not after[0].holds and all(equation.holds for equation in after[1:])
