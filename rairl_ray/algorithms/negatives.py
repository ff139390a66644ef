"""Hard negatives: perturbed copies of expert traces (docs/method.md 3).

Text in, text out, and seeded by the caller's key alone. A copy is never a no-op and never correct by accident:
an edited equation must be false, an edited answer must have another value than the expert's and the gold one.
A kind that cannot do that on a trace gives None, and `perturb` tries another kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

from rairl_ray.algorithms.choice_negatives import other_choice
from rairl_ray.algorithms.completion_text import Edit, Source, apply_edits, read_source
from rairl_ray.algorithms.equations import (
    Equation,
    Number,
    Token,
    evaluate_text,
    expression_value,
    find_equations,
    find_numbers,
    find_operators,
    write_number,
)
from rairl_ray.algorithms.propagated_error import near_values, propagated_error
from rairl_ray.config.schema import Perturbations
from rairl_ray.config.variants import complete
from rairl_ray.keys import keyed_random
from rairl_ray.types import Demonstration

_ROUNDS = 4
_OPERATORS = {"+": "+", "-": "-", "−": "-", "*": "*", "×": "*", "·": "*", "x": "*", "/": "/", "÷": "/"}
_RESULT_WEIGHT, _OPERAND_WEIGHT, _PROSE_WEIGHT = 6.0, 2.0, 1.0


class Perturbed(NamedTuple):
    """One wrong copy. text[edit_char:edit_end] holds everything that differs from the expert's text."""

    text: str
    edit_char: int
    """First character at which it differs from the expert's text."""
    edit_end: int
    """End (exclusive) of the last difference, at least edit_char + 1."""
    kind: str


def perturb(
    demonstration: Demonstration, *, count: int, kinds: Sequence[str], key: tuple[object, ...]
) -> tuple[list[Perturbed], int]:
    """Up to `count` different perturbed copies, and how many had to be dropped because no kind applied.

    key: (run seed, example id, epoch); each copy adds its own number. The copies belong to
    `demonstration.prompt` and to no other.
    """
    if demonstration.completion is None:
        return [], count
    source = read_source(demonstration)
    copies: list[Perturbed] = []
    seen = {demonstration.completion}
    for number in range(count):
        draw = keyed_random(*key, number)
        for kind in (kind for _ in range(_ROUNDS) for kind in draw.sample(list(kinds), len(kinds))):
            text = KINDS[kind](source, draw)
            if text is not None and text not in seen:
                seen.add(text)
                copies.append(Perturbed(text, *changed_span(source.text, text), kind))
                break
    return copies, count - len(copies)


def changed_span(before: str, after: str) -> tuple[int, int]:
    """(first differing character, end of the last difference) in `after`."""
    shorter = min(len(before), len(after))
    first = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    same_end = 0
    while same_end < shorter - first and before[-1 - same_end] == after[-1 - same_end]:
        same_end += 1
    return first, max(first + 1, len(after) - same_end)


# --- the reasoning ---------------------------------------------------------------------------------


def flip_operator(source: Source, draw: random.Random) -> str | None:
    """One operator becomes another; operators of true equations first, since their flip can be verified."""
    true_equations = [e for e in source.equations if e.holds]
    operators = find_operators(source.text, *source.reasoning)
    draw.shuffle(operators)
    operators.sort(key=lambda token: not any(e.start <= token.start < e.end for e in true_equations))
    for token in operators:
        others = ["+", "-", _times_sign(source.text), "/"]
        draw.shuffle(others)
        for sign in others:
            if _OPERATORS[sign] == _OPERATORS[token.text]:
                continue
            edit = Edit(token.start, token.end, sign)
            if _is_false(source, [edit]) and _changes_value(source.text, token, edit):
                return apply_edits(source.text, [edit])[0]
    return None


def nudge_numbers(source: Source, draw: random.Random) -> str | None:
    """One to three numbers of the reasoning become slightly wrong, results of equations before others."""
    numbers = find_numbers(source.text, *source.reasoning)
    if not numbers:
        return None
    weights = [_weight(source.equations, number) for number in numbers]
    for _ in range(2 * _ROUNDS):
        wanted = draw.randint(1, max(1, min(3, len(numbers) // 4)))
        chosen = {id(n): n for n in draw.choices(numbers, weights, k=wanted)}.values()
        edits = []
        for number in sorted(chosen, key=lambda n: n.start):
            written = write_number(draw.choice(near_values(number, draw)), number)
            if written is not None:
                edits.append(Edit(number.start, number.end, written))
        if edits and _is_false(source, edits):
            return apply_edits(source.text, edits)[0]
    return None


# --- the answer ------------------------------------------------------------------------------------


def nudge_answer(source: Source, draw: random.Random) -> str | None:
    """The final answer moves by its smallest unit."""
    numbers = _answer_numbers(source)
    draw.shuffle(numbers)
    for number in numbers:
        steps = [number.unit, -number.unit]
        draw.shuffle(steps)
        for step in steps:
            text = _with_answer(source, number, number.value + step)
            if text is not None and (number.value + step < 0) == (number.value < 0):
                return text
    return None


def swap_answer(source: Source, draw: random.Random) -> str | None:
    """The final answer becomes another number of the reasoning."""
    numbers = _answer_numbers(source)
    if not numbers:
        return None
    target = draw.choice(numbers)
    others = sorted({n.value for n in find_numbers(source.text, *source.reasoning)} - {target.value})
    draw.shuffle(others)
    return next((text for v in others if (text := _with_answer(source, target, v)) is not None), None)


def shipped_corruption(source: Source, draw: random.Random) -> str | None:
    """A wrong chain that the dataset itself ships for this prompt."""
    chains = [chain for chain in source.corrupted if chain.split() != source.text.split()]
    return draw.choice(chains) if chains else None


KINDS: dict[str, Callable[[Source, random.Random], str | None]] = {
    "operator": flip_operator,
    "numbers": nudge_numbers,
    "propagated_error": propagated_error,
    "answer": nudge_answer,
    "swap_answer": swap_answer,
    "choice": other_choice,
    "corrupted": shipped_corruption,
}
complete(f"{__name__}.KINDS", KINDS, Perturbations, "kinds")


# --- never correct by accident -----------------------------------------------------------------------


def _is_false(source: Source, edits: Sequence[Edit]) -> bool:
    """Whether every edit in a true equation leaves an equation that can be evaluated and does not hold.

    An edit in prose contradicts the text around it and counts as false.
    """
    text, spans = apply_edits(source.text, edits)
    after = find_equations(text)
    for edit, (start, end) in zip(edits, spans, strict=True):
        was_true = any(e.holds and e.start < edit.end and edit.start < e.end for e in source.equations)
        touched = [e for e in after if e.start < end and start < e.end]
        if any(e.holds for e in touched) or (was_true and not touched):
            return False
    return True


def _changes_value(text: str, token: Token, edit: Edit) -> bool:
    """False for flips that keep the value of the expression, such as x * 1 to x / 1, and for x / 0."""
    before = expression_value(text, token.start)
    after = expression_value(apply_edits(text, [edit])[0], token.start)
    return after is not None and after != before


def _weight(equations: Sequence[Equation], number: Number) -> float:
    for equation in equations:
        if equation.holds and equation.start <= number.start and number.end <= equation.end:
            return _RESULT_WEIGHT if number.start >= equation.right[0].start else _OPERAND_WEIGHT
    return _PROSE_WEIGHT


def _times_sign(text: str) -> str:
    return next((sign for sign in "×·" if sign in text), "*")


def _answer_numbers(source: Source) -> list[Number]:
    return [] if source.answer is None else find_numbers(source.text, *source.answer, skip_enumerators=False)


def _with_answer(source: Source, number: Number, value: Fraction) -> str | None:
    """The text with another number in its answer; None unless the answer's value really changes."""
    written = write_number(value, number)
    if written is None or value == number.value or source.answer is None:
        return None
    start, end = source.answer
    answer = source.text[start : number.start] + written + source.text[number.end : end]
    new_value = evaluate_text(answer)
    if new_value is not None and new_value == evaluate_text(source.text[start:end]):
        return None  # an expression such as 2 * 0 keeps its value
    if source.gold_value is not None and (value if new_value is None else new_value) == source.gold_value:
        return None
    return source.text[:start] + answer + source.text[end:]
