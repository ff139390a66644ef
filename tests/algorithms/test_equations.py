"""Numbers, operators and equations in a text."""

from __future__ import annotations

import pytest

from rairl_ray.algorithms.equations import (
    evaluate_text,
    expression_value,
    find_equations,
    find_numbers,
    find_operators,
)


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


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("(2) -5", [2, 5]),
        ("50% -5", [50, 5]),
        ("x2 -5", [2, 5]),
        ("34 -5", [34, 5]),
        ("so -5", [-5]),
        ("x-5", [5]),
        ("$ -5", [-5]),
    ],
)
def test_a_minus_behind_a_value_is_no_sign(text: str, values: list[int]) -> None:
    assert [number.value for number in find_numbers(text, 0, len(text))] == values


def test_a_subtraction_is_no_sign_and_an_enumerator_no_number() -> None:
    numbers = find_numbers("1. a is 5-3\n2) b is -4\nStep 3: (-6) and 7 -8")
    assert [int(n.value) for n in numbers] == [5, 3, -4, -6, 7, 8]
