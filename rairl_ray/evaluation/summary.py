"""The summary of an evaluation: every number of docs/method.md 6 with its 95% interval over problems.

Dimension letters: P problems, N samples of a problem, R = rows of all problems together.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.algorithms.rewards import SELECTORS, trace_score
from rairl_ray.config.schema import RunConfig
from rairl_ray.evaluation.bootstrap import Summary, bootstrap_statistic, entry, mean_entry
from rairl_ray.evaluation.calibration import (
    auroc_statistic,
    auroc_within,
    brier,
    ece,
    sigmoid,
    welch_t_statistic,
    welch_t_test,
)
from rairl_ray.evaluation.passing import oracle_at_n, pass_at_k, random_at_1
from rairl_ray.evaluation.reranking import majority_at_n, rerank_at_k, reward_weighted_majority
from rairl_ray.evaluation.rows import EvalRow

LENGTH_STRATA = 10
"""Deciles of the completion's tokens, within which `calibration/auroc_within_length` compares."""

_ILLEGAL = re.compile(r"[^\w.\-: ]")

Groups = list[list[EvalRow]]
"""[P][<= N] rows by problem."""


def summarise_as(config: RunConfig, rows: Sequence[EvalRow]) -> Summary:
    """`summarise` with the settings of a configuration's section `eval`, its draws keyed by the run's seed."""
    settings = config.eval
    return summarise(
        rows,
        k=settings.k,
        resamples=settings.bootstrap,
        key=(config.seed, "eval"),
        discount=settings.discount,
        tail_share=settings.tail_share,
    )


def summarise(
    rows: Sequence[EvalRow],
    *,
    k: Sequence[int] = (1,),
    resamples: int = 1000,
    key: tuple[object, ...] = (),
    discount: float = 0.95,
    tail_share: float = 0.25,
) -> Summary:
    """Metric name -> {"value", "low", "high", "n"}; n counts the problems behind the number.

    N of `majority_at_N` and its like is the largest number of samples of a problem. Problems with fewer
    (a failed group) are left out there, and a problem with fewer than k samples is left out of pass@k.
    discount, tail_share: of the selectors `discounted` and `tail`, as in the configuration's section `eval`.
    Raises ValueError for two rows of one problem with one generation_idx.
    """
    groups = by_problem(rows)
    if not groups:
        return {}
    full = [group for group in groups if len(group) == max(map(len, groups))]
    values = (
        _passing(groups, k)
        | _choices(full)
        | _by_reward(full, k, discount, tail_share)
        | _row_means(groups)
        | _categories(groups)
    )
    summary = {name: mean_entry(numbers, resamples, key) for name, numbers in values.items()}
    return summary | _calibration(groups, resamples, key)


def by_problem(rows: Sequence[EvalRow]) -> Groups:
    """The samples of each problem. Raises ValueError for two rows of one problem with one generation_idx."""
    problems: dict[str, list[EvalRow]] = defaultdict(list)
    for row in rows:
        problems[row.prompt_id].append(row)
    for prompt_id, group in problems.items():
        twice = [index for index, count in Counter(row.generation_idx for row in group).items() if count > 1]
        if twice:
            raise ValueError(f"problem {prompt_id} has generation_idx {twice[0]} more than once")
    return list(problems.values())


# --- one value a problem ---------------------------------------------------------------------------


def _passing(groups: Groups, k: Sequence[int]) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {}
    for size in sorted({1, *k}):
        counts = [(len(group), sum(row.correct for row in group)) for group in groups if len(group) >= size]
        if counts:
            values[names.EVAL_PASS_AT.format(k=size)] = np.array([pass_at_k(n, m, size) for n, m in counts])
    return values


def _choices(full: Groups) -> dict[str, np.ndarray]:
    """Choosing without the reward: what a reranker has to beat."""
    n, correct = len(full[0]), _correct(full)
    tokens = _table(full, lambda row: row.tokens)
    majority = [
        majority_at_n([row.extracted for row in group], [row.correct for row in group]) for group in full
    ]
    values = {
        names.EVAL_RANDOM_AT_1: random_at_1(correct),
        names.EVAL_ORACLE_AT.format(n=n): oracle_at_n(correct),
        names.EVAL_MAJORITY_AT.format(n=n): np.array(majority),
        names.EVAL_SHORTEST_AT_1: rerank_at_k(-tokens, correct, 1),
        names.EVAL_LONGEST_AT_1: rerank_at_k(tokens, correct, 1),
    }
    known = [group for group in full if all(row.policy_logprobs is not None for row in group)]
    if known:
        likely = _table(known, lambda row: _mean(row.policy_logprobs or ()))
        values[names.EVAL_LOGPROB_AT_1] = rerank_at_k(likely, _correct(known), 1)
    return values


def _by_reward(full: Groups, k: Sequence[int], discount: float, tail_share: float) -> dict[str, np.ndarray]:
    """Choosing by the reward: the evaluation's own selector, its votes, then every selector."""
    n, correct = len(full[0]), _correct(full)
    values: dict[str, np.ndarray] = {}
    scores = _table(full, _score)
    if not np.isnan(scores).all():
        votes = [
            reward_weighted_majority(*_answers(group), score) for group, score in zip(full, scores, strict=True)
        ]
        values[names.EVAL_RERANK_AT_1] = rerank_at_k(scores, correct, 1)
        values[names.EVAL_WEIGHTED_MAJORITY_AT.format(n=n)] = np.array(votes)
    if not any(row.unit_scores for group in full for row in group):
        return values

    def select(row: EvalRow, selector: str) -> float:
        units = np.asarray(row.unit_scores or (), dtype=np.float64)
        return trace_score(units, selector, discount=discount, tail_share=tail_share) if len(units) else np.nan

    for selector in SELECTORS:
        scores = _table(full, lambda row, selector=selector: select(row, selector))  # type: ignore[misc]
        for size in sorted({1, *k}):
            if size <= n:
                name = names.EVAL_RERANK_AT.format(selector=selector, k=size, n=n)
                values[name] = rerank_at_k(scores, correct, size)
    return values


ROW_MEANS: dict[str, Callable[[EvalRow], float]] = {
    names.EVAL_FORMAT: lambda row: row.format_ok,
    names.EVAL_TRUNCATED: lambda row: row.finish_reason == "length",
    names.EVAL_COMPLETION_TOKENS: lambda row: row.tokens,
}
"""Metric -> its value of one sample; the summary has the mean over problems of the mean over their samples."""


def _row_means(groups: Groups) -> dict[str, np.ndarray]:
    def mean(of: Callable[[EvalRow], float]) -> np.ndarray:
        return np.array([_mean([of(row) for row in group]) for group in groups])

    return {name: mean(of) for name, of in ROW_MEANS.items()}


def _categories(groups: Groups) -> dict[str, np.ndarray]:
    """pass@1 of the problems of each `metadata["category"]`, in alphabetical order."""
    categories: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        category = group[0].metadata.get("category")
        if category is not None:
            name = names.EVAL_CATEGORY_PASS_AT_1.format(category=legal_category(str(category)))
            categories[name].append(_mean([row.correct for row in group]))
    return {name: np.array(values) for name, values in sorted(categories.items())}


def legal_category(category: str) -> str:
    """A category as part of a metric's name: what MLflow refuses becomes `_`, and so does a slash."""
    text = _ILLEGAL.sub("_", category.strip())
    return text if text.strip(".") else f"_{text}"


# --- one value of all rows -------------------------------------------------------------------------


def _calibration(groups: Groups, resamples: int, key: tuple[object, ...]) -> Summary:
    """How the score tells right from wrong: AUROC, pooled and controlled, and its sigmoid as a probability."""
    groups = [[row for row in group if not np.isnan(_score(row))] for group in groups]
    groups = [group for group in groups if group]
    if not groups:
        return {}
    rows = [row for group in groups for row in group]
    problem = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    correct, scores = np.array([row.correct for row in rows]), np.array([_score(row) for row in rows])
    probabilities = sigmoid(scores)
    length = _quantile_strata(np.array([row.tokens for row in rows]), LENGTH_STRATA)
    form = np.array([int(row.format_ok) for row in rows])
    pooled: dict[str, Callable[[np.ndarray], float]] = {
        names.CALIBRATION_AUROC: auroc_statistic(correct, scores),
        names.CALIBRATION_AUROC_LENGTH: auroc_statistic(correct, scores, length),
        names.CALIBRATION_AUROC_FORMAT: auroc_statistic(correct, scores, form),
        names.CALIBRATION_ECE: lambda weights: ece(correct, probabilities, weights),
        names.CALIBRATION_BRIER: lambda weights: brier(correct, probabilities, weights),
        names.CALIBRATION_T: welch_t_statistic(correct, scores),
    }
    within = auroc_within(correct, scores, problem)
    summary = {names.CALIBRATION_AUROC_WITHIN: mean_entry(within, resamples, key)}
    for name, statistic in pooled.items():
        numbers = bootstrap_statistic(
            lambda counts, of=statistic: of(counts[problem]),  # type: ignore[misc]
            len(groups),
            resamples,
            key,
        )
        summary[name] = entry(numbers, len(groups))
    # A p-value is a statement about chance itself: an interval around it says nothing.
    p = welch_t_test(scores[correct], scores[~correct])[2]
    return summary | {names.CALIBRATION_P: {"value": p, "n": len(groups)}}


def _quantile_strata(values: np.ndarray, count: int) -> np.ndarray:
    """[R] 0..count-1: the quantile each value falls into; equal values share one."""
    edges = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    return np.asarray(np.searchsorted(edges, values, side="right"))


# --- rows as arrays --------------------------------------------------------------------------------


def _table(groups: Groups, of: Callable[[EvalRow], float]) -> np.ndarray:
    """[P, N] float64, one value a row of groups that are equally large."""
    return np.array([[of(row) for row in group] for group in groups], dtype=np.float64)


def _correct(groups: Groups) -> np.ndarray:
    return np.array([[row.correct for row in group] for group in groups])


def _answers(group: list[EvalRow]) -> tuple[list[str | None], list[bool]]:
    return [row.extracted for row in group], [row.correct for row in group]


def _score(row: EvalRow) -> float:
    return np.nan if row.score is None else row.score


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
