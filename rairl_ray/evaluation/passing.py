"""How often samples are right, whoever chooses among them (docs/method.md 6).

Dimension letters: P problems, N samples of a problem. Whatever depends on a random choice is given as its
expectation, never as one draw.
"""

from __future__ import annotations

from math import comb

import numpy as np


def pass_at_k(n: int, m: int, k: int) -> float:
    """Probability that k of n samples, drawn without replacement, contain one of the m correct ones.

    The unbiased estimator 1 - C(n-m, k) / C(n, k) of Chen et al. (arXiv 2107.03374), in exact integers.
    """
    if not (1 <= k <= n and 0 <= m <= n):
        raise ValueError(f"pass_at_k needs 1 <= k <= n and 0 <= m <= n, not n={n}, m={m}, k={k}")
    return 1.0 - comb(n - m, k) / comb(n, k)


def oracle_at_n(correct: np.ndarray) -> np.ndarray:
    """[P]: whether any of the samples is right; correct [P, N]."""
    return np.asarray(correct, dtype=bool).max(axis=1, initial=False).astype(np.float64)


def oracle_curve(correct: np.ndarray) -> np.ndarray:
    """[N]: pass@n over the problems, n = 1..N: what no choice among n samples can exceed; correct [P, N]."""
    correct = np.asarray(correct, dtype=bool)
    n = correct.shape[1]
    problems = np.bincount(correct.sum(axis=1), minlength=n + 1) / max(1, len(correct))
    passed = np.array([[pass_at_k(n, m, k) for m in range(n + 1)] for k in range(1, n + 1)])
    return np.asarray(passed.reshape(n, n + 1) @ problems)


def random_at_1(correct: np.ndarray) -> np.ndarray:
    """[P]: expectation of picking one sample at random; correct [P, N]."""
    return np.asarray(np.asarray(correct, dtype=np.float64).mean(axis=1))
