"""AUROC, calibration and distributions against scikit-learn, scipy and their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_ind
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from rairl_ray.evaluation.calibration import (
    auroc,
    auroc_stratified,
    auroc_within,
    brier,
    ece,
    reliability,
    score_histograms,
    sigmoid,
    welch_t_statistic,
    welch_t_test,
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.sampled_from([-2.0, -0.5, 0.0, 0.1, 3.0]), st.integers(0, 3)), min_size=2
    )
)
def test_auroc_equals_scikit_learn(samples: list[tuple[bool, float, int]]) -> None:
    correct, scores, weights = (np.array(column) for column in zip(*samples, strict=True))
    if correct.all() or not correct.any():
        assert math.isnan(auroc(correct, scores))
        return
    assert auroc(correct, scores) == pytest.approx(roc_auc_score(correct, scores))
    if weights[correct].sum() and weights[~correct].sum():
        expected = roc_auc_score(correct, scores, sample_weight=weights)
        assert auroc(correct, scores, weights) == pytest.approx(expected)


def test_auroc_leaves_unscored_rows_out() -> None:
    assert auroc(np.array([True, False, True]), np.array([1.0, 0.0, np.nan])) == 1.0
    assert math.isnan(auroc(np.array([]), np.array([])))


def test_auroc_within_problems_is_blind_to_difficulty() -> None:
    # Easy problem: high scores and mostly right. Within each problem the score says nothing or the opposite.
    correct = np.array([True, True, False, True, False, False])
    scores = np.array([5.0, 5.0, 6.0, -6.0, -5.0, -5.0])
    problems = np.array([0, 0, 0, 1, 1, 1])
    assert auroc(correct, scores) == pytest.approx(roc_auc_score(correct, scores))
    np.testing.assert_allclose(auroc_within(correct, scores, problems), [0.0, 0.0])
    one_class = auroc_within(np.array([True, True, True, False]), np.arange(4.0), np.array([0, 0, 1, 1]))
    assert math.isnan(one_class[0]) and one_class[1] == 0.0


def test_brier_and_ece_equal_their_definitions() -> None:
    generator = np.random.default_rng(1)
    probabilities = np.concatenate([generator.random(300), [0.0, 1.0, 0.1, 0.3]])
    correct = generator.random(304) < probabilities**2
    assert brier(correct, probabilities) == pytest.approx(brier_score_loss(correct, probabilities))
    expected = 0.0
    for b in range(10):
        inside = [i for i, p in enumerate(probabilities) if min(int(p * 10), 9) == b]
        if inside:
            expected += len(inside) / 304 * abs(correct[inside].mean() - probabilities[inside].mean())
    assert ece(correct, probabilities) == pytest.approx(expected)
    twice = np.concatenate([np.arange(304), np.arange(100)])
    weights = np.bincount(twice, minlength=304)
    assert ece(correct, probabilities, weights) == pytest.approx(ece(correct[twice], probabilities[twice]))


def test_sigmoid_does_not_overflow() -> None:
    with np.errstate(all="raise"):
        values = sigmoid(np.array([-1000.0, -1.0, 0.0, 1.0, 1000.0]))
    np.testing.assert_allclose(values, [0.0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1.0], atol=1e-15)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.booleans(), st.sampled_from([-1.0, 0.0, 0.5, math.nan]), st.integers(0, 2), st.integers(0, 2)
        ),
        min_size=1,
    )
)
def test_stratified_auroc_equals_a_count_of_pairs(samples: list[tuple[bool, float, int, int]]) -> None:
    won = pairs = 0.0
    for right, high, home, weight in samples:
        for other, low, place, count in samples:
            if right and not other and home == place and not math.isnan(high + low):
                pairs += weight * count
                won += weight * count * (1.0 if high > low else 0.5 if high == low else 0.0)
    columns = [np.array(column) for column in zip(*samples, strict=True)]
    expected = won / pairs if pairs else math.nan
    assert auroc_stratified(*columns) == pytest.approx(expected, nan_ok=True)


def test_stratified_auroc_is_blind_to_a_score_that_only_knows_length() -> None:
    generator = np.random.default_rng(2)
    length = generator.integers(0, 10, 4000)
    correct = generator.random(4000) < 0.9 - 0.08 * length
    score = -length + 0.01 * generator.normal(size=4000)
    assert auroc(correct, score) > 0.7
    assert auroc_stratified(correct, score, length) == pytest.approx(0.5, abs=0.03)
    one = np.zeros(4000, dtype=int)
    assert auroc_stratified(correct, score, one) == pytest.approx(roc_auc_score(correct, score))


def test_reliability_equals_scikit_learn_and_adds_up_to_ece() -> None:
    generator = np.random.default_rng(3)
    probabilities = generator.random(500) * 0.7  # the last bins are empty
    correct = generator.random(500) < probabilities
    bins = reliability(correct, probabilities, bins=10)
    accuracy, confidence = calibration_curve(correct, probabilities, n_bins=10)
    filled = [b for b in bins if b.count]
    np.testing.assert_allclose([b.accuracy for b in filled], accuracy)
    np.testing.assert_allclose([b.confidence for b in filled], confidence)
    assert len(bins) == 10 and sum(b.count for b in bins) == 500 and math.isnan(bins[9].accuracy)
    assert [b.low for b in bins[1:]] == [b.high for b in bins[:-1]] and bins[9].high == 1.0
    gap = sum(b.count / 500 * abs(b.accuracy - b.confidence) for b in filled)
    assert ece(correct, probabilities) == pytest.approx(gap)


def test_histograms_count_every_finite_score_once() -> None:
    scores = np.array([0.0, 1.0, 2.0, 2.0, 4.0, math.nan, math.inf])
    correct = np.array([True, False, True, False, True, True, False])
    edges, right, wrong = score_histograms(correct, scores, bins=4)
    assert edges.tolist() == [0, 1, 2, 3, 4]
    assert right.tolist() == [1, 0, 1, 1] and wrong.tolist() == [0, 1, 1, 0]


def test_welch_equals_scipy_with_rows_repeated() -> None:
    generator = np.random.default_rng(4)
    scores, correct = generator.normal(size=40), generator.random(40) < 0.4
    t, df, p = welch_t_test(scores[correct], scores[~correct])
    means, variances, counts = zip(
        *((s.mean(), s.var(ddof=1), len(s)) for s in (scores[correct], scores[~correct])), strict=True
    )
    errors = [variance / count for variance, count in zip(variances, counts, strict=True)]
    assert t == pytest.approx((means[0] - means[1]) / math.sqrt(sum(errors)))
    expected = sum(errors) ** 2 / sum(e**2 / (c - 1) for e, c in zip(errors, counts, strict=True))
    assert df == pytest.approx(expected) and 0 < p < 1
    statistic = welch_t_statistic(correct, scores)
    assert statistic(np.ones(40)) == pytest.approx(t)
    often = generator.integers(0, 4, 40)
    again, side = np.repeat(scores, often), np.repeat(correct, often)
    assert statistic(often) == pytest.approx(ttest_ind(again[side], again[~side], equal_var=False).statistic)
    assert math.isnan(statistic(correct.astype(int)))
    assert all(math.isnan(x) for x in welch_t_test(scores[:1], scores))


def test_statistics_of_the_smallest_samples() -> None:
    """Two rows a class have a t, one row has a calibration error; a distribution has thirty bins."""
    scores, correct = np.array([1.0, 2.0, 4.0, 8.0]), np.array([True, True, False, False])
    t, _, _ = welch_t_test(scores[correct], scores[~correct])
    assert welch_t_statistic(correct, scores)(np.ones(4, dtype=int)) == pytest.approx(t)
    assert ece(np.array([True]), np.array([0.25])) == pytest.approx(0.75)
    assert math.isnan(ece(np.array([]), np.array([])))
    # a certainty lies in the last bin, beside 0.95
    assert ece(np.array([False, True]), np.array([1.0, 0.95])) == pytest.approx(0.95 / 2)
    assert len(score_histograms(correct, scores)[0]) == 31
