"""Rewards from logits (docs/method.md 2)."""

from __future__ import annotations

import numpy as np
import pytest

from rairl_ray.algorithms.advantages import advantages
from rairl_ray.algorithms.density import backfill, unit_tokens
from rairl_ray.algorithms.rewards import clipped_count, trace_score, unit_rewards
from rairl_ray.config.schema import Advantage, Density, Reward


def test_the_reward_is_log_d_minus_log_one_minus_d() -> None:
    logits = np.array([-3.0, 0.0, 2.5], dtype=np.float32)
    d = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(unit_rewards(logits, Reward()), np.log(d) - np.log(1 - d), atol=1e-6)


def test_temperature_comes_before_the_clip() -> None:
    logits = np.array([-30.0, 4.0, 12.0], dtype=np.float32)
    config = Reward(temperature=2.0, clip=(-5.0, 5.0))
    assert unit_rewards(logits, config).tolist() == [-5.0, 2.0, 5.0]
    assert clipped_count(logits, config) == 2
    assert clipped_count(logits, Reward()) == 0


def test_the_outcome_is_mixed_into_every_unit_and_only_if_asked() -> None:
    logits = np.array([1.0, 2.0], dtype=np.float32)
    mixed = Reward(outcome_weight=3.0, clip=(-5.0, 5.0))
    assert unit_rewards(logits, mixed, 1.0).tolist() == [4.0, 5.0]
    assert unit_rewards(logits, mixed, 0.0).tolist() == [1.0, 2.0]
    assert unit_rewards(logits, mixed, None).tolist() == [1.0, 2.0]
    assert unit_rewards(logits, Reward(), 1.0).tolist() == [1.0, 2.0]
    assert logits.tolist() == [1.0, 2.0], "the scores themselves stay as they were"


@pytest.mark.parametrize("kind", ["sequence", "discounted", "loo"])
def test_the_outcome_weighs_the_same_in_every_density_and_length(kind: str) -> None:
    """Without a learned reward it is GRPO's: all tokens of a trace carry weight * outcome."""
    outcomes, lengths, config = [1.0, 0.0, 1.0, 0.0], [3, 9, 50, 17], Advantage(type=kind, gamma=0.9)
    expected = advantages(
        [np.full(n, 2.0 * o) for n, o in zip(lengths, outcomes, strict=True)], 2.0 * np.array(outcomes), config
    )
    for density in ("sparse", "interval", "partial", "dense"):
        tokens, lasts = [], []
        for length, outcome in zip(lengths, outcomes, strict=True):
            text, ends = ("1+1=2\n" * 9)[: length - 1], [*range(1, length), length]
            units = unit_tokens(text, ends, Density(type=density, every=4))
            rewards = unit_rewards(np.zeros(len(units), np.float32), Reward(outcome_weight=2.0), outcome)
            tokens.append(backfill(np.asarray(ends)[units], rewards, ends))
            lasts.append(rewards[-1])
        found = advantages(tokens, np.array(lasts), config)
        assert [a.tolist() for a in found] == [a.tolist() for a in expected], density


@pytest.mark.parametrize(("selector", "expected"), [("mean", 1.0), ("sum", 3.0), ("last", 4.0), ("min", -2.0)])
def test_selectors(selector: str, expected: float) -> None:
    assert trace_score(np.array([1.0, -2.0, 4.0]), selector) == expected  # type: ignore[arg-type]


def test_no_units_no_score() -> None:
    with pytest.raises(ValueError, match="without units"):
        trace_score(np.zeros(0), "mean")


def test_discounted_and_tail_selectors() -> None:
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    weights = 0.5 ** np.arange(5)
    assert trace_score(values, "discounted", discount=0.5) == pytest.approx(
        (values * weights).sum() / weights.sum()
    )
    assert trace_score(values, "discounted", discount=1.0) == pytest.approx(values.mean())
    assert trace_score(values, "discounted", discount=0.0) == 1.0
    assert trace_score(values, "tail", tail_share=0.25) == pytest.approx(12.0)  # the last two of five
    assert trace_score(values, "tail", tail_share=0.2) == 16.0
    assert trace_score(values, "tail", tail_share=1.0) == pytest.approx(values.mean())
