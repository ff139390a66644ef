"""95% percentile intervals over problems, from keyed resamples (docs/method.md 6).

Problems are resampled, never samples: eight samples of one problem say less than those of eight problems.
Dimension letters: P problems, B resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from rairl_ray.keys import keyed_generator

Summary = dict[str, dict[str, float]]
"""Metric name -> {"value", "low", "high", "n"}."""

Interval = tuple[float, float, float]

BLOCK = 4_000_000
"""Counts that resamples hold at a time (16 MB): memory does not grow with the problems."""


def bootstrap(values_by_problem: Sequence[float] | np.ndarray, n: int, key: tuple[object, ...]) -> Interval:
    """(mean, low, high): 95% percentile interval over problems from n resamples, keyed.

    Problems with NaN are left out; NaNs if no problem is left.
    """
    values = np.asarray(values_by_problem, dtype=np.float64)
    values = values[~np.isnan(values)]
    if len(values) == 0:
        return float("nan"), float("nan"), float("nan")
    return interval(float(values.mean()), resampled_sums(values, n, key) / len(values))


def bootstrap_statistic(
    statistic: Callable[[np.ndarray], float], problems: int, n: int, key: tuple[object, ...]
) -> Interval:
    """Like `bootstrap` for any statistic of how often each problem counts ([P] integers)."""
    if problems == 0:
        return float("nan"), float("nan"), float("nan")
    draws = np.array([statistic(counts) for block in _blocks(problems, n, key) for counts in block])
    return interval(statistic(np.ones(problems)), draws)


def interval(value: float, draws: np.ndarray) -> Interval:
    """(value, low, high) from a statistic's values [B] on resamples; those without one (NaN) are left out."""
    draws = draws[~np.isnan(draws)]
    if len(draws) == 0:
        return value, float("nan"), float("nan")
    low, high = np.percentile(draws, [2.5, 97.5])
    return value, float(low), float(high)


def resampled_sums(values: np.ndarray, n: int, key: tuple[object, ...]) -> np.ndarray:
    """[B, ...]: the sum of values [P, ...] over the problems of each of n resamples."""
    return np.concatenate([block @ values for block in _blocks(len(values), n, key)])


def _blocks(problems: int, n: int, key: tuple[object, ...]) -> Iterator[np.ndarray]:
    """[<= B, P] how often each problem counts in each of n resamples, in blocks of bounded size."""
    most = max(1, BLOCK // max(1, problems))
    for first in range(0, n, most):
        yield _block(problems, min(most, n - first), (*key, "bootstrap", problems, *([first] if first else [])))


@lru_cache(maxsize=4)
def _block(problems: int, n: int, key: tuple[object, ...]) -> np.ndarray:
    """Kept, since many metrics share it."""
    generator = keyed_generator(*key)
    draws = [np.bincount(generator.integers(0, problems, problems), minlength=problems) for _ in range(n)]
    return np.array(draws, dtype=np.int32)


def entry(numbers: Interval, n: int) -> dict[str, float]:
    """One metric of a summary; n: the problems (or traces) behind the number."""
    value, low, high = numbers
    return {"value": value, "low": low, "high": high, "n": n}


def mean_entry(values: np.ndarray, n: int, key: tuple[object, ...]) -> dict[str, float]:
    """`bootstrap` of one value a problem as a metric of a summary; problems with NaN do not count."""
    return entry(bootstrap(values, n, key), int(np.count_nonzero(~np.isnan(values))))
