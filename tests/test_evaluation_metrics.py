"""Evaluation metrics against enumeration and scikit-learn."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, roc_auc_score

from rairl_ray.errors import DataError
from rairl_ray.evaluation import metrics
from rairl_ray.evaluation.rows import EvalRow, read_rows, write_rows


def row(prompt: str, index: int, correct: bool, **changes: object) -> EvalRow:
    values: dict = {
        "prompt_id": prompt,
        "question": "1+1?",
        "generation": "<think>\n1+1=2\n</think>",
        "generation_idx": index,
        "answer": "2",
        "correct": correct,
        "extracted": "2" if correct else "3",
        "format_ok": True,
        "finish_reason": "stop",
        "tokens": 10,
        "policy_version": 3,
    }
    return EvalRow(**values | changes)


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_enumeration_of_subsets(n: int) -> None:
    for m, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * m + [False] * (n - m)
        subsets = list(itertools.combinations(samples, k))
        assert metrics.pass_at_k(n, m, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "m", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, m: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass_at_k"):
        metrics.pass_at_k(n, m, k)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), n=st.integers(1, 6))
def test_rerank_at_k_equals_enumeration_of_tie_breaks(data: st.DataObject, n: int) -> None:
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, math.nan]), min_size=n, max_size=n))
    correct = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    worst = [-math.inf if math.isnan(score) else score for score in scores]
    orders = list(itertools.permutations(range(n)))  # every tie-break is equally likely
    hits = 0
    for order in orders:
        best = sorted(range(n), key=lambda i: (-worst[i], order[i]))[:k]
        hits += any(correct[i] for i in best)
    value = metrics.rerank_at_k(np.array([scores]), np.array([correct]), k)
    assert value[0] == pytest.approx(hits / len(orders))


def test_rerank_with_equal_scores_is_random_choice() -> None:
    correct = np.random.default_rng(0).random((20, 8)) < 0.4
    value = metrics.rerank_at_k(np.zeros((20, 8)), correct, 1)
    np.testing.assert_allclose(value, metrics.random_at_1(correct))
    np.testing.assert_allclose(value, [metrics.pass_at_k(8, int(c.sum()), 1) for c in correct])
    np.testing.assert_allclose(metrics.rerank_at_k(np.zeros((20, 8)), correct, 8), metrics.oracle_at_n(correct))


def test_majority_expects_over_ties_and_ignores_missing_answers() -> None:
    assert metrics.majority_at_n(["2", "2", "3"], [True, True, False]) == 1.0
    assert metrics.majority_at_n(["2", "3", "3"], [True, False, False]) == 0.0
    assert metrics.majority_at_n(["2", "3"], [True, False]) == 0.5
    assert metrics.majority_at_n([None, None, "2"], [False, False, True]) == 1.0
    assert metrics.majority_at_n([None, None], [False, False]) == 0.0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([-2.0, -0.5, 0.0, 0.1, 3.0]), st.integers(0, 3)), min_size=2
    )
)
def test_auroc_equals_scikit_learn(samples: list[tuple[bool, float, int]]) -> None:
    correct, scores, weights = (np.array(column) for column in zip(*samples, strict=True))
    if correct.all() or not correct.any():
        assert math.isnan(metrics.auroc(correct, scores))
        return
    assert metrics.auroc(correct, scores) == pytest.approx(roc_auc_score(correct, scores))
    if weights[correct].sum() and weights[~correct].sum():
        expected = roc_auc_score(correct, scores, sample_weight=weights)
        assert metrics.auroc(correct, scores, weights) == pytest.approx(expected)


def test_auroc_leaves_unscored_rows_out() -> None:
    assert metrics.auroc(np.array([True, False, True]), np.array([1.0, 0.0, np.nan])) == 1.0
    assert math.isnan(metrics.auroc(np.array([]), np.array([])))


def test_auroc_within_problems_is_blind_to_difficulty() -> None:
    # Easy problem: high scores and mostly right. Within each problem the score says nothing or the opposite.
    correct = np.array([True, True, False, True, False, False])
    scores = np.array([5.0, 5.0, 6.0, -6.0, -5.0, -5.0])
    problems = np.array([0, 0, 0, 1, 1, 1])
    assert metrics.auroc(correct, scores) == pytest.approx(roc_auc_score(correct, scores))
    np.testing.assert_allclose(metrics.auroc_within(correct, scores, problems), [0.0, 0.0])
    one_class = metrics.auroc_within(
        np.array([True, True, True, False]), np.arange(4.0), np.array([0, 0, 1, 1])
    )
    assert math.isnan(one_class[0]) and one_class[1] == 0.0


def test_brier_and_ece_equal_their_definitions() -> None:
    generator = np.random.default_rng(1)
    probabilities = np.concatenate([generator.random(300), [0.0, 1.0, 0.1, 0.3]])
    correct = generator.random(304) < probabilities**2
    assert metrics.brier(correct, probabilities) == pytest.approx(brier_score_loss(correct, probabilities))
    expected = 0.0
    for b in range(10):
        inside = [i for i, p in enumerate(probabilities) if min(int(p * 10), 9) == b]
        if inside:
            expected += len(inside) / 304 * abs(correct[inside].mean() - probabilities[inside].mean())
    assert metrics.ece(correct, probabilities) == pytest.approx(expected)
    twice = np.concatenate([np.arange(304), np.arange(100)])
    weights = np.bincount(twice, minlength=304)
    assert metrics.ece(correct, probabilities, weights) == pytest.approx(
        metrics.ece(correct[twice], probabilities[twice])
    )


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise"):
        values = metrics.sigmoid(np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0]))
    np.testing.assert_allclose(values, [0.0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1.0], atol=1e-15)


def test_bootstrap_is_keyed_and_near_the_normal_interval() -> None:
    values = (np.random.default_rng(2).random(400) < 0.3).astype(float)
    value, low, high = metrics.bootstrap(values, 4000, (0, "x"))
    assert (value, low, high) == metrics.bootstrap(values, 4000, (0, "x"))
    assert (low, high) != metrics.bootstrap(values, 4000, (1, "x"))[1:]
    half = 1.96 * values.std() / math.sqrt(400)
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.006)
    assert metrics.bootstrap([0.5, math.nan], 10, ()) == (0.5, 0.5, 0.5)
    assert all(math.isnan(x) for x in metrics.bootstrap([], 10, ()))


def test_bootstrap_resamples_problems_not_rows() -> None:
    """Eight copies of each problem's value carry no more information than one."""
    correct = np.repeat(np.random.default_rng(3).random(100) < 0.5, 8)
    problem = np.repeat(np.arange(100), 8)
    _, low, high = metrics.bootstrap_statistic(
        lambda counts: float(np.average(correct, weights=counts[problem])), 100, 2000, ()
    )
    assert high - low == pytest.approx(2 * 1.96 * correct.std() / math.sqrt(100), rel=0.1)


def test_summary_against_values_by_hand() -> None:
    rows = [
        row("a", 0, True, score=2.0, tokens=4),
        row("a", 1, False, score=1.0, tokens=9),
        row("a", 2, False, score=-1.0, tokens=9),
        row("b", 0, False, score=3.0, tokens=5, extracted=None, format_ok=False, finish_reason="length"),
        row("b", 1, True, score=0.0, tokens=7),
        row("b", 2, True, score=0.0, tokens=9),
        row("c", 0, True, score=1.5),  # two of its samples are lost
    ]
    summary = metrics.summarise(rows, k=(1, 3), resamples=50, key=(0,))
    value = {name: entry["value"] for name, entry in summary.items()}
    count = {name: entry["n"] for name, entry in summary.items()}
    assert value["eval/pass_at_1"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert value["eval/pass_at_3"] == 1.0 and count["eval/pass_at_3"] == 2
    assert value["eval/random_at_1"] == pytest.approx(0.5)
    assert value["eval/majority_at_3"] == pytest.approx((0 + 1) / 2)
    assert value["eval/oracle_at_3"] == 1.0
    assert value["eval/rerank_at_1"] == pytest.approx((1 + 0) / 2)
    assert value["eval/shortest_at_1"] == pytest.approx((1 + 0) / 2)
    assert value["eval/longest_at_1"] == pytest.approx((0 + 1) / 2)
    assert value["eval/format_share"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert value["eval/truncated_share"] == pytest.approx((0 + 1 / 3 + 0) / 3)
    correct, scores = [r.correct for r in rows], [r.score for r in rows]
    assert value["discriminator/auroc"] == pytest.approx(roc_auc_score(correct, scores))
    assert value["discriminator/auroc_within_problem"] == pytest.approx((1.0 + 0.0) / 2)
    assert (count["discriminator/auroc_within_problem"], count["discriminator/auroc"]) == (2, 3)
    for entry in summary.values():
        assert set(entry) == {"value", "low", "high", "n"}
        assert math.isnan(entry["low"]) or entry["low"] - 1e-12 <= entry["value"] <= entry["high"] + 1e-12


def test_summary_without_reward_has_no_reward_metrics() -> None:
    summary = metrics.summarise([row("a", 0, True), row("a", 1, False)], resamples=10)
    assert "eval/pass_at_1" in summary and "eval/rerank_at_1" not in summary
    assert not any(name.startswith("discriminator/") for name in summary)
    assert metrics.summarise([]) == {}


def test_summary_refuses_a_generation_counted_twice() -> None:
    with pytest.raises(ValueError, match="generation_idx 0 more than once"):
        metrics.summarise([row("a", 0, True), row("a", 0, True)])


def test_rows_round_trip(tmp_path: Path) -> None:
    rows = [
        row(
            "ä",
            0,
            True,
            generation="two\nlines \u2028",
            unit_scores=[0.5, -1.0],
            unit_char_ends=[3, 9],
            score=-0.25,
        ),
        row("b", 1, False, answer=None, extracted=None),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text('{"prompt_id": "a"}\n')
    with pytest.raises(DataError, match="row 1 lacks"):
        read_rows(tmp_path / "rows.jsonl")
