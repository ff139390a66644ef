"""Localisation of the first wrong step against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.evaluation.localisation import (
    InjectedError,
    localise,
    predicted_step,
    step_char_ends,
    step_of,
    step_values,
)

TEXT = "<think>\n3+5=8\n\n  8+1=9\n9+4=14\n</think>\n<answer>\n14\n</answer>"


def test_steps_are_the_lines_of_the_think_block() -> None:
    ends = step_char_ends(TEXT)
    pieces = [TEXT[a:b] for a, b in zip([TEXT.index("3"), *ends], ends, strict=False)]
    assert [piece.strip() for piece in pieces] == ["3+5=8", "8+1=9", "9+4=14"]
    assert step_char_ends("a\nb") == [2, 3]
    assert step_char_ends("<think>\ncut off") == [15]
    assert step_char_ends("<think></think>") == []


def test_every_character_of_a_line_lies_in_its_step() -> None:
    ends = step_char_ends(TEXT)
    for step, line in enumerate(["3+5=8", "8+1=9", "9+4=14"]):
        start = TEXT.index(line)
        assert {step_of(char, ends) for char in range(start, start + len(line))} == {step}
    assert step_of(TEXT.index("<answer>"), ends) is None


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_step_values_equal_a_loop_over_units(data: st.DataObject) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, 30), min_size=1, max_size=6)))
    units = sorted(data.draw(st.lists(st.integers(1, 35), min_size=1, max_size=12)))
    rewards = data.draw(st.lists(st.floats(-5, 5), min_size=len(units), max_size=len(units)))
    expected = []
    for step, end in enumerate(ends):
        begin = ends[step - 1] if step else 0
        inside = [r for u, r in zip(units, rewards, strict=True) if begin < u <= end]
        behind = [r for u, r in zip(units, rewards, strict=True) if u > end]
        expected.append(np.mean(inside) if inside else (behind[0] if behind else rewards[-1]))
    np.testing.assert_allclose(step_values(ends, units, rewards), expected)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=6), st.floats(-10, 10))
def test_prediction_equals_brute_force_and_ignores_an_offset(values: list[int], offset: float) -> None:
    changes = []
    for step, value in enumerate(values):
        others = [v for i, v in enumerate(values) if i != step]
        before = values[step - 1] if step else (sum(others) / len(others) if others else value)
        changes.append(value - before)
    best = [step for step, change in enumerate(changes) if math.isclose(change, min(changes), abs_tol=1e-9)]
    expected = [1 / len(best) if step in best else 0.0 for step in range(len(values))]
    np.testing.assert_allclose(predicted_step(np.array(values, dtype=float)), expected)
    np.testing.assert_allclose(predicted_step(np.array(values) + offset), expected)


def test_equal_rewards_are_a_guess_whatever_the_rounding() -> None:
    np.testing.assert_allclose(predicted_step(np.full(7, 0.1)), np.full(7, 1 / 7))


def test_the_fall_is_read_not_the_minimum() -> None:
    """A reward that keeps falling slowly after the error: argmin would name the last step."""
    assert predicted_step(np.array([1.0, 0.9, -2.0, -2.1, -2.2])).tolist() == [0, 0, 1, 0, 0]
    assert predicted_step(np.array([-3.0, 1.0, 1.0])).tolist() == [1, 0, 0]


def error_in(step: int, rewards: list[float]) -> InjectedError:
    ends = step_char_ends(TEXT)
    starts = [TEXT.index("3"), *ends[:-1]]
    return InjectedError(
        step_char_ends=ends,
        edit_char=starts[step] + 3,
        unit_char_ends=[*ends, len(TEXT) + 1],
        unit_rewards=rewards,
    )


def test_accuracy_and_chance() -> None:
    answer_edit = InjectedError(
        step_char_ends=step_char_ends(TEXT), edit_char=TEXT.rindex("14"), unit_char_ends=[9], unit_rewards=[0.0]
    )
    cases = [
        error_in(1, [1.0, -1.0, 0.0, 5.0]),  # right
        error_in(2, [1.0, -1.0, 0.0, 5.0]),  # wrong
        error_in(0, [0.0, 0.0, 0.0, -9.0]),  # a tie of three; the fall in the answer is no step
        answer_edit,  # left out
    ]
    summary = localise(cases, resamples=20, key=(0,))
    accuracy, chance = summary["localisation/step_accuracy"], summary["localisation/chance"]
    assert accuracy["value"] == pytest.approx((1 + 0 + 1 / 3) / 3)
    assert chance["value"] == pytest.approx(1 / 3)
    assert accuracy["n"] == chance["n"] == 3
    assert math.isnan(localise([], resamples=5)["localisation/step_accuracy"]["value"])


def test_random_rewards_score_chance() -> None:
    generator = np.random.default_rng(0)
    cases = [error_in(int(generator.integers(3)), list(generator.normal(size=4))) for _ in range(2000)]
    summary = localise(cases, resamples=200)
    accuracy = summary["localisation/step_accuracy"]
    assert accuracy["low"] < summary["localisation/chance"]["value"] < accuracy["high"]


def test_rewards_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        step_values([3], [3], [math.nan])
    with pytest.raises(ValueError, match="0 rewards"):
        step_values([3], [], [])
