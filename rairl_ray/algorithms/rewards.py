"""From the discriminator's logits to rewards (METHOD 2): reward = log D - log(1 - D) = the raw logit."""

from __future__ import annotations

from typing import Literal

import numpy as np

from rairl_ray.config.schema import Reward

Selector = Literal["mean", "sum", "last", "min"]


def unit_rewards(logits_U: np.ndarray, config: Reward, outcome: float | None = None) -> np.ndarray:
    """Rewards of one trace's units: logit / temperature, clipped, plus the outcome on the last unit.

    outcome: the task's own correctness of this trace (0 or 1), for training with `reward.outcome_weight` > 0.
    None gives the learned reward alone: evaluation and reranking must never see the gold answer.
    Returns [U] float32.
    """
    rewards = np.asarray(logits_U, dtype=np.float32) / np.float32(config.temperature)
    if config.clip is not None:
        rewards = np.clip(rewards, *config.clip).astype(np.float32)
    if outcome is not None and len(rewards) > 0:
        rewards[-1] += np.float32(config.outcome_weight * outcome)
    return rewards


def clipped_count(logits_U: np.ndarray, config: Reward) -> int:
    """Units of one trace whose reward the clip changed; over all units it gives `reward/clipped_share`."""
    if config.clip is None:
        return 0
    scaled = np.asarray(logits_U, dtype=np.float32) / np.float32(config.temperature)
    return int(np.count_nonzero((scaled < config.clip[0]) | (scaled > config.clip[1])))


def trace_score(unit_rewards_U: np.ndarray, selector: Selector) -> float:
    """The one number of a trace that reranks it (`eval.selector`)."""
    if len(unit_rewards_U) == 0:
        raise ValueError("trace_score: a trace without units has no score")
    values = np.asarray(unit_rewards_U, dtype=np.float64)
    by_selector = {"mean": values.mean(), "sum": values.sum(), "min": values.min(), "last": values[-1]}
    return float(by_selector[selector])
