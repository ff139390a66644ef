"""Advantages of one group of traces (docs/method.md 4): `sequence`, `discounted`, `loo`.

An expert trace in the group (`advantage.expert`) is an ordinary member here: it takes part in the group's
mean and standard deviation. What is special about it, the ratio of 1, is in policy_losses.py. Nothing is
ever dropped by value: an advantage of exactly 0.0 is data, and lengths alone say what is padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rairl_ray.config.schema import Advantage
from rairl_ray.config.variants import complete

STD_EPSILON = 1e-4


@dataclass(frozen=True)
class Group:
    """The traces of one prompt that have a reward, g of them."""

    rewards: Sequence[np.ndarray]
    """g arrays [T_i] float64: each token's reward."""
    last: np.ndarray
    """[g] float64: the last unit's reward."""

    @property
    def means(self) -> np.ndarray:
        """[g] mean token reward."""
        return np.array([values.mean() for values in self.rewards])


def advantages(
    token_rewards: Sequence[np.ndarray], last_unit_rewards: np.ndarray, config: Advantage
) -> list[np.ndarray]:
    """Token advantages of all traces of ONE prompt, experts included.

    token_rewards: G arrays [T_i], the backfilled rewards. last_unit_rewards [G]: reward of each trace's last
    unit, which sets the baseline of `discounted`. Returns G float32 arrays [T_i].

    - sequence: R_i = mean token reward; A_i = (R_i - mean R) / (std R + 1e-4) on every token.
    - discounted: a_t = (r_t - mean_last) / (std_last + 1e-4); A_t = sum_{k>=t} gamma^(k-t) a_k.
    - loo (PRIME, arXiv 2502.01456, eq. 5): a_t = r_t - mean_{j != i} R_j; A_t as in `discounted`; no std.
    gamma = 0 keeps each token's own a_t. std is the unbiased one (n - 1), as in TRL's GRPO, and 0 for a group
    of one. `normalise: false` subtracts nothing, `scale: false` divides by nothing (`loo` knows neither).
    A trace without tokens, or without a reward (NaN: the discriminator had no unit to score), is in no mean and
    no std and has advantage 0: whatever else it got would be an invented reward.
    """
    rewards = [np.asarray(r, dtype=np.float64) for r in token_rewards]
    group = [i for i, r in enumerate(rewards) if len(r) > 0 and not np.isnan(r).any()]
    known = Group([rewards[i] for i in group], np.asarray(last_unit_rewards, dtype=np.float64)[group])
    result = [np.zeros(len(r)) for r in rewards]
    for i, values in zip(group, ADVANTAGES[config.type](known, config), strict=True):
        result[i] = values
    return [a.astype(np.float32) for a in result]


def _sequence(group: Group, config: Advantage) -> list[np.ndarray]:
    mean, scale = _mean_and_scale(group.means, config)
    return [np.full(len(r), (own - mean) / scale) for r, own in zip(group.rewards, group.means, strict=True)]


def _discounted(group: Group, config: Advantage) -> list[np.ndarray]:
    mean, scale = _mean_and_scale(group.last, config)
    return [discounted_sums((r - mean) / scale, config.gamma) for r in group.rewards]


def _loo(group: Group, config: Advantage) -> list[np.ndarray]:
    others = _mean_of_the_others(group.means)
    return [discounted_sums(r - mean, config.gamma) for r, mean in zip(group.rewards, others, strict=True)]


ADVANTAGES: dict[str, Callable[[Group, Advantage], list[np.ndarray]]] = {
    "sequence": _sequence,
    "discounted": _discounted,
    "loo": _loo,
}
"""g arrays [T_i], the advantages of each trace's tokens."""
complete(f"{__name__}.ADVANTAGES", ADVANTAGES, Advantage, "type")


def discounted_sums(values_T: np.ndarray, gamma: float) -> np.ndarray:
    """A_t = sum_{k>=t} gamma^(k-t) a_k by the backward recursion A_t = a_t + gamma A_{t+1}.

    Dividing by gamma^t instead overflows: 0.9^-5000 is 10^228, beyond float32 after 840 tokens.
    """
    sums = np.empty(len(values_T))
    following = 0.0
    for t in range(len(values_T) - 1, -1, -1):
        following = values_T[t] + gamma * following
        sums[t] = following
    return sums


def _mean_and_scale(values_G: np.ndarray, config: Advantage) -> tuple[float, float]:
    if len(values_G) == 0:
        return 0.0, 1.0
    std = values_G.std(ddof=1) if len(values_G) > 1 else 0.0
    mean = values_G.mean() if config.normalise else 0.0
    return float(mean), float(std + STD_EPSILON) if config.scale else 1.0


def _mean_of_the_others(values_G: np.ndarray) -> np.ndarray:
    """[G]; 0 for a group of one, which has no others."""
    return (values_G.sum() - values_G) / max(len(values_G) - 1, 1)
