"""Numbers and simple equations inside text, evaluated by hand over exact fractions (never by `eval`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

_NUMBER = r"(?<![A-WYZa-wyz_\d])(?<!\d\.)\d+(?:,\d{3}(?!\d))*(?:\.\d+)?"
_TOKEN = re.compile(
    r"(?P<bullet>(?m:^)[ \t]*[-*·•][ \t]+)"
    rf"|(?P<number>{_NUMBER})"
    r"|(?P<operator>[+\-−*×·/÷]|(?<=[\d)\s])x(?=[\s\d($]))"
    r"|(?P<bracket>[()])|(?P<equals>(?<![=<>!])=(?!=))|(?P<percent>%)|(?P<space>[ \t$]+)"
)
_NUMBERS = re.compile(_NUMBER)
_CANONICAL = {"−": "-", "×": "*", "·": "*", "x": "*", "÷": "/"}
_MAX_TOKENS = 60
_MAX_DECIMALS = 4


@dataclass(frozen=True)
class Number:
    """A number as it is written, with its sign where a minus belongs to it and not to a subtraction."""

    start: int
    end: int
    value: Fraction
    decimals: int
    commas: bool

    @property
    def unit(self) -> Fraction:
        """Its smallest unit: 1 for "24", 1/100 for "2.50"."""
        return Fraction(1, 10**self.decimals)


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Equation:
    """`left = right` with both sides evaluable; offsets are character offsets in the text."""

    left: tuple[Token, ...]
    right: tuple[Token, ...]
    left_value: Fraction
    right_value: Fraction

    @property
    def start(self) -> int:
        return self.left[0].start

    @property
    def end(self) -> int:
        return self.right[-1].end

    @property
    def holds(self) -> bool:
        """Exactly true, or true within the rounding of a right side that is one written number."""
        error = abs(self.left_value - self.right_value)
        if error == 0 or len(self.right) != 1 or self.left_value.denominator == 1:
            return error == 0
        decimals = len(self.right[0].text.partition(".")[2])
        return error <= Fraction(1, 2 * 10**decimals)


def find_numbers(
    text: str, start: int = 0, end: int | None = None, *, skip_enumerators: bool = True
) -> list[Number]:
    """Numbers in text[start:end], in order; "2." at the start of a line and "Step 2" only count the steps."""
    numbers = []
    for match in _NUMBERS.finditer(text, start, len(text) if end is None else end):
        if skip_enumerators and _is_enumerator(text, match):
            continue
        first = match.start()
        if _has_sign(text, first, start):
            first -= 1
        digits = match.group().replace(",", "")
        value = Fraction(digits) if first == match.start() else -Fraction(digits)
        decimals = len(digits.partition(".")[2])
        numbers.append(Number(first, match.end(), value, decimals, "," in match.group()))
    return numbers


def write_number(value: Fraction, like: Number) -> str | None:
    """`value` in the notation of `like`; None where it has no short exact decimal form."""
    for decimals in range(like.decimals, max(like.decimals, _MAX_DECIMALS) + 1):
        scaled = value * 10**decimals
        if scaled.denominator == 1:
            digits = f"{abs(scaled.numerator):0{decimals + 1}d}"
            whole, fraction = digits[: len(digits) - decimals], digits[len(digits) - decimals :]
            grouped = f"{int(whole):,}" if like.commas else whole
            return ("-" if value < 0 else "") + grouped + (f".{fraction}" if fraction else "")
    return None


def find_equations(text: str) -> list[Equation]:
    """All `left = right` whose sides are plain arithmetic, in order; a chain a = b = c gives two."""
    found = []
    for run in _runs(text):
        sides: list[list[Token]] = [[]]
        for token in run:
            if token.kind == "equals":
                sides.append([])
            else:
                sides[-1].append(token)
        for left_side, right_side in pairwise(sides):
            left, right = _longest(left_side, from_end=True), _longest(right_side, from_end=False)
            if left is not None and right is not None:
                found.append(Equation(left[0], right[0], left[1], right[1]))
    return found


def find_operators(text: str, start: int, end: int) -> list[Token]:
    """Binary operators between two operands in text[start:end]."""
    operators = []
    for run in _runs(text):
        for before, token, after in zip(run, run[1:], run[2:], strict=False):
            follows_operand = before.kind in {"number", "percent"} or before.text == ")"
            if token.kind == "operator" and follows_operand and (after.kind == "number" or after.text == "("):
                operators.append(token)
    return [token for token in operators if start <= token.start and token.end <= end]


def expression_value(text: str, position: int) -> Fraction | None:
    """Value of the longest arithmetic expression around `position`, between any equals signs; None if none."""
    for run in _runs(text):
        if not run[0].start <= position < run[-1].end:
            continue
        side: list[Token] = []
        for token in run:
            if token.kind == "equals":
                if token.start > position:
                    break
                side = []
            else:
                side.append(token)
        return evaluate(side)
    return None


def evaluate_text(text: str) -> Fraction | None:
    """Value of a text that is one arithmetic expression and nothing else."""
    runs = list(_runs(text))
    whole = len(runs) == 1 and runs[0][0].start == len(text) - len(text.lstrip(" \t$"))
    return evaluate(runs[0]) if whole and runs[0][-1].end == len(text.rstrip(" \t$")) else None


def evaluate(tokens: Sequence[Token]) -> Fraction | None:
    """Exact value of an expression with + - * / brackets and percent; None if it is none."""
    if not tokens or len(tokens) > _MAX_TOKENS:
        return None
    try:
        value, position = _sum(tokens, 0)
    except (_NotArithmetic, ZeroDivisionError):
        return None
    return value if position == len(tokens) else None


class _NotArithmetic(Exception):
    pass


def _sum(tokens: Sequence[Token], position: int) -> tuple[Fraction, int]:
    value, position = _product(tokens, position)
    while position < len(tokens) and _operator(tokens[position]) in ("+", "-"):
        operand, after = _product(tokens, position + 1)
        value = value + operand if _operator(tokens[position]) == "+" else value - operand
        position = after
    return value, position


def _product(tokens: Sequence[Token], position: int) -> tuple[Fraction, int]:
    value, position = _operand(tokens, position)
    while position < len(tokens) and _operator(tokens[position]) in ("*", "/"):
        operand, after = _operand(tokens, position + 1)
        value = value * operand if _operator(tokens[position]) == "*" else value / operand
        position = after
    return value, position


def _operand(tokens: Sequence[Token], position: int) -> tuple[Fraction, int]:
    if position >= len(tokens):
        raise _NotArithmetic
    token = tokens[position]
    if _operator(token) == "-":
        value, position = _operand(tokens, position + 1)
        return -value, position
    if token.text == "(":
        value, position = _sum(tokens, position + 1)
        if position >= len(tokens) or tokens[position].text != ")":
            raise _NotArithmetic
        position += 1
    elif token.kind == "number":
        value, position = Fraction(token.text.replace(",", "")), position + 1
    else:
        raise _NotArithmetic
    if position < len(tokens) and tokens[position].kind == "percent":
        return value / 100, position + 1
    return value, position


def _operator(token: Token) -> str | None:
    return _CANONICAL.get(token.text, token.text) if token.kind == "operator" else None


def _runs(text: str) -> Iterator[list[Token]]:
    """Maximal stretches of arithmetic tokens, without the spaces and currency signs between them."""
    run: list[Token] = []
    end = -1
    for match in _TOKEN.finditer(text):
        if (match.start() != end or match.lastgroup == "bullet") and run:
            yield run
            run = []
        end = match.end()
        if match.lastgroup not in ("space", "bullet"):
            run.append(Token(str(match.lastgroup), match.group(), match.start(), end))
    if run:
        yield run


def _longest(side: list[Token], *, from_end: bool) -> tuple[tuple[Token, ...], Fraction] | None:
    """The longest evaluable end (or beginning) of one side of an equals sign."""
    side = side[-_MAX_TOKENS:] if from_end else side[:_MAX_TOKENS]
    for dropped in range(len(side)):
        part = side[dropped:] if from_end else side[: len(side) - dropped]
        value = evaluate(part)
        if value is None:
            continue
        if from_end:
            cut_inside = dropped > 0 and side[dropped - 1].kind == "operator"
        else:  # one operator at the very end is a dash of the prose
            cut_inside = dropped > 1 and side[len(part)].kind == "operator"
        return None if cut_inside else (tuple(part), value)
    return None


def _has_sign(text: str, first: int, start: int) -> bool:
    if first <= start or text[first - 1] not in "-−":
        return False
    before = text[start : first - 1]
    if before and before[-1].isalpha():
        return False  # a hyphen, as in "covid-19" or "x-5"
    before = before.rstrip(" \t$")
    return not before or not (before[-1].isdigit() or before[-1] in ")%")


def _is_enumerator(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - 12) : match.start()]
    after = text[match.end() : match.end() + 2]
    marked = after[:1] in {".", ")", ":"} and (len(after) == 1 or after[1].isspace())
    if len(match.group()) > 2:
        return False
    at_line_start = match.start() == 0 or bool(re.search(r"\n[ \t]*$", before))
    return (marked and at_line_start) or bool(re.search(r"\bstep[ \t]*$", before, re.IGNORECASE))
