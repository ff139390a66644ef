"""Localisation of the first wrong step against brute force."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.evaluation.localisation import (
    ARGMIN,
    InjectedError,
    Readout,
    StepTrace,
    baseline_summary,
    baseline_values,
    hit_at_1,
    localise,
    predicted_step,
    step_char_ends,
    step_of,
    step_summary,
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


@pytest.mark.parametrize(
    ("readout", "expected"),
    [
        (Readout(), [0, 0, 1, 0]),
        (Readout(threshold=2.9), [0, 0, 1, 0]),
        (Readout(threshold=3.0), [0, 0, 0, 0]),  # it falls by 3, not by more
        (ARGMIN, [0, 0, 0, 1]),
        (Readout(type="argmin", threshold=-2.0), [0, 0, 0, 1]),
        (Readout(type="argmin", threshold=-3.0), [0, 0, 0, 0]),
        (Readout(type="threshold", threshold=0.5), [0, 1, 0, 0]),
        (Readout(type="threshold", threshold=0.0), [0, 0, 1, 0]),
        (Readout(type="threshold", threshold=-3.0), [0, 0, 0, 0]),
    ],
)
def test_each_readout_names_its_step_or_none(readout: Readout, expected: list[int]) -> None:
    assert predicted_step(np.array([1.0, 0.4, -2.6, -3.0]), readout).tolist() == expected


def test_a_threshold_readout_needs_its_threshold() -> None:
    with pytest.raises(ValueError, match="needs a threshold"):
        Readout(type="threshold")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=1, max_size=4), min_size=1, max_size=6),
    st.data(),
    st.sampled_from([Readout(threshold=1.5), ARGMIN, Readout(type="threshold", threshold=0.0)]),
)
def test_step_summary_equals_its_formulas(
    values: list[list[int]], data: st.DataObject, readout: Readout
) -> None:
    traces = [StepTrace(values=v, first_error=data.draw(st.integers(-1, len(v) - 1))) for v in values]
    summary = step_summary(traces, readout, resamples=5)
    hits: dict[bool, list[float]] = {True: [], False: []}
    chances = []
    for trace in traces:
        named = list(predicted_step(np.array(trace.values), readout))
        if trace.first_error < 0:
            hits[False].append(1 - sum(named))
        else:
            hits[True].append(named[trace.first_error])
            chances.append(1 / len(named))
    accuracy, right = (np.mean(h) if h else math.nan for h in (hits[True], hits[False]))
    chance = np.mean(chances) if chances else math.nan
    value = {name: numbers["value"] for name, numbers in summary.items()}
    assert value["localisation/step_accuracy"] == pytest.approx(accuracy, nan_ok=True)
    assert value["localisation/chance"] == pytest.approx(chance, nan_ok=True)
    above = (accuracy - chance) / (1 - chance) if chance < 1 else math.nan
    assert value["localisation/step_accuracy_above_chance"] == pytest.approx(above, nan_ok=True)
    assert ("localisation/processbench_f1" in value) == bool(hits[False])
    if hits[False]:
        f1 = 0.0 if accuracy + right == 0 else 2 * accuracy * right / (accuracy + right)
        assert value["localisation/right_accuracy"] == pytest.approx(right)
        assert value["localisation/processbench_f1"] == pytest.approx(f1, nan_ok=True)
        assert summary["localisation/processbench_f1"]["n"] == len(traces)


def test_a_perfect_reward_is_at_one_and_intervals_hold_the_value() -> None:
    generator = np.random.default_rng(1)
    perfect = [StepTrace(values=[1, 1, -1, -1], first_error=2), StepTrace(values=[1, 1], first_error=-1)]
    value = {name: n["value"] for name, n in step_summary(perfect, Readout(threshold=1.0), resamples=5).items()}
    assert value["localisation/step_accuracy_above_chance"] == value["localisation/processbench_f1"] == 1.0
    noise = [
        StepTrace(values=generator.normal(size=5), first_error=int(generator.integers(-1, 5)))
        for _ in range(300)
    ]
    for name, numbers in step_summary(noise, Readout(threshold=1.0), resamples=200).items():
        assert numbers["low"] <= numbers["value"] <= numbers["high"], name
        assert numbers["low"] < numbers["high"], name


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_hit_at_1_equals_a_loop_over_tokens(data: st.DataObject) -> None:
    ends = sorted(data.draw(st.sets(st.integers(1, 25), min_size=2, max_size=12)))
    units = sorted(data.draw(st.sets(st.sampled_from(range(len(ends))), min_size=1)))
    rewards = [float(data.draw(st.integers(-2, 2))) for _ in units]
    edit = data.draw(st.integers(0, ends[-1] - 1))
    within = data.draw(st.integers(0, 5))
    case = InjectedError(
        step_char_ends=[ends[-1]], edit_char=edit, unit_char_ends=[ends[u] for u in units],
        unit_rewards=rewards, token_char_ends=ends,
    )  # fmt: skip
    token = next(i for i, end in enumerate(ends) if edit < end)
    near = [abs(unit - token) <= within for unit in units]
    named = predicted_step(np.array(rewards))
    hit, chance = hit_at_1(case, within)
    assert hit == pytest.approx(sum(p for p, close in zip(named, near, strict=True) if close))
    assert chance == pytest.approx(sum(near) / len(near))


def test_hit_at_1_is_in_the_summary_with_its_chance() -> None:
    case = dataclasses.replace(
        error_in(1, [1.0, -1.0, 0.0, 5.0]), token_char_ends=list(range(1, len(TEXT) + 2))
    )
    summary = localise([case, error_in(1, [1.0, -1.0, 0.0, 5.0])], hit_tokens=(2, 100), resamples=5)
    # The edit is the `9` in `8+1=9`: its unit ends two characters on (the line end, blanks before the next).
    assert summary["localisation/hit_at_1_within_2_tokens"]["value"] == 1.0
    assert summary["localisation/hit_at_1_within_2_tokens"]["n"] == 1
    assert summary["localisation/hit_chance_within_2_tokens"]["value"] == 0.25
    assert summary["localisation/hit_chance_within_100_tokens"]["value"] == 1.0


def test_a_trace_of_one_unit_counts() -> None:
    assert localise([error_in(1, [1.0, -1.0, 0.0, 5.0])], resamples=5)["localisation/step_accuracy"]["n"] == 1
    case = dataclasses.replace(error_in(1, [1.0]), unit_char_ends=[len(TEXT) + 1])
    assert localise([case], resamples=5)["localisation/step_accuracy"]["n"] == 1
    assert (
        localise([dataclasses.replace(case, unit_rewards=[], unit_char_ends=[])], resamples=5)[
            "localisation/step_accuracy"
        ]["n"]
        == 0
    )


def test_baselines_name_the_least_likely_and_the_most_uncertain_step() -> None:
    ends, tokens = [4, 8], [2, 4, 6, 8, 9]  # two tokens a step, then the end of the sequence
    logprobs, entropies = [-1.0, -1.0, -3.0, -0.5, -50.0], [2.0, 2.0, 3.0, 0.1, 50.0]
    likely = baseline_values("logprob", ends, tokens, logprobs)
    certain = baseline_values("entropy", ends, tokens, entropies)
    np.testing.assert_allclose(likely, [-1.0, -1.75])
    np.testing.assert_allclose(certain, [-2.0, -1.55])
    for name, values, hit in (("logprob", likely, 1.0), ("entropy", certain, 0.0)):
        summary = baseline_summary(name, [StepTrace(values=values, first_error=1)], resamples=5)
        assert summary[f"localisation/step_accuracy_{name}"]["value"] == hit
