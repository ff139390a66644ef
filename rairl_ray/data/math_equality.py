"""Equality of mathematical answers by their structure: relations as relations, containers item by item.

    answer ── label and NAME = off ──> relation? base numeral? number? matrix, union, set, interval, list?
    expression? gold   ── likewise ─────────────>  ... and both must be of one kind, down to their last part

Only what is understood as a whole is compared (`quantities`, `expressions`); words are compared as words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from rairl_ray.data import expression_values, expressions, structure
from rairl_ray.data.notation import is_name, plain, without_label
from rairl_ray.data.quantities import canonical, equal_quantities, parse_quantity
from rairl_ray.data.unit_words import is_unit, words_after
from rairl_ray.data.units import Units, ratio, units_of

MAX_LENGTH = 400
MAX_ITEMS = 50

_RELATION = re.compile(
    r"\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])|\\approx(?![A-Za-z])|\\in(?![A-Za-z])|[=<>]"
)
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le", "=": "=", "\\ne": "\\ne"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\d{1,3}(?:,\d{3})+(?![\d,])|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|\S")
_UNIT = r"(?:[A-Za-z]{2,}|[mgshLJNWV])(?:\^\{?-?\d\}?)?"
_TRAILING_UNIT = re.compile(
    rf"\s((?:(?:square|sq|cubic|cu)\.? )?({_UNIT})"
    rf"(?:\s*[/*]\s*{_UNIT}|\s(?:per|a|an) {_UNIT}| squared| cubed)*)$"
)


def equal_mathematics(gold: str, answer: str) -> bool:
    """Whether a marked answer says what gold says, all of it."""
    if max(len(gold), len(answer)) > 5 * MAX_LENGTH:
        return False
    return _equal_texts(plain(gold), plain(answer))


def equal_expressions(gold: str, answer: str) -> bool:
    """Whether both are expressions and have the same value; False for anything over 400 characters."""
    a, b = expressions.parse(plain(gold)), expressions.parse(plain(answer))
    return a is not None and b is not None and expression_values.equal(a, b)


def canonical_mathematics(answer: str) -> str:
    """Equal numbers, constants and containers of them are equal strings; anything else is its plain text."""
    return _canonical(without_label(plain(answer)))


@lru_cache(maxsize=8192)
def _equal_texts(gold: str, answer: str) -> bool:
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return False
    gold, answer = (without_label(text).removeprefix("+").lstrip() for text in (gold, answer))
    return bool(answer) and (_tokens(gold) == _tokens(answer) or _equal(gold, answer))


def _equal(gold: str, answer: str) -> bool:
    if any(_RELATION.search(text) and len(structure.listed(text)) > 1 for text in (gold, answer)):
        unions = [_intervals(text) for text in (gold, answer)]
        if unions[0] is not None and unions[1] is not None:
            return _same_items(unions[0], unions[1])
        return _same_items(structure.listed(gold), structure.listed(answer))
    if _RELATION.search(gold) or _RELATION.search(answer):
        return _equal_relations(gold, answer)
    for kind in (structure.based_numeral, structure.clock, structure.ratio):
        parts = kind(gold), kind(answer)
        if parts != (None, None):
            return parts[0] == parts[1]
    quantities = parse_quantity(gold, units=False), parse_quantity(answer, units=False)
    if quantities[0] is not None and quantities[1] is not None:
        return equal_quantities(quantities[0], quantities[1])
    same = _equal_structures(gold, answer)
    if same is not None:
        return same
    (a, measured), (b, given) = _expression(gold), _expression(answer)
    if a is not None and b is not None:
        times = ratio(measured, given)
        return times is not None and expression_values.equal(a, b if times == 1 else ("mul", b, ("num", times)))
    return _words(gold) is not None and _words(gold) == _words(answer)


# --- relations ------------------------------------------------------------------------------------


def _equal_relations(gold: str, answer: str) -> bool:
    g, a = _sides(gold), _sides(answer)
    if g is None or a is None:
        return False
    named = [(sides[0], sides[2:]) if sides[1:2] == ["="] and is_name(sides[0]) else None for sides in (g, a)]
    if named[0] and named[1] and len(g) == len(a) == 3 and not _same_name(g[0], a[0]):
        return _equal_equations(g, a) and bool(
            expressions.variables(_node(g[2])) | expressions.variables(_node(a[2]))
        )
    values = [_value_side(sides) for sides in (g, a)]
    if values[0] is not None and values[1] is not None:
        return _equal_texts(values[0], values[1]) if not _RELATION.search(values[0] + values[1]) else False
    if len(g) == len(a) == 3 and g[1] == a[1] == "=":
        return _equal_equations(g, a)
    intervals = [_interval(sides) for sides in (g, a)]
    if intervals[0] is not None and intervals[1] is not None:
        return _equal_texts(intervals[0], intervals[1])
    if len(g) == len(a) == 3:
        return _equal_inequalities(g, a)
    return False


def _same_name(a: str, b: str) -> bool:
    return _tokens(a) == _tokens(b) or not (_is_variable(a) and _is_variable(b))


def _is_variable(name: str) -> bool:
    return len(name) == 1 or name.startswith("\\") or "_" in name or "(" in name


def _sides(text: str) -> list[str] | None:
    """[side, relation, side, ...]; one side alone where there is no relation; None for an empty side."""
    parts, place = [], 0
    for match in _RELATION.finditer(text):
        parts += [text[place : match.start()].strip(), match.group()]
        place = match.end()
    parts.append(text[place:].strip())
    if parts[0] == "" and len(parts) == 3 and parts[1] == "\\approx":
        parts = parts[2:]
    return parts if all(parts) else None


def _value_side(sides: list[str]) -> str | None:
    """What a side without relation, `NAME = value`, `NAME \\in set`, or a chain of equal values says."""
    if len(sides) == 1:
        return sides[0]
    relations, values = set(sides[1::2]), sides[::2]
    if relations <= {"=", "\\approx"}:
        if is_name(values[0]) and not _mentions(values[1], values[0]):
            values = values[1:]
        elif len(values) == 2 and is_name(values[1]) and not _mentions(values[0], values[1]):
            values = values[:1]
        elif any(_constant(value) is None for value in values):
            return None
        if all(_equal_texts(values[-1], value) for value in values[:-1]):
            return values[-1]
        return None
    if relations == {"\\in"} and len(values) == 2 and is_name(values[0]):
        return values[1]
    return None


def _mentions(text: str, name: str) -> bool:
    node = expressions.parse(text)
    return node is not None and name in expressions.variables(node)


def _constant(text: str) -> object | None:
    node = expressions.parse(text)
    return None if node is None or expressions.variables(node) else node


def _node(text: str) -> expressions.Node:
    return expressions.parse(text) or ("num", 0)


def _difference(sides: Sequence[str]) -> expressions.Node | None:
    left, right = expressions.parse(sides[0]), expressions.parse(sides[2])
    return None if left is None or right is None else ("add", left, ("neg", right))


def _equal_equations(g: Sequence[str], a: Sequence[str]) -> bool:
    """The same equation: left less right is the same expression, but for a constant factor."""
    first, second = _difference(g), _difference(a)
    if first is None or second is None:
        return any(_equal_texts(g[0], a[i]) and _equal_texts(g[2], a[2 - i]) for i in (0, 2))
    return expression_values.proportion(first, second) is not None and bool(expressions.variables(first))


def _equal_inequalities(g: Sequence[str], a: Sequence[str]) -> bool:
    first, second = _difference(g), _difference(a)
    if first is None or second is None:
        return g[1] == a[1] and _equal_texts(g[0], a[0]) and _equal_texts(g[2], a[2])
    ratio = expression_values.proportion(first, second)
    if ratio is None or ratio.imag != 0:
        return False
    relation = a[1] if ratio.real > 0 else _FLIPPED.get(a[1])
    return bool(relation == g[1])


def _intervals(text: str) -> list[str] | None:
    """The intervals of a union, or of `x < 1 or x > 3`."""
    parts = structure.union(text)
    if len(parts) > 1:
        return parts
    found = [None if (sides := _sides(part)) is None else _interval(sides) for part in structure.listed(text)]
    intervals = [interval for interval in found if interval is not None]
    return intervals if len(intervals) == len(found) else None


def _interval(sides: list[str]) -> str | None:
    """x > 3 or 1 < x \\le 2 as an interval; an interval is itself."""
    if len(sides) == 1:
        return sides[0] if structure.bracketed(sides[0]) else None
    if len(sides) == 3 and sides[1] == "\\in" and is_name(sides[0]):
        return sides[2]
    if len(sides) == 3 and _constant(sides[0]) is not None and _is_variable(sides[2]) and sides[1] in _FLIPPED:
        sides = [sides[2], _FLIPPED[sides[1]], sides[0]]
    if len(sides) == 3 and _is_variable(sides[0]) and _constant(sides[2]) is not None:
        return {
            "<": rf"(-\infty, {sides[2]})", "\\le": rf"(-\infty, {sides[2]}]",
            ">": rf"({sides[2]}, \infty)", "\\ge": rf"[{sides[2]}, \infty)",
        }.get(sides[1])  # fmt: skip
    if len(sides) == 5 and _is_variable(sides[2]):
        if {sides[1], sides[3]} <= {">", "\\ge"}:
            sides = [sides[4], _FLIPPED[sides[3]], sides[2], _FLIPPED[sides[1]], sides[0]]
        if {sides[1], sides[3]} <= {"<", "\\le"}:
            return f"{'(' if sides[1] == '<' else '['}{sides[0]}, {sides[4]}{')' if sides[3] == '<' else ']'}"
    return None


# --- containers -----------------------------------------------------------------------------------


def _equal_structures(gold: str, answer: str) -> bool | None:
    """Matrices, unions, bracketed lists, sets and bare lists; None where neither is one."""
    matrices = structure.matrix(gold), structure.matrix(answer)
    if matrices != (None, None):
        return None not in matrices and _all_equal(matrices[0] or [], matrices[1] or [])
    unions = structure.union(gold), structure.union(answer)
    if max(map(len, unions)) > 1:
        return _same_items(*unions)
    if (inside := (structure.bracketed(gold), structure.bracketed(answer))) != (None, None):
        first, second = inside
        return (
            first is not None
            and second is not None
            and first[0] == second[0]
            and _all_equal(first[1], second[1])
        )
    lists = structure.listed(gold), structure.listed(answer)
    sets = structure.is_set(gold) or structure.is_set(answer)
    return _same_items(*lists) if sets or max(map(len, lists)) > 1 else None


def _all_equal(first: Sequence[str], second: Sequence[str]) -> bool:
    return len(first) == len(second) and all(map(_equal_texts, first, second))


def _same_items(first: Sequence[str], second: Sequence[str]) -> bool:
    """The same items in any order, unless they trail off (1, 2, \\ldots, n)."""
    if len(first) != len(second) or len(first) > MAX_ITEMS:
        return False
    if any("\\ldots" in item for item in (*first, *second)):
        return _all_equal(first, second)
    left = list(second)
    for item in first:
        match = next((other for other in left if _equal_texts(item, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


# --- the rest -------------------------------------------------------------------------------------


def _expression(text: str) -> tuple[expressions.Node | None, Units]:
    """An expression, and the units that stand behind it."""
    unit = _TRAILING_UNIT.search(text)
    units: Units = ()
    if unit and is_unit(re.sub(r"\^.*", "", unit[2])):
        text, units = text[: unit.start()], units_of(words_after(unit[1]) or ())
    return None if re.fullmatch(r"[A-Za-z]{2,}", text) else expressions.parse(text), units


def _words(text: str) -> str | None:
    """Plain words, case and outer brackets aside; None for anything with digits or commands."""
    text = text.strip("() ").casefold()
    return text if re.fullmatch(r"[^\W\d_]+(?:[\s'-]+[^\W\d_]+)*", text) else None


def _tokens(text: str) -> tuple[str, ...]:
    """What a text is made of; spaces count only where they keep two numbers or two words apart."""
    return tuple(_TOKEN.findall(re.sub(r"\{(\w)\}", r" \1 ", text)))


def _canonical(text: str) -> str:
    items = structure.listed(text)
    if len(items) > 1 or structure.is_set(text):
        return ", ".join(sorted(map(_canonical, items)))
    sides = _sides(text)
    if sides is not None and len(sides) > 1:
        value = _value_side(sides) or _interval(sides)
        return _canonical_equation(sides, text) if value is None else _canonical(value)
    for kind, shown in ((structure.clock, "time {}"), (structure.ratio, "ratio {}")):
        part = kind(text)
        if part is not None:
            return shown.format(part)
    quantity = parse_quantity(text, units=False)
    if quantity is not None:
        return canonical(quantity)
    matrix, brackets, node = structure.matrix(text), structure.bracketed(text), _expression(text)[0]
    if matrix is not None:
        return f"matrix {matrix[0]} ({', '.join(map(_canonical, matrix[1:]))})"
    if brackets is not None:
        return f"{brackets[0][0]}{', '.join(map(_canonical, brackets[1]))}{brackets[0][1]}"
    value = None if node is None else expression_values.canonical(node)
    return value or _words(text) or " ".join(_tokens(text))


def _canonical_equation(sides: Sequence[str], text: str) -> str:
    """`polynomial = 0` with 1 as its first coefficient."""
    difference = _difference(sides) if len(sides) == 3 and sides[1] == "=" else None
    polynomial = None if difference is None else expression_values.expanded(difference)
    if not polynomial:
        return " ".join(_tokens(text))
    first = polynomial[min(polynomial, key=lambda powers: (-sum(power for _, power in powers), powers))]
    return f"{expression_values.written({powers: value / first for powers, value in polynomial.items()})} = 0"
