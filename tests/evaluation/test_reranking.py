"""pass@k, reranking and votes against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.evaluation.passing import oracle_at_n, oracle_curve, pass_at_k, random_at_1
from rairl_ray.evaluation.reranking import majority_at_n, rerank_at_k, rerank_curve, reward_weighted_majority


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_equals_enumeration_of_subsets(n: int) -> None:
    for m, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [True] * m + [False] * (n - m)
        subsets = list(itertools.combinations(samples, k))
        assert pass_at_k(n, m, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "m", "k"), [(4, 5, 1), (4, 2, 5), (4, 2, 0), (0, 0, 1), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(n: int, m: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass_at_k"):
        pass_at_k(n, m, k)


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
    value = rerank_at_k(np.array([scores]), np.array([correct]), k)
    assert value[0] == pytest.approx(hits / len(orders))


def test_rerank_with_equal_scores_is_random_choice() -> None:
    correct = np.random.default_rng(0).random((20, 8)) < 0.4
    value = rerank_at_k(np.zeros((20, 8)), correct, 1)
    np.testing.assert_allclose(value, random_at_1(correct))
    np.testing.assert_allclose(value, [pass_at_k(8, int(c.sum()), 1) for c in correct])
    np.testing.assert_allclose(rerank_at_k(np.zeros((20, 8)), correct, 8), oracle_at_n(correct))


def test_majority_expects_over_ties_and_ignores_missing_answers() -> None:
    assert majority_at_n(["2", "2", "3"], [True, True, False]) == 1.0
    assert majority_at_n(["2", "3", "3"], [True, False, False]) == 0.0
    assert majority_at_n(["2", "3"], [True, False]) == 0.5
    assert majority_at_n([None, None, "2"], [False, False, True]) == 1.0
    assert majority_at_n([None, None], [False, False]) == 0.0


SCORES = st.sampled_from([-1.0, 0.0, 0.5, math.nan])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 5), problems=st.integers(1, 3))
def test_rerank_curve_equals_enumeration_of_draws_and_tie_breaks(
    data: st.DataObject, n: int, problems: int
) -> None:
    rows = st.lists(st.tuples(SCORES, st.booleans()), min_size=n, max_size=n)
    samples = data.draw(st.lists(rows, min_size=problems, max_size=problems))
    expected = []
    for size in range(1, n + 1):
        chosen = []
        for problem in samples:
            for draw in itertools.combinations(problem, size):
                worst = [-math.inf if math.isnan(score) else score for score, _ in draw]
                best = [right for value, (_, right) in zip(worst, draw, strict=True) if value == max(worst)]
                chosen.append(sum(best) / len(best))
        expected.append(sum(chosen) / len(chosen))
    scores, correct = (np.array([[row[part] for row in problem] for problem in samples]) for part in (0, 1))
    np.testing.assert_allclose(rerank_curve(scores, correct), expected, atol=1e-12)


def test_the_curves_meet_the_single_numbers() -> None:
    generator = np.random.default_rng(1)
    correct, scores = generator.random((30, 16)) < 0.3, generator.integers(0, 6, (30, 16))
    curve, oracle = rerank_curve(scores, correct), oracle_curve(correct)
    assert curve[0] == pytest.approx(random_at_1(correct).mean())
    assert curve[-1] == pytest.approx(rerank_at_k(scores, correct, 1).mean())
    for k in range(1, 17):
        assert oracle[k - 1] == pytest.approx(np.mean([pass_at_k(16, int(c.sum()), k) for c in correct]))
    assert (curve <= oracle + 1e-12).all()
    np.testing.assert_allclose(rerank_curve(correct, correct), oracle)  # a perfect score is the oracle
    with pytest.raises(ValueError, match="rerank_curve"):
        rerank_curve(scores[:, :3], correct)


def test_weighted_majority_weighs_votes_by_the_sigmoid() -> None:
    # sigmoid(2) = 0.88 against 2 * sigmoid(-1) = 0.54, and against 2 * sigmoid(0) = 1.0
    assert reward_weighted_majority(["a", "b", "b"], [True, False, False], [2.0, -1.0, -1.0]) == 1.0
    assert reward_weighted_majority(["a", "b", "b"], [True, False, False], [2.0, 0.0, 0.0]) == 0.0
    assert reward_weighted_majority(["a", "b"], [True, False], [0.3, 0.3]) == 0.5
    forth = [0.1, 0.2, 0.7]
    assert reward_weighted_majority([*"aaabbb"], [True] * 3 + [False] * 3, [*forth, *forth[::-1]]) == 0.5
    assert reward_weighted_majority([None, "b"], [True, False], [9.0, -9.0]) == 0.0
    assert reward_weighted_majority(["a", "b"], [True, False], [math.nan, -3.0]) == 0.0
    assert reward_weighted_majority([None, None], [False, False], [1.0, 1.0]) == 0.0


def test_weighted_majority_survives_scores_whose_sigmoid_underflows() -> None:
    answers, correct = ["a", "b", "b"], [True, False, False]
    assert reward_weighted_majority(answers, correct, [-800.0, -801.0, -801.0]) == 1.0  # 1 against 2 / e
    assert reward_weighted_majority(answers, correct, [-800.0, -800.5, -800.5]) == 0.0
    assert reward_weighted_majority(answers, correct, [math.nan] * 3) == majority_at_n(answers, correct)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.booleans()), min_size=1), st.floats(-50, 50)
)
def test_equal_scores_make_weighted_majority_plain_majority(
    samples: list[tuple[str | None, bool]], score: float
) -> None:
    answers, correct = ([sample[part] for sample in samples] for part in (0, 1))
    assert reward_weighted_majority(answers, correct, [score] * len(samples)) == pytest.approx(
        majority_at_n(answers, correct)
    )


def test_scores_that_do_not_fit_are_refused() -> None:
    scores, correct = np.zeros((2, 3)), np.zeros((2, 3), dtype=bool)
    assert rerank_at_k(scores[:0], correct[:0], 1).shape == (0,)
    for found, k in ((correct, 0), (correct, 4), (correct[:, :2], 1)):
        with pytest.raises(ValueError, match="do not fit"):
            rerank_at_k(scores, found, k)
