"""Choosing among a problem's samples by a score or by votes (docs/method.md 6).

Dimension letters: P problems, N samples of a problem. Ties are given as their expectation, never as one draw.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import comb

import numpy as np

from rairl_ray.evaluation.passing import pass_at_k

# --- by a score ------------------------------------------------------------------------------------


def rerank_at_k(scores: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """[P]: probability that any of the k best-scored samples is right, ties broken at random.

    scores [P, N], higher is better, NaN is worst; correct [P, N].
    """
    scores, correct = _comparable(scores), np.asarray(correct, dtype=bool)
    if scores.shape != correct.shape or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"rerank_at_k: scores {scores.shape}, correct {correct.shape}, k={k} do not fit")
    if len(scores) == 0:
        return np.empty(0)
    last = np.sort(scores, axis=1)[:, -k, None]
    above, tied = scores > last, scores == last
    left = k - above.sum(axis=1)
    values = np.array([pass_at_k(*counts) for counts in zip(
        tied.sum(axis=1).tolist(), (tied & correct).sum(axis=1).tolist(), left.tolist(), strict=True
    )])  # fmt: skip
    return np.where((above & correct).any(axis=1), 1.0, values)


def rerank_curve(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[N]: expected correctness of the best-scored of n samples, n = 1..N, mean over the problems.

    The n samples are drawn without replacement from a problem's N: the sample in place i of the order (from 0)
    is the best of n in C(N-1-i, n-1) of C(N, n) draws, exactly. Samples that tie share their places.
    scores [P, N], higher is better, NaN is worst; correct [P, N]. Raises ValueError for shapes that differ.
    """
    scores, correct = _comparable(scores), np.asarray(correct, dtype=np.float64)
    if scores.shape != correct.shape or scores.size == 0:
        raise ValueError(f"rerank_curve: scores {scores.shape}, correct {correct.shape} do not fit")
    n = scores.shape[1]
    shared = np.array([_mean_of_ties(*problem) for problem in zip(scores, correct, strict=True)])
    best_first = np.take_along_axis(shared, np.argsort(-scores, axis=1, kind="stable"), axis=1)
    places = best_first.mean(axis=0)
    chosen = np.array([[comb(n - 1 - i, k - 1) / comb(n, k) for i in range(n)] for k in range(1, n + 1)])
    return np.asarray(chosen @ places)


def _comparable(scores: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)


def _mean_of_ties(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[N]: each sample's correctness as the mean of those with the same score."""
    _, group = np.unique(scores, return_inverse=True)
    return np.asarray((np.bincount(group, correct) / np.bincount(group))[group])


# --- by votes --------------------------------------------------------------------------------------


def majority_at_n(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Correctness of the most frequent answer among a problem's N samples, expected over ties.

    A sample without an answer (None) does not vote; if none has one, the problem is not solved.
    """
    return _elected(answers, correct, np.ones(len(correct)))


def reward_weighted_majority(
    answers: Sequence[str | None], correct: Sequence[bool], scores: Sequence[float] | np.ndarray
) -> float:
    """Correctness of the answer with the most votes, a vote weighing sigmoid(score), expected over ties.

    sigmoid(score) is the reward's own probability D of an expert trace: never negative, so that no sample votes
    against its answer. A sample without an answer does not vote, and one without a score (NaN) weighs nothing.
    """
    logs = -np.logaddexp(0.0, -_comparable(np.asarray(scores)))
    # Only ratios of weights decide; over the largest they survive scores whose sigmoid is 0 in floating point.
    most = logs.max(initial=-np.inf)
    weights = np.exp(logs - most) if np.isfinite(most) else np.ones(len(logs))
    return _elected(answers, correct, weights)


def _elected(answers: Sequence[str | None], correct: Sequence[bool], weights: np.ndarray) -> float:
    votes: dict[str, list[bool]] = defaultdict(list)
    totals: dict[str, float] = defaultdict(float)
    for answer, right, weight in zip(answers, correct, weights.tolist(), strict=True):
        if answer is not None:
            votes[answer].append(right)
            totals[answer] += weight
    if not votes:
        return 0.0
    # Equal sums must stay a tie after rounding in another order.
    enough = max(totals.values()) * (1 - 1e-9)
    return float(np.mean([np.mean(votes[answer]) for answer, total in totals.items() if total >= enough]))
