"""Advantages of a group (docs/method.md 4) against plain loops."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rairl_ray.algorithms.advantages import advantages
from rairl_ray.config.schema import Advantage

rewards = st.floats(-20, 20, width=32)
groups = st.lists(st.lists(rewards, min_size=1, max_size=12), min_size=2, max_size=6)


def call(group: list[list[float]], config: Advantage, lasts: list[float] | None = None) -> list[list[float]]:
    arrays = [np.array(r, dtype=np.float32) for r in group]
    last = np.array([r[-1] if r else 0.0 for r in group] if lasts is None else lasts, dtype=np.float32)
    return [a.tolist() for a in advantages(arrays, last, config)]


def close(actual: list[list[float]], expected: list[list[float]]) -> None:
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=2e-4, atol=2e-4)


def naive_returns(values: list[float], gamma: float) -> list[float]:
    """The sum as written: A_t = sum_{k >= t} gamma^(k - t) a_k, with 0^0 = 1."""
    n = len(values)
    return [math.fsum(gamma ** (k - t) * values[k] for k in range(t, n)) for t in range(n)]


@given(groups, st.booleans(), st.booleans())
def test_sequence(group: list[list[float]], normalise: bool, scale: bool) -> None:
    means = [statistics.fmean(r) for r in group]
    mean = statistics.fmean(means) if normalise else 0.0
    std = statistics.stdev(means) + 1e-4 if scale else 1.0
    expected = [[(m - mean) / std] * len(r) for m, r in zip(means, group, strict=True)]
    close(call(group, Advantage(type="sequence", normalise=normalise, scale=scale)), expected)


def test_one_reward_a_trace_gives_the_grpo_advantage_as_trl_writes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards_PG = torch.rand(5, 8, generator=generator)
    expected = (rewards_PG - rewards_PG.mean(1, keepdim=True)) / (rewards_PG.std(1, keepdim=True) + 1e-4)
    for row, wanted in zip(rewards_PG, expected, strict=True):
        close(call([[float(r)] for r in row], Advantage(type="sequence")), [[float(w)] for w in wanted])


@given(groups, st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.booleans(), st.booleans())
def test_discounted(group: list[list[float]], gamma: float, normalise: bool, scale: bool) -> None:
    lasts = [r[-1] for r in group]
    mean = statistics.fmean(lasts) if normalise else 0.0
    std = statistics.stdev(lasts) + 1e-4 if scale else 1.0
    expected = [naive_returns([(x - mean) / std for x in r], gamma) for r in group]
    config = Advantage(type="discounted", gamma=gamma, normalise=normalise, scale=scale)
    for a, e in zip(call(group, config), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-3, atol=1e-3 * max(1.0, *map(abs, e)))


@given(groups, st.sampled_from([0.0, 0.9, 1.0]))
def test_loo(group: list[list[float]], gamma: float) -> None:
    means = [statistics.fmean(r) for r in group]
    expected = []
    for i, r in enumerate(group):
        baseline = statistics.fmean([m for j, m in enumerate(means) if j != i])
        expected.append(naive_returns([x - baseline for x in r], gamma))
    for a, e in zip(call(group, Advantage(type="loo", gamma=gamma)), expected, strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-3)


def test_gamma_zero_keeps_each_tokens_own_advantage() -> None:
    group = [[1.0, 5.0, 2.0], [0.0, 0.0]]
    a = call(group, Advantage(type="discounted", gamma=0.0, normalise=False, scale=False))
    assert a == group


def test_the_baseline_of_discounted_is_the_last_unit_not_the_last_token() -> None:
    """They differ where the policy's tokens and the discriminator's units do not align."""
    config = Advantage(type="discounted", gamma=0.0, scale=False)
    assert call([[1.0, 1.0], [3.0]], config, lasts=[10.0, 20.0]) == [[-14.0, -14.0], [-12.0]]


@pytest.mark.parametrize("kind", ["sequence", "discounted", "loo"])
def test_a_group_of_one_is_finite(kind: str) -> None:
    (a,) = call([[2.0, 4.0]], Advantage(type=kind))
    assert np.isfinite(a).all()
    if kind == "sequence":
        assert a == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["sequence", "discounted", "loo"])
def test_an_empty_completion_changes_nothing_for_the_others(kind: str) -> None:
    config = Advantage(type=kind)
    with_empty = call([[1.0, 2.0], [], [5.0]], config, lasts=[2.0, 99.0, 5.0])
    assert with_empty[1] == []
    assert [with_empty[0], with_empty[2]] == call([[1.0, 2.0], [5.0]], config)


def test_an_expert_in_the_group_shifts_its_mean_and_std() -> None:
    samples, expert = [[0.0], [1.0]], [[11.0]]
    alone = call(samples, Advantage(type="sequence"))
    together = call(samples + expert, Advantage(type="sequence"))
    assert alone[1][0] > 0 > together[1][0]
    assert together[2][0] > 0
    std = statistics.stdev([0.0, 1.0, 11.0])
    close(together, [[-4 / (std + 1e-4)], [-3 / (std + 1e-4)], [7 / (std + 1e-4)]])
