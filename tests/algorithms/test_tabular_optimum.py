"""What the losses converge to, on problems small enough to know it (docs/method.md 3), with no model at all.

bce: f* = log p_E - log p_pi. airl: g is the expert's reward up to a constant, and still is one when the
dynamics change, where a reward without shaping is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rairl_ray.algorithms.discriminator_losses import DiscriminatorOutputs, Totals, discriminator_loss
from rairl_ray.config.schema import DiscriminatorLoss

EXPERT = torch.tensor([32, 16, 8, 4, 2, 2])
POLICY = torch.tensor([4, 8, 8, 16, 8, 20])


def fitted_logits(config: DiscriminatorLoss, policy_logprobs: Tensor | None = None) -> Tensor:
    """The optimum of one free logit per outcome, on batches that hold each outcome as often as it occurs."""
    f = torch.zeros(len(EXPERT), requires_grad=True)
    outcome = torch.cat([torch.repeat_interleave(torch.arange(len(EXPERT)), n) for n in (EXPERT, POLICY)])
    positive = torch.arange(len(outcome)) < EXPERT.sum()
    experts, samples = int(EXPERT.sum()), int(POLICY.sum())
    totals = Totals(
        positive_units=experts,
        negative_units=samples,
        positive_traces=experts,
        negative_traces=samples,
        pairs=0,
    )
    optimizer = torch.optim.LBFGS([f], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss, _ = discriminator_loss(
            DiscriminatorOutputs(f[outcome][:, None]),
            torch.ones(len(outcome), 1, dtype=torch.bool),
            positive,
            torch.zeros(len(outcome), dtype=torch.long),
            None if policy_logprobs is None else policy_logprobs[outcome][:, None],
            totals,
            config,
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return f.detach()


def log_ratio() -> Tensor:
    return (EXPERT / EXPERT.sum()).log() - (POLICY / POLICY.sum()).log()


@pytest.mark.parametrize("level", ["unit", "trace"])
def test_the_bce_optimum_is_the_log_density_ratio(level: str) -> None:
    f = fitted_logits(DiscriminatorLoss(type="bce", level=level, label_smoothing=0.0))
    torch.testing.assert_close(f, log_ratio(), atol=2e-3, rtol=0)


def test_label_smoothing_mixes_the_two_densities() -> None:
    """D* = ((1 - eps) p_E + eps p_pi) / (p_E + p_pi): bounded, and in the same order."""
    f = fitted_logits(DiscriminatorLoss(type="bce", label_smoothing=0.1))
    expert, policy = EXPERT / EXPERT.sum(), POLICY / POLICY.sum()
    expected = (0.9 * expert + 0.1 * policy).log() - (0.1 * expert + 0.9 * policy).log()
    torch.testing.assert_close(f, expected, atol=2e-3, rtol=0)
    assert (f.argsort() == log_ratio().argsort()).all()


def test_the_airl_optimum_is_the_experts_log_policy() -> None:
    """One step, one state: f = log p_E, whatever the policy is."""
    policy = (POLICY / POLICY.sum()).log()
    f = fitted_logits(DiscriminatorLoss(type="airl", label_smoothing=0.0), policy)
    torch.testing.assert_close(f, (EXPERT / EXPERT.sum()).log(), atol=2e-3, rtol=0)


# --- transfer ------------------------------------------------------------------------------------

STATES, ACTIONS, HORIZON, GAMMA = 8, 3, 6, 0.9


@dataclass(frozen=True)
class World:
    """Deterministic dynamics: next state of (state, action)."""

    next_state: Tensor


def make_world(seed: int) -> World:
    generator = torch.Generator().manual_seed(seed)
    return World(torch.randint(STATES, (STATES, ACTIONS), generator=generator))


def soft_policy(world: World, reward_HSA: Tensor) -> Tensor:
    """[H, S, A] log pi of the entropy-regularised optimum, by backward induction."""
    value = torch.zeros(STATES)
    log_policy = torch.empty(HORIZON, STATES, ACTIONS)
    for t in range(HORIZON - 1, -1, -1):
        q = reward_HSA[t] + GAMMA * value[world.next_state]
        value = q.logsumexp(dim=1)
        log_policy[t] = q - value[:, None]
    return log_policy


def best_return(world: World, reward_S: Tensor, judged_by_S: Tensor) -> float:
    """Discounted true return, over uniform starts, of the policy that is greedy for `reward_S`."""
    return greedy_return(world, reward_S[None, :, None].expand(HORIZON, STATES, ACTIONS), judged_by_S)


def greedy_return(world: World, reward_HSA: Tensor, judged_by_S: Tensor) -> float:
    value, true_value = torch.zeros(STATES), torch.zeros(STATES)
    for t in range(HORIZON - 1, -1, -1):
        action = (reward_HSA[t] + GAMMA * value[world.next_state]).argmax(dim=1)
        chosen = world.next_state[torch.arange(STATES), action]
        value = reward_HSA[t][torch.arange(STATES), action] + GAMMA * value[chosen]
        true_value = judged_by_S + GAMMA * true_value[chosen]
    return float(true_value.mean())


def sample(world: World, log_policy: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """States [N, H] and actions [N, H] from uniform starts."""
    state = torch.randint(STATES, (count,), generator=generator)
    states, actions = [], []
    for t in range(HORIZON):
        action = torch.multinomial(log_policy[t, state].exp(), 1, generator=generator)[:, 0]
        states.append(state)
        actions.append(action)
        state = world.next_state[state, action]
    return torch.stack(states, 1), torch.stack(actions, 1)


def recover_reward(world: World, true_reward_S: Tensor, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Adversarial training with the airl loss; returns (g [S], the policy's log pi [H, S, A]).

    A trace's units are its H steps: g reads the state, h the state and the time, the potential after the
    last unit is 0. The policy is the soft optimum of the current f, the exact answer to the current reward.
    """
    generator = torch.Generator().manual_seed(0)
    time = torch.arange(HORIZON)
    expert = sample(world, soft_policy(world, state_reward(true_reward_S)), 1500, generator)
    g = torch.zeros(STATES, requires_grad=True)
    h = torch.zeros(HORIZON, STATES, requires_grad=True)
    optimizer = torch.optim.Adam([g, h], lr=0.1, betas=(0.5, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds, eta_min=0.005)
    config = DiscriminatorLoss(type="airl", label_smoothing=0.0, gamma=GAMMA)
    units = 1500 * HORIZON
    totals = Totals(
        positive_units=units, negative_units=units, positive_traces=1500, negative_traces=1500, pairs=0
    )
    for _ in range(rounds):
        log_policy = soft_policy(world, shaped_reward(world, g.detach(), h.detach()))
        states, actions = (
            torch.cat(p) for p in zip(expert, sample(world, log_policy, 1500, generator), strict=True)
        )
        for _ in range(3):
            optimizer.zero_grad()
            loss, _ = discriminator_loss(
                DiscriminatorOutputs(g[states], h[time, states]),
                torch.ones_like(states, dtype=torch.bool),
                torch.arange(3000) < 1500,
                torch.zeros(3000, dtype=torch.long),
                log_policy[time, states, actions],
                totals,
                config,
            )
            loss.backward()
            optimizer.step()
        schedule.step()
    return g.detach(), soft_policy(world, shaped_reward(world, g.detach(), h.detach()))


def state_reward(reward_S: Tensor) -> Tensor:
    return reward_S[None, :, None].expand(HORIZON, STATES, ACTIONS)


def shaped_reward(world: World, g_S: Tensor, h_HS: Tensor) -> Tensor:
    """f [H, S, A] = g + gamma h_{t+1}(next state) - h_t: what the policy is paid."""
    following = torch.cat([h_HS[1:], torch.zeros(1, STATES)])
    return g_S[None, :, None] + GAMMA * following[:, world.next_state] - h_HS[:, :, None]


def test_airl_recovers_a_reward_that_transfers_to_other_dynamics() -> None:
    generator = torch.Generator().manual_seed(3)
    true_reward = torch.randn(STATES, generator=generator)
    world = make_world(0)
    g, log_policy = recover_reward(world, true_reward)
    expert_policy = soft_policy(world, state_reward(true_reward))
    assert float((log_policy.exp() - expert_policy.exp()).abs().max()) < 0.06, "the policy became the expert"
    off = (g - g.mean()) - (true_reward - true_reward.mean())
    assert float(off.abs().max()) < 0.25, f"g is the reward up to a constant, but is off by {off}"

    # The expert's own log policy is what f becomes without shaping: as good in the old world, not in others.
    unshaped = expert_policy
    found, without, best = [], [], []
    for seed in range(10, 20):
        other = make_world(seed)
        best.append(best_return(other, true_reward, true_reward))
        found.append(best_return(other, g, true_reward))
        without.append(greedy_return(other, unshaped, true_reward))
    best_mean, found_mean, without_mean = (sum(x) / len(x) for x in (best, found, without))
    assert best_mean > 0
    assert found_mean > 0.97 * best_mean
    assert without_mean < 0.6 * best_mean
    assert greedy_return(world, unshaped, true_reward) > 0.95 * best_return(world, true_reward, true_reward)
