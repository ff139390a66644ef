"""From the discriminator's logits to rewards (docs/method.md 2): log D - log(1 - D) = the raw logit."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from rairl_ray.config.schema import Eval, Reward
from rairl_ray.config.variants import complete


def unit_rewards(logits_U: np.ndarray, config: Reward, outcome: float | None = None) -> np.ndarray:
    """Rewards of one trace's units: logit / temperature, clipped, plus outcome_weight * outcome on each.

    outcome: the task's own correctness of this trace (0 or 1), for training with `reward.outcome_weight` > 0.
    None gives the learned reward alone: evaluation and reranking must never see the gold answer. Every unit has
    it, as every token has GRPO's: a trace's mean token reward and its last unit's then move by the same
    outcome_weight * outcome, however many tokens and units there are. On the last unit alone it would weigh by
    that unit's share of the tokens. Returns [U] float32.
    """
    rewards = np.asarray(logits_U, dtype=np.float32) / np.float32(config.temperature)
    if config.clip is not None:
        rewards = np.clip(rewards, *config.clip).astype(np.float32)
    return rewards if outcome is None else rewards + np.float32(config.outcome_weight * outcome)


def clipped_count(logits_U: np.ndarray, config: Reward) -> int:
    """Units of one trace whose reward the clip changed; over all units it gives `reward/clipped_share`."""
    if config.clip is None:
        return 0
    scaled = np.asarray(logits_U, dtype=np.float32) / np.float32(config.temperature)
    return int(np.count_nonzero((scaled < config.clip[0]) | (scaled > config.clip[1])))


def trace_score(
    unit_rewards_U: np.ndarray, selector: str, *, discount: float = 0.95, tail_share: float = 0.25
) -> float:
    """The one number of a trace that reranks it (`eval.selector`).

    `discounted` is a weighted mean in which a unit counts `discount` times the one before; `tail` the mean of
    the last `tail_share` of the units, rounded up. Raises ValueError for a trace without units.
    """
    if len(unit_rewards_U) == 0:
        raise ValueError("trace_score: a trace without units has no score")
    values = np.asarray(unit_rewards_U, dtype=np.float64)
    return float(SELECTORS[selector](values, discount, tail_share))


def selected_score(unit_rewards_U: np.ndarray, config: Eval) -> float:
    """`trace_score` as the configuration's section `eval` has it."""
    return trace_score(unit_rewards_U, config.selector, discount=config.discount, tail_share=config.tail_share)


def _discounts(count: int, discount: float) -> np.ndarray:
    """[count] 1, discount, discount^2, ...; a discount of 0 leaves the first unit alone."""
    return discount ** np.arange(count, dtype=np.float64)


SELECTORS: dict[str, Callable[[np.ndarray, float, float], float]] = {
    "mean": lambda values, discount, tail_share: values.mean(),
    "sum": lambda values, discount, tail_share: values.sum(),
    "last": lambda values, discount, tail_share: values[-1],
    "min": lambda values, discount, tail_share: values.min(),
    "discounted": lambda values, discount, tail_share: np.average(
        values, weights=_discounts(len(values), discount)
    ),
    "tail": lambda values, discount, tail_share: values[-max(1, math.ceil(tail_share * len(values))) :].mean(),
}
"""The number of a trace from its unit rewards [U], U >= 1."""
complete(f"{__name__}.SELECTORS", SELECTORS, Eval, "selector")
