"""Numbers, operators and equations in a text, and values near a number."""

from __future__ import annotations

import random
from fractions import Fraction

from rairl_ray.algorithms.equations import (
    Number,
    evaluate_text,
    expression_value,
    find_equations,
    find_numbers,
    find_operators,
)
from rairl_ray.algorithms.slip import near_values


def test_where_a_number_and_an_operator_stand() -> None:
    (number,) = find_numbers("x = -5")
    assert (number.start, number.end, number.value) == (4, 6, -5)
    assert [n.value for n in find_numbers("\n2. He has 5 apples.")] == [5]
    assert [[t.text for t in find_operators("3 + 4", *span)] for span in ((0, 3), (2, 3), (3, 5))] == [
        ["+"],
        ["+"],
        [],
    ]
    assert [token.text for token in find_operators("(3) + 4 * -5", 0, 12)] == ["+"]
    assert expression_value("3 + 4", 0) == 7 and expression_value("so 3 + 4", 0) is None
    assert evaluate_text("(4 + 5") is None and evaluate_text("(4 + 5)") == 9
    assert find_equations("it is + 3 = 3") == []  # the operand before the plus is not to be seen


def test_values_near_a_number_are_off_by_its_unit_and_by_ten_units_where_it_is_large() -> None:
    def always(value: str, decimals: int) -> set[Fraction]:
        number = Number(0, 1, Fraction(value), decimals, False)
        draws = [set(near_values(number, random.Random(seed))) for seed in range(60)]
        return {v - number.value for v in set.intersection(*draws)}

    assert always("20", 0) == {1, -1, 2, -2, 10, -10} and always("19", 0) == {1, -1, 2, -2}
    assert always("2.50", 2) == {Fraction(k, 100) for k in (1, -1, 2, -2, 10, -10)}
