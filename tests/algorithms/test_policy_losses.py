"""The policy loss (docs/method.md 4) against loops from the published formulas, values and gradients."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rairl_ray import metrics
from rairl_ray.algorithms.policy_losses import k3, mean_metrics, policy_loss
from rairl_ray.config.schema import Policy

MAX_TOKENS = 10
AGGREGATIONS = ["sequence_mean", "token_mean", "constant"]


@dataclass
class Row:
    logprobs: list[float]
    old: list[float]
    sampling: list[float]
    reference: list[float]
    advantages: list[float]
    expert: bool = False


def random_rows(seed: int, experts: bool = False, count: int = 7) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        length = draw.randint(1, MAX_TOKENS)
        base = [-draw.expovariate(1.0) for _ in range(length)]

        def jitter(base: list[float] = base) -> list[float]:
            return [x + draw.gauss(0, 0.4) for x in base]

        advantage = [draw.choice([0.0, draw.gauss(0, 1)]) for _ in range(length)]
        expert = experts and draw.random() < 0.4
        rows.append(Row(jitter(), jitter(), jitter(), jitter(), advantage, expert))
    return rows


def contribution(
    rows: list[Row], config: Policy, everything: list[Row], logprobs: Tensor | None = None, old: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    width = max(len(row.logprobs) for row in rows)

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(r, name) + [50.0] * (width - len(r.logprobs)) for r in rows])

    return policy_loss(
        column("logprobs") if logprobs is None else logprobs,
        column("old") if old else None,
        column("sampling"),
        column("advantages"),
        torch.tensor([[t < len(r.logprobs) for t in range(width)] for r in rows]),
        column("reference") if config.kl_coefficient > 0 else None,
        torch.tensor([r.expert for r in rows]),
        config,
        total_tokens=sum(len(r.logprobs) for r in everything),
        total_samples=len(everything),
        max_completion_tokens=MAX_TOKENS,
    )


def token_loss(row: Row, t: int, config: Policy) -> float:
    """One token, from the formulas: PPO's clipped surrogate, truncated importance sampling, the k3 penalty."""
    logp, advantage = row.logprobs[t], row.advantages[t]
    if row.expert:
        ratio, weight = 1.0, 1.0
    elif config.tis_cap is None:
        ratio, weight = math.exp(logp - row.sampling[t]), 1.0
    else:
        ratio = math.exp(logp - row.old[t])
        weight = min(math.exp(row.old[t] - row.sampling[t]), config.tis_cap)
    clipped = max(1 - config.clip_low, min(1 + config.clip_high, ratio))
    loss = -weight * min(ratio * advantage, clipped * advantage)
    if config.kl_coefficient > 0:
        difference = row.reference[t] - logp
        loss += config.kl_coefficient * (math.exp(difference) - difference - 1)
    return loss


def naive_loss(rows: list[Row], config: Policy) -> float:
    tokens = [[token_loss(row, t, config) for t in range(len(row.logprobs))] for row in rows]
    if config.aggregation == "sequence_mean":  # GRPO: mean over samples of their token means
        return sum(sum(x) / len(x) for x in tokens) / len(rows)
    total = sum(sum(x) for x in tokens)
    if config.aggregation == "token_mean":  # BNPO / DAPO
        return total / sum(len(x) for x in tokens)
    return total / (len(rows) * MAX_TOKENS)  # Dr. GRPO


configs = st.builds(
    Policy,
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28]),
    aggregation=st.sampled_from(AGGREGATIONS),
    kl_coefficient=st.sampled_from([0.0, 0.04, 1.0]),
    tis_cap=st.sampled_from([None, 1.1, 2.0]),
)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), configs, st.booleans())
def test_loss_equals_the_formulas(seed: int, config: Policy, experts: bool) -> None:
    rows = random_rows(seed, experts)
    loss, sums = contribution(rows, config, rows)
    assert float(loss) == pytest.approx(naive_loss(rows, config), rel=1e-4, abs=1e-5)
    assert float(sums[metrics.POLICY_LOSS]) == float(loss)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), configs, st.data())
def test_loss_gradients_and_metrics_do_not_depend_on_the_split(
    seed: int, config: Policy, data: st.DataObject
) -> None:
    rows = random_rows(seed, experts=True)
    scale = torch.ones((), requires_grad=True)

    def scaled(part: list[Row]) -> Tensor:
        width = max(len(row.logprobs) for row in part)
        return torch.tensor([r.logprobs + [0.0] * (width - len(r.logprobs)) for r in part]) * scale

    whole, whole_sums = contribution(rows, config, rows, scaled(rows))
    (whole_gradient,) = torch.autograd.grad(whole, scale)
    part_of = [data.draw(st.integers(0, 3)) for _ in rows]
    loss, gradient, sums = 0.0, 0.0, dict.fromkeys(whole_sums, 0.0)
    for part in set(part_of):
        chosen = [row for row, own in zip(rows, part_of, strict=True) if own == part]
        value, part_sums = contribution(chosen, config, rows, scaled(chosen))
        loss += float(value.detach())
        gradient += float(torch.autograd.grad(value, scale)[0])
        for name in sums:
            sums[name] += float(part_sums[name])
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4, abs=1e-5)
    assert gradient == pytest.approx(float(whole_gradient), rel=1e-3, abs=1e-4)
    for name, value in whole_sums.items():
        assert sums[name] == pytest.approx(float(value), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("cap", [None, 2.0])
def test_gradients_are_those_of_the_formula(aggregation: str, cap: float | None) -> None:
    """Central differences of the naive loss, at points away from the clip's corners."""
    rows = random_rows(11)
    config = Policy(aggregation=aggregation, tis_cap=cap, kl_coefficient=0.1)
    width = max(len(row.logprobs) for row in rows)
    logprobs = torch.tensor([r.logprobs + [0.0] * (width - len(r.logprobs)) for r in rows], requires_grad=True)
    loss, _ = contribution(rows, config, rows, logprobs)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    step = 1e-5
    for b, row in enumerate(rows):
        for t, value in enumerate(row.logprobs):
            sides = []
            for moved in (value + step, value - step):
                row.logprobs[t] = moved
                sides.append(naive_loss(rows, config))
            row.logprobs[t] = value
            assert float(gradient[b, t]) == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-4)
        assert gradient[b, len(row.logprobs) :].abs().sum() == 0


def test_on_policy_gradient_is_reinforce() -> None:
    rows = random_rows(5)
    for row in rows:
        row.sampling = row.old = row.logprobs
    config = Policy(aggregation="token_mean")
    width = max(len(row.logprobs) for row in rows)
    logprobs = torch.tensor([r.logprobs + [0.0] * (width - len(r.logprobs)) for r in rows], requires_grad=True)
    (gradient,) = torch.autograd.grad(contribution(rows, config, rows, logprobs)[0], logprobs)
    tokens = sum(len(row.logprobs) for row in rows)
    for b, row in enumerate(rows):
        expected = [-a / tokens for a in row.advantages]
        assert gradient[b, : len(expected)].tolist() == pytest.approx(expected, abs=1e-6)


def test_no_old_logprobs_means_the_policys_own_before_its_only_update() -> None:
    rows = random_rows(6, experts=True)
    config = Policy(tis_cap=1.5)
    implied, _ = contribution(rows, config, rows, old=False)
    for row in rows:
        row.old = list(row.logprobs)
    stated, _ = contribution(rows, config, rows)
    assert float(implied) == pytest.approx(float(stated), rel=1e-5)


def test_an_expert_trace_is_trained_on_with_ratio_one_whatever_its_sampling_says() -> None:
    row = Row([-0.5, -3.0], [9.0, 9.0], [float("nan")] * 2, [0.0, 0.0], [2.0, 2.0], expert=True)
    for cap in (None, 2.0):
        logprobs = torch.tensor([row.logprobs], requires_grad=True)
        loss, sums = contribution([row], Policy(tis_cap=cap), [row], logprobs)
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert float(loss) == pytest.approx(-2.0)
        assert gradient.tolist() == [[-1.0, -1.0]], "raises the log-probability of every expert token"
        assert int(sums[metrics.POLICY_TOKENS]) == 0, "metrics are about the policy's own samples"


def test_metrics_are_means_over_the_policys_own_tokens() -> None:
    ratio = 1.5
    row = Row([math.log(ratio) - 1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [-1.0, -1.0], [1.0, 1.0])
    expert = Row([-9.0], [0.0], [0.0], [0.0], [1.0], expert=True)
    config = Policy(kl_coefficient=0.5, tis_cap=2.0)
    _, sums = contribution([row, expert], config, [row, expert])
    means = mean_metrics({name: float(value) for name, value in sums.items()})
    assert means[metrics.POLICY_TOKENS] == 2
    assert means[metrics.POLICY_RATIO_MEAN] == pytest.approx((ratio + 1) / 2)
    assert means[metrics.POLICY_CLIP_SHARE] == pytest.approx(0.5)
    assert means[metrics.POLICY_IMPORTANCE_WEIGHT] == pytest.approx(1.0)
    assert means[metrics.POLICY_KL] == pytest.approx((1 / ratio + math.log(ratio) - 1) / 2, rel=1e-4)
    assert means[metrics.POLICY_ENTROPY] == pytest.approx((2 - math.log(ratio)) / 2, rel=1e-4)


def test_the_gap_compares_the_learner_before_the_update_with_what_sampled() -> None:
    row = Row([-1.0, -2.0], [-1.5, -2.5], [-1.4, -2.8], [0.0, 0.0], [1.0, 1.0])
    expert = Row([-9.0], [0.0], [float("nan")], [0.0], [1.0], expert=True)
    for old, expected in ((True, (0.1 + 0.3) / 2), (False, (0.4 + 0.8) / 2)):
        _, sums = contribution([row, expert], Policy(), [row, expert], old=old)
        means = mean_metrics({name: float(value) for name, value in sums.items()})
        assert means[metrics.ROLLOUT_LOGPROB_GAP] == pytest.approx(expected, rel=1e-5)
        assert metrics.ROLLOUT_GAP_TOKENS not in means
    # an update that no longer sees the sampling policy counts for every metric but this one
    _, later = contribution([row], Policy(tis_cap=None), [row], old=False)
    both = {name: float(sums[name]) + float(later[name]) for name in later}
    for name in (metrics.ROLLOUT_LOGPROB_GAP, metrics.ROLLOUT_GAP_TOKENS):
        both[name] = float(sums[name])
    assert mean_metrics(both)[metrics.ROLLOUT_LOGPROB_GAP] == pytest.approx(expected, rel=1e-5)


def test_the_kl_estimate_is_never_negative_and_zero_at_equality() -> None:
    x = torch.linspace(-3, 0, 20)
    assert float(k3(x, x).abs().max()) == 0
    assert float(k3(x, x.flip(0)).min()) >= 0


def test_k3_is_unbiased_for_the_kl() -> None:
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    exact = float((p * (p / q).log()).sum())
    assert float((p * k3(p.log(), q.log())).sum()) == pytest.approx(exact, rel=1e-5)


def test_k3_has_the_gradient_of_the_other_kl() -> None:
    """As its docstring says, over all outcomes of a small distribution, by autograd."""
    logits, q = torch.tensor([0.5, -0.2, 0.9], requires_grad=True), torch.tensor([0.2, 0.3, 0.5])
    p = torch.softmax(logits, 0)
    (estimated,) = torch.autograd.grad((p.detach() * k3(p.log(), q.log())).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad((q * (q / p).log()).sum(), logits, retain_graph=True)
    (forward,) = torch.autograd.grad((p * (p / q).log()).sum(), logits)
    torch.testing.assert_close(estimated, backward)
    assert not torch.allclose(estimated, forward, rtol=0.05)


def test_what_nobody_measured_is_absent_and_not_zero() -> None:
    row = Row([-1.0, -2.0], [-1.5, -2.5], [-1.4, -2.8], [0.0, 0.0], [1.0, 1.0])
    _, sums = contribution([row], Policy(kl_coefficient=0.0, tis_cap=None), [row])
    assert {metrics.POLICY_KL, metrics.POLICY_IMPORTANCE_WEIGHT}.isdisjoint(mean_metrics(sums))
    _, sums = contribution([row], Policy(kl_coefficient=0.1, tis_cap=2.0), [row])
    assert {metrics.POLICY_KL, metrics.POLICY_IMPORTANCE_WEIGHT} <= mean_metrics(sums).keys()


def test_one_absurd_token_does_not_make_the_loss_infinite() -> None:
    row = Row([-1.0], [-300.0], [-300.0], [-1.0], [-1.0])
    for cap in (None, 2.0):
        loss, _ = contribution([row], Policy(tis_cap=cap), [row])
        assert math.isfinite(float(loss))


def test_a_token_alone_is_divided_by_one() -> None:
    row = Row([-1.0], [-1.0], [-1.0], [-1.0], [2.0], False)
    loss, _ = contribution([row], Policy(aggregation="token_mean"), [row])
    assert loss.item() == pytest.approx(-2.0)
