"""Numbers of an evaluation (METHOD 6): pure functions of arrays, with 95% bootstrap intervals over problems.

Dimension letters: P problems, N samples of a problem, R = rows of all problems together. Whatever depends
on a random choice (a tie, a random sample) is given as its expectation, never as one draw.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from math import comb

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.keys import keyed_generator

Summary = dict[str, dict[str, float]]

# --- one number a problem --------------------------------------------------------------------------


def pass_at_k(n: int, m: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, contain one of the m correct ones.

    The unbiased estimator 1 - C(n-m, k) / C(n, k) of Chen et al. (arXiv 2107.03374), in exact integers.
    """
    if not (1 <= k <= n and 0 <= m <= n):
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= m <= n, not n={n}, m={m}, k={k}")
    return 1.0 - comb(n - m, k) / comb(n, k)


def majority_at_n(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Correctness of the most frequent answer among a problem's N samples, expected over ties.

    A sample without an answer (None) does not vote; if none has one, the problem is not solved.
    """
    votes: dict[str, list[bool]] = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            votes[answer].append(right)
    if not votes:
        return 0.0
    most = max(len(group) for group in votes.values())
    return float(np.mean([np.mean(group) for group in votes.values() if len(group) == most]))


def oracle_at_n(correct: np.ndarray) -> np.ndarray:
    """[P]: whether any of the samples is right; correct [P, N]."""
    return np.asarray(correct, dtype=bool).max(axis=1, initial=False).astype(np.float64)


def random_at_1(correct: np.ndarray) -> np.ndarray:
    """[P]: expectation of picking one sample at random; correct [P, N]."""
    return np.asarray(np.asarray(correct, dtype=np.float64).mean(axis=1))


def rerank_at_k(scores: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """[P]: probability that any of the k best-scored samples is right, ties broken at random.

    scores [P, N], higher is better, NaN is worst; correct [P, N].
    """
    scores = np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    correct = np.asarray(correct, dtype=bool)
    if scores.shape != correct.shape or not 1 <= k <= scores.shape[1]:
        raise ValueError(f"rerank_at_k: scores {scores.shape}, correct {correct.shape}, k={k} do not fit")
    values = np.empty(len(scores))
    for problem, (score, right) in enumerate(zip(scores, correct, strict=True)):
        last = np.sort(score)[-k]
        above, tied = score > last, score == last
        if right[above].any():
            values[problem] = 1.0
        else:
            values[problem] = pass_at_k(int(tied.sum()), int(right[tied].sum()), k - int(above.sum()))
    return values


# --- one number for all rows -----------------------------------------------------------------------


def auroc(correct: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Probability that a right sample scores above a wrong one, ties counting half (Mann-Whitney).

    correct [R] bool, scores [R] (rows with NaN are left out), weights [R]. NaN where a class is missing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    scored = ~np.isnan(scores)
    weight = np.ones(len(scores)) if weights is None else np.asarray(weights, dtype=np.float64)
    positive = (np.asarray(correct, dtype=np.float64) * weight)[scored]
    negative = weight[scored] - positive
    distinct, group = np.unique(scores[scored], return_inverse=True)
    positive = np.bincount(group, positive, minlength=len(distinct))
    negative = np.bincount(group, negative, minlength=len(distinct))
    pairs = positive.sum() * negative.sum()
    if pairs == 0:
        return float("nan")
    return float(positive @ (np.cumsum(negative) - negative / 2) / pairs)


def auroc_within(correct: np.ndarray, scores: np.ndarray, problems: np.ndarray) -> np.ndarray:
    """[P]: AUROC among the samples of each problem, NaN where all are right or all wrong.

    Free of what pooled AUROC owes to easy and hard problems. problems [R]: integers 0..P-1.
    """
    problems = np.asarray(problems)
    members = [problems == problem for problem in range(int(problems.max(initial=-1)) + 1)]
    return np.array([auroc(correct[rows], scores[rows]) for rows in members])


def brier(correct: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Mean squared distance of probability [R] and correctness [R]."""
    return _mean((np.asarray(probabilities) - np.asarray(correct, dtype=np.float64)) ** 2, weights)


def ece(
    correct: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None, bins: int = 10
) -> float:
    """Expected calibration error over equal-width bins: sum of share * |accuracy - confidence|."""
    probabilities = np.asarray(probabilities, dtype=np.float64)
    weight = np.ones(len(probabilities)) if weights is None else np.asarray(weights, dtype=np.float64)
    if weight.sum() == 0:
        return float("nan")
    of = np.minimum((probabilities * bins).astype(np.int64), bins - 1)
    # share * |accuracy - confidence| = |sum of (correct - probability)| / rows, bin by bin
    gaps = np.bincount(of, weight * (np.asarray(correct, dtype=np.float64) - probabilities), minlength=bins)
    return float(np.abs(gaps).sum() / weight.sum())


def sigmoid(values: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * np.asarray(values, dtype=np.float64)))


# --- intervals -------------------------------------------------------------------------------------


def bootstrap(
    values_by_problem: Sequence[float] | np.ndarray, n: int, key: tuple[object, ...]
) -> tuple[float, float, float]:
    """(mean, low, high): 95% percentile interval over problems from n resamples, keyed.

    Problems with NaN are left out; NaNs if no problem is left.
    """
    values = np.asarray(values_by_problem, dtype=np.float64)
    values = values[~np.isnan(values)]
    return bootstrap_statistic(lambda counts: _mean(values, counts), len(values), n, key)


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float], problems: int, n: int, key: tuple[object, ...]
) -> tuple[float, float, float]:
    """Like `bootstrap` for any statistic of how often each problem counts ([P] integers)."""
    if problems == 0:
        return float("nan"), float("nan"), float("nan")
    value = statistic(np.ones(problems))
    draws = np.array([statistic(counts) for counts in _resamples(problems, n, key)])
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return value, float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return value, float(low), float(high)


def _resamples(problems: int, n: int, key: tuple[object, ...]) -> Iterator[np.ndarray]:
    generator = keyed_generator(*key, "bootstrap", problems)
    for _ in range(n):
        yield np.bincount(generator.integers(0, problems, problems), minlength=problems)


def _mean(values: np.ndarray, weights: np.ndarray | None) -> float:
    if weights is None:
        return float(values.mean()) if len(values) else float("nan")
    return float(values @ weights / weights.sum()) if weights.sum() else float("nan")


# --- the summary of an evaluation ------------------------------------------------------------------


def summarise(
    rows: Sequence[EvalRow], *, k: Sequence[int] = (1,), resamples: int = 1000, key: tuple[object, ...] = ()
) -> Summary:
    """Metric name -> {"value", "low", "high", "n"}; n counts the problems behind the number.

    N of `majority_at_N` and its like is the largest number of samples of a problem. Problems with fewer
    (a failed group) are left out there, and a problem with fewer than k samples is left out of pass@k.
    Raises ValueError for two rows of one problem with one generation_idx.
    """
    problems: dict[str, list[EvalRow]] = defaultdict(list)
    for row in rows:
        problems[row.prompt_id].append(row)
    for prompt_id, group in problems.items():
        twice = [index for index, count in Counter(row.generation_idx for row in group).items() if count > 1]
        if twice:
            raise ValueError(f"problem {prompt_id} has generation_idx {twice[0]} more than once")
    groups = list(problems.values())
    if not groups:
        return {}
    per_problem = _per_problem(groups, k)
    summary = {name: _entry(bootstrap(values, resamples, key), values) for name, values in per_problem.items()}
    return summary | _calibration(groups, resamples, key)


def _per_problem(groups: list[list[EvalRow]], k: Sequence[int]) -> dict[str, np.ndarray]:
    """Metric name -> one value for each problem that it can be told of."""
    right = [sum(row.correct for row in group) for group in groups]
    values: dict[str, np.ndarray] = {}
    for size in sorted({1, *k}):
        large = [(len(group), m) for group, m in zip(groups, right, strict=True) if len(group) >= size]
        if large:
            values[names.EVAL_PASS_AT.format(k=size)] = np.array([pass_at_k(n, m, size) for n, m in large])

    n = max(len(group) for group in groups)
    full = [group for group in groups if len(group) == n]
    correct = np.array([[row.correct for row in group] for group in full])
    tokens = np.array([[row.tokens for row in group] for group in full], dtype=np.float64)
    values[names.EVAL_RANDOM_AT_1] = random_at_1(correct)
    values[names.EVAL_ORACLE_AT.format(n=n)] = oracle_at_n(correct)
    values[names.EVAL_MAJORITY_AT.format(n=n)] = np.array(
        [majority_at_n([row.extracted for row in group], [row.correct for row in group]) for group in full]
    )
    values[names.EVAL_SHORTEST_AT_1] = rerank_at_k(-tokens, correct, 1)
    values[names.EVAL_LONGEST_AT_1] = rerank_at_k(tokens, correct, 1)
    scores = _scores([row for group in full for row in group]).reshape(correct.shape)
    if not np.isnan(scores).all():
        values[names.EVAL_RERANK_AT_1] = rerank_at_k(scores, correct, 1)

    def share(of: Callable[[EvalRow], float]) -> np.ndarray:
        return np.array([np.mean([of(row) for row in group]) for group in groups])

    values[names.EVAL_FORMAT] = share(lambda row: row.format_ok)
    values[names.EVAL_TRUNCATED] = share(lambda row: row.finish_reason == "length")
    values[names.EVAL_COMPLETION_TOKENS] = share(lambda row: row.tokens)
    return values


def _calibration(groups: list[list[EvalRow]], resamples: int, key: tuple[object, ...]) -> Summary:
    """How the reward tells right from wrong: AUROC pooled and within problems, ECE and Brier of its sigmoid."""
    rows = [row for group in groups for row in group]
    problem = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    correct, scores = np.array([row.correct for row in rows]), _scores(rows)
    scored = ~np.isnan(scores)
    if not scored.any():
        return {}
    problem, correct, scores = problem[scored], correct[scored], scores[scored]
    kept, problem = np.unique(problem, return_inverse=True)
    probabilities = sigmoid(scores)
    pooled: dict[str, Callable[[np.ndarray], float]] = {
        names.DISCRIMINATOR_AUROC: lambda weights: auroc(correct, scores, weights),
        names.DISCRIMINATOR_ECE: lambda weights: ece(correct, probabilities, weights),
        names.DISCRIMINATOR_BRIER: lambda weights: brier(correct, probabilities, weights),
    }
    within = auroc_within(correct, scores, problem)
    summary = {names.DISCRIMINATOR_AUROC_WITHIN: _entry(bootstrap(within, resamples, key), within)}
    for name, statistic in pooled.items():
        interval = bootstrap_statistic(
            lambda counts, of=statistic: of(counts[problem]),  # type: ignore[misc]
            len(kept),
            resamples,
            key,
        )
        summary[name] = _entry(interval, np.zeros(len(kept)))
    return summary


def _scores(rows: Sequence[EvalRow]) -> np.ndarray:
    return np.array([np.nan if row.score is None else row.score for row in rows], dtype=np.float64)


def _entry(interval: tuple[float, float, float], values: np.ndarray) -> dict[str, float]:
    value, low, high = interval
    return {"value": value, "low": low, "high": high, "n": int(np.count_nonzero(~np.isnan(values)))}
