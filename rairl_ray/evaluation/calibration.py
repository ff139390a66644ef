"""How a score tells right from wrong samples: AUROC, calibration errors, distributions (docs/method.md 6).

Dimension letters: R rows (samples of all problems), P problems.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# --- right against wrong, pair by pair -------------------------------------------------------------


def auroc(correct: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Probability that a right sample scores above a wrong one, ties counting half (Mann-Whitney).

    correct [R] bool, scores [R] (rows with NaN are left out), weights [R]. NaN where a class is missing.
    """
    return auroc_statistic(correct, scores)(_weights(scores, weights))


def auroc_within(correct: np.ndarray, scores: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """[P]: AUROC among the samples of each problem, NaN where all are right or all wrong.

    Free of what pooled AUROC owes to easy and hard problems. problems [R]: integers 0..P-1.
    """
    problems = np.asarray(problems)
    wins, pairs = _pairs(correct, scores, problems)(np.ones(len(problems)))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(pairs > 0, wins / pairs, np.nan))


def auroc_stratified(
    correct: np.ndarray, scores: np.ndarray, strata: np.ndarray, weights: np.ndarray | None = None
) -> float:
    """AUROC of the pairs whose two samples lie in one stratum, all strata together.

    With deciles of length as strata it is free of what a score owes to length, with the format as stratum of
    what it owes to format. strata [R]: integers from 0. NaN where no stratum has both classes.
    """
    return auroc_statistic(correct, scores, strata)(_weights(scores, weights))


def auroc_statistic(
    correct: np.ndarray, scores: np.ndarray, strata: np.ndarray | None = None
) -> Callable[[np.ndarray], float]:
    """AUROC as a function of the rows' weights [R]; sorted once, for many resamples."""
    count = _pairs(correct, scores, np.zeros(len(scores), dtype=np.int64) if strata is None else strata)

    def statistic(weights: np.ndarray) -> float:
        wins, pairs = count(weights)
        return float(wins.sum() / pairs.sum()) if pairs.sum() else float("nan")

    return statistic


def _pairs(
    correct: np.ndarray, scores: np.ndarray, strata: np.ndarray
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Weights [R] -> (weight of pairs won by the right sample, weight of all pairs), each [strata]."""
    scores, strata = np.asarray(scores, dtype=np.float64), np.asarray(strata, dtype=np.int64)
    order = np.lexsort((scores, strata))
    order = order[~np.isnan(scores[order])]
    score, stratum, right = scores[order], strata[order], np.asarray(correct, dtype=np.float64)[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (score[1:] != score[:-1]) | (stratum[1:] != stratum[:-1])
    tie = np.cumsum(new) - 1  # rows of one score in one stratum
    ties, home = int(new.sum()), stratum[new]
    first = np.searchsorted(home, home)  # the first tie of each tie's stratum
    size = int(strata.max(initial=-1)) + 1

    def count(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = np.asarray(weights, dtype=np.float64)[order]
        positive = np.bincount(tie, right * weight, minlength=ties)
        negative = np.bincount(tie, (1.0 - right) * weight, minlength=ties)
        below = np.concatenate([[0.0], np.cumsum(negative)])
        won = positive * (below[:-1] - below[first] + negative / 2)
        pairs = np.bincount(home, positive, minlength=size) * np.bincount(home, negative, minlength=size)
        return np.bincount(home, won, minlength=size), pairs

    return count


def _weights(scores: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    return np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)


# --- probabilities ---------------------------------------------------------------------------------


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(values, dtype=np.float64)))


def brier(correct: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean squared distance of probability [R] and correctness [R]; NaN without rows."""
    weight = _weights(probabilities, weights)
    distances = (np.asarray(probabilities) - np.asarray(correct, dtype=np.float64)) ** 2
    return float((distances * weight).sum() / weight.sum()) if weight.sum() else float("nan")


def ece(
    correct: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, bins: int = 10
) -> float:
    """Expected calibration error over equal-width bins: sum of share * |accuracy - confidence|."""
    weight, of = _weights(probabilities, weights), _bin(probabilities, bins)
    if weight.sum() == 0:
        return float("nan")
    # share * |accuracy - confidence| = |sum of (correct - probability)| / rows, bin by bin
    gaps = np.bincount(of, weight * (np.asarray(correct, dtype=np.float64) - probabilities), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


@dataclass(frozen=True, kw_only=True)
class Bin:
    """One bar of a reliability diagram."""

    low: float
    high: float
    """Probabilities in [low, high); the last bin holds 1 too."""
    count: int
    confidence: float
    """Mean probability; NaN in an empty bin."""
    accuracy: float
    """Share of right samples; NaN in an empty bin."""


def reliability(correct: np.ndarray, probabilities: np.ndarray, bins: int = 10) -> list[Bin]:
    """The equal-width bins behind `ece`, empty ones included; correct [R], probabilities [R] in [0, 1]."""
    probabilities, correct = np.asarray(probabilities, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    of = _bin(probabilities, bins)
    found = []
    for index in range(bins):
        inside = of == index
        filled = bool(inside.any())
        found.append(
            Bin(
                low=index / bins,
                high=(index + 1) / bins,
                count=int(inside.sum()),
                confidence=float(probabilities[inside].mean()) if filled else float("nan"),
                accuracy=float(correct[inside].mean()) if filled else float("nan"),
            )
        )
    return found


def _bin(probabilities: np.ndarray, bins: int) -> np.ndarray:
    return np.minimum((np.asarray(probabilities, dtype=np.float64) * bins).astype(np.int64), bins - 1)


# --- distributions ---------------------------------------------------------------------------------


def score_histograms(
    correct: np.ndarray, scores: np.ndarray, bins: int = 30
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(edges [bins + 1], counts of right samples [bins], of wrong ones [bins]) over one range of scores.

    correct [R] bool, scores [R]; rows whose score is not finite are left out.
    """
    scores, correct = np.asarray(scores, dtype=np.float64), np.asarray(correct, dtype=bool)
    finite = np.isfinite(scores)
    edges = np.histogram_bin_edges(scores[finite], bins)
    right, wrong = (np.histogram(scores[finite & side], edges)[0] for side in (correct, ~correct))
    return edges, right, wrong


def welch_t_test(right: np.ndarray, wrong: np.ndarray) -> tuple[float, float, float]:
    """(t, degrees of freedom, two-sided p) of equal mean scores with unequal variances.

    NaNs where a class has less than two rows. p is NaN or 0 for scores without any spread.
    It takes the rows as independent. Samples of one problem are not, so p comes out too small: an interval of t
    over problems says more.
    """
    if min(len(right), len(wrong)) < 2:
        return float("nan"), float("nan"), float("nan")
    from scipy import stats  # half a second that a run's start does not wait for

    with np.errstate(divide="ignore", invalid="ignore"):
        found = stats.ttest_ind(right, wrong, equal_var=False)
    return float(found.statistic), float(found.df), float(found.pvalue)


def welch_t_statistic(correct: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], float]:
    """Welch's t of right against wrong scores as a function of how often each row counts ([R] integers)."""
    sides = [np.flatnonzero(correct), np.flatnonzero(~np.asarray(correct, dtype=bool))]

    def statistic(weights: np.ndarray) -> float:
        means, errors = [], []
        for side in sides:
            weight, score = np.asarray(weights[side], dtype=np.float64), scores[side]
            count = weight.sum()
            if count < 2:
                return float("nan")
            mean = (weight * score).sum() / count
            means.append(mean)
            errors.append((weight * (score - mean) ** 2).sum() / (count - 1) / count)
        error = sum(errors) ** 0.5
        return float((means[0] - means[1]) / error) if error else float("nan")

    return statistic
