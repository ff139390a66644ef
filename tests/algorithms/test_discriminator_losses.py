"""Discriminator losses (docs/method.md 3) against plain loops, however a batch is split."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rairl_ray import metrics
from rairl_ray.algorithms.discriminator_losses import (
    DiscriminatorOutputs,
    Totals,
    airl,
    discriminator_loss,
    gradient_penalty,
    mean_metrics,
    segment_sums,
)
from rairl_ray.config.schema import DiscriminatorLoss

LOSSES = ["bce", "wgan", "bradley_terry", "airl"]


@dataclass
class Row:
    """One trace with made-up head outputs."""

    values: list[float]
    shaping: list[float]
    policy_logprobs: list[float]
    positive: bool
    pair: int


def random_rows(seed: int, count: int = 9) -> list[Row]:
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        units = draw.randint(1, 6)
        rows.append(
            Row(
                [draw.gauss(0, 2) for _ in range(units)],
                [draw.gauss(0, 1) for _ in range(units)],
                [-draw.expovariate(0.5) for _ in range(units)],
                index < 2 or draw.random() < 0.4,
                draw.randint(0, 2),
            )
        )
    rows[-1].positive = False
    draw.shuffle(rows)
    return rows


def totals_of(rows: list[Row]) -> Totals:
    positives, negatives = [r for r in rows if r.positive], [r for r in rows if not r.positive]
    return Totals(
        positive_units=sum(len(r.values) for r in positives),
        negative_units=sum(len(r.values) for r in negatives),
        positive_traces=len(positives),
        negative_traces=len(negatives),
        pairs=sum(p.pair == n.pair for p in positives for n in negatives),
    )


def padded(lists: list[list[float]], width: int, fill: float) -> Tensor:
    return torch.tensor([row + [fill] * (width - len(row)) for row in lists], dtype=torch.float32)


def contribution(
    rows: list[Row], totals: Totals, config: DiscriminatorLoss, scale: Tensor, shaped: bool = True
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of these rows as one micro-batch; `scale` multiplies the outputs, to have something to learn."""
    width = max(len(r.values) for r in rows)
    mask = torch.tensor([[u < len(r.values) for u in range(width)] for r in rows])
    return discriminator_loss(
        DiscriminatorOutputs(
            padded([r.values for r in rows], width, 777.0) * scale,
            padded([r.shaping for r in rows], width, -555.0) * scale if shaped else None,
        ),
        mask,
        torch.tensor([r.positive for r in rows]),
        torch.tensor([r.pair for r in rows]),
        padded([r.policy_logprobs for r in rows], width, float("nan")),
        totals,
        config,
    )


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def unit_logits(row: Row, config: DiscriminatorLoss) -> list[float]:
    if config.type != "airl":
        return row.values
    h = [*row.shaping, 0.0]
    return [
        g + config.gamma * h[u + 1] - h[u] - logp
        for u, (g, logp) in enumerate(zip(row.values, row.policy_logprobs, strict=True))
    ]


def naive_loss(rows: list[Row], config: DiscriminatorLoss) -> float:
    """docs/method.md 3, word by word."""
    logits = [unit_logits(row, config) for row in rows]
    if config.type == "bradley_terry":
        score = [sum(x) if config.level == "trace" else sum(x) / len(x) for x in logits]
        pairs = [
            -math.log(sigmoid(score[i] - score[j]))
            for i, p in enumerate(rows)
            for j, n in enumerate(rows)
            if p.positive and not n.positive and p.pair == n.pair
        ]
        return sum(pairs) / len(pairs) if pairs else 0.0
    if config.level == "trace":
        logits = [[sum(x)] for x in logits]
    positive = [x for row, xs in zip(rows, logits, strict=True) if row.positive for x in xs]
    negative = [x for row, xs in zip(rows, logits, strict=True) if not row.positive for x in xs]
    if config.type == "wgan":
        return sum(negative) / len(negative) - sum(positive) / len(positive)
    eps = config.label_smoothing

    def entropy(x: float, target: float) -> float:
        return -target * math.log(sigmoid(x)) - (1 - target) * math.log(1 - sigmoid(x))

    return 0.5 * sum(entropy(x, 1 - eps) for x in positive) / len(positive) + 0.5 * sum(
        entropy(x, eps) for x in negative
    ) / len(negative)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("level", ["unit", "trace"])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_every_loss_equals_its_definition(kind: str, level: str, eps: float) -> None:
    for seed in range(5):
        rows = random_rows(seed)
        config = DiscriminatorLoss(type=kind, level=level, label_smoothing=eps, gamma=0.7)
        loss, _ = contribution(rows, totals_of(rows), config, torch.ones(()))
        assert float(loss) == pytest.approx(naive_loss(rows, config), rel=1e-4, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(LOSSES), st.sampled_from(["unit", "trace"]), st.data())
def test_loss_gradient_and_metrics_do_not_depend_on_the_split(
    seed: int, kind: str, level: str, data: st.DataObject
) -> None:
    """Any number of ranks and micro-batches, any order: the contributions add up to the same."""
    rows = random_rows(seed)
    totals, config = totals_of(rows), DiscriminatorLoss(type=kind, level=level, gamma=0.9)
    scale = torch.ones((), requires_grad=True)
    whole, whole_sums = contribution(rows, totals, config, scale)
    (whole_gradient,) = torch.autograd.grad(whole, scale, allow_unused=True)

    key = (lambda i: rows[i].pair) if kind == "bradley_terry" else (lambda i: i)  # pairs stay together
    keys = sorted({key(i) for i in range(len(rows))})
    part_of = {k: data.draw(st.integers(0, 3)) for k in keys}
    order = data.draw(st.permutations(range(len(rows))))
    loss, gradient, sums = 0.0, 0.0, dict.fromkeys(whole_sums, 0.0)
    for part in set(part_of.values()):
        micro_batch = [rows[i] for i in order if part_of[key(i)] == part]
        value, part_sums = contribution(micro_batch, totals, config, scale)
        loss += float(value.detach())
        gradient += float(torch.autograd.grad(value, scale, allow_unused=True)[0] or 0.0)
        for name in sums:
            sums[name] += float(part_sums[name])
    assert loss == pytest.approx(float(whole.detach()), rel=1e-4, abs=1e-5)
    assert gradient == pytest.approx(float(whole_gradient), rel=1e-4, abs=1e-5)
    for name, value in whole_sums.items():
        assert sums[name] == pytest.approx(float(value), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("copies", [2, 5])
def test_more_negatives_do_not_outweigh_the_positives(copies: int) -> None:
    """Both classes weigh one half however many of each there are."""
    rows = random_rows(3)
    config = DiscriminatorLoss()
    more = rows + [replace(row) for row in rows if not row.positive] * (copies - 1)
    one, _ = contribution(rows, totals_of(rows), config, torch.ones(()))
    many, _ = contribution(more, totals_of(more), config, torch.ones(()))
    assert float(one) == pytest.approx(float(many), rel=1e-5)


def test_a_class_that_is_absent_everywhere_adds_nothing() -> None:
    rows = [row for row in random_rows(1) if not row.positive]
    for kind in LOSSES:
        loss, sums = contribution(rows, totals_of(rows), DiscriminatorLoss(type=kind), torch.ones(()))
        assert math.isfinite(float(loss))
        assert math.isnan(mean_metrics({k: float(v) for k, v in sums.items()})[metrics.DISCRIMINATOR_ACCURACY])


def test_metrics_are_means_over_units_with_both_classes_weighing_alike() -> None:
    rows = [
        Row([1.0, -1.0, 2.0], [0, 0, 0], [0, 0, 0], True, 0),
        Row([-4.0], [0], [0], False, 0),
        Row([-2.0], [0], [0], False, 1),
        Row([0.5], [0], [0], False, 1),
    ]
    loss, sums = contribution(rows, totals_of(rows), DiscriminatorLoss(), torch.ones(()))
    means = mean_metrics({name: float(value) for name, value in sums.items()})
    assert means[metrics.DISCRIMINATOR_LOSS] == pytest.approx(float(loss))
    assert means[metrics.DISCRIMINATOR_POSITIVE_LOGIT] == pytest.approx(2 / 3)
    assert means[metrics.DISCRIMINATOR_NEGATIVE_LOGIT] == pytest.approx(-5.5 / 3)
    assert means[metrics.DISCRIMINATOR_ACCURACY] == pytest.approx(0.5 * 2 / 3 + 0.5 * 2 / 3)


def test_airl_needs_the_policy_and_sends_it_no_gradient() -> None:
    logp = torch.full((1, 2), -1.0, requires_grad=True)
    g, h = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, requires_grad=True)
    logits = airl(DiscriminatorOutputs(g, h), torch.ones(1, 2, dtype=torch.bool), logp, gamma=0.5)
    assert not torch.autograd.grad(logits.sum(), logp, allow_unused=True, retain_graph=True)[0]
    (gradient,) = torch.autograd.grad(logits[0, 0], h, retain_graph=True)
    assert gradient.tolist() == [[-1.0, 0.5]]
    (gradient,) = torch.autograd.grad(logits[0, 1], h)
    assert gradient.tolist() == [[0.0, -1.0]], "the potential after the last unit is zero"
    with pytest.raises(ValueError, match="airl needs"):
        discriminator_loss(
            DiscriminatorOutputs(g), torch.ones(1, 2), torch.ones(1), torch.zeros(1), None,
            totals_of(random_rows(0)), DiscriminatorLoss(type="airl"),
        )  # fmt: skip


def test_airl_without_shaping_is_the_implicit_heads_case() -> None:
    rows = random_rows(4)
    flat = [replace(row, shaping=[0.0] * len(row.shaping)) for row in rows]
    config = DiscriminatorLoss(type="airl")
    without, _ = contribution(rows, totals_of(rows), config, torch.ones(()), shaped=False)
    assert float(without) == pytest.approx(naive_loss(flat, config), rel=1e-4)


@given(st.integers(0, 10_000))
def test_segment_sums(seed: int) -> None:
    draw = np.random.default_rng(seed)
    tokens = draw.normal(size=(3, 20)).astype(np.float32)
    starts, ends = np.zeros((3, 4), dtype=np.int64), np.zeros((3, 4), dtype=np.int64)
    mask = np.zeros((3, 4), dtype=bool)
    expected = np.zeros((3, 4))
    for b in range(3):
        cuts = np.sort(draw.choice(20, size=draw.integers(1, 5), replace=False))
        for u, end in enumerate(cuts):
            starts[b, u], ends[b, u], mask[b, u] = (cuts[u - 1] + 1 if u else 0), end, True
            expected[b, u] = tokens[b, starts[b, u] : end + 1].astype(np.float64).sum()
    tensors = (torch.from_numpy(x) for x in (tokens, starts, ends, mask))
    np.testing.assert_allclose(segment_sums(*tensors).numpy(), expected, atol=1e-5)


def test_segment_sums_of_a_long_trace_keep_their_digits() -> None:
    values = torch.full((1, 5000), -11.3)
    last = torch.tensor([[4999]])
    got = segment_sums(values, last, last, torch.ones(1, 1, dtype=torch.bool))
    assert float(got) == pytest.approx(float(values[0, 0]), abs=1e-6)


def test_the_gradient_penalty_is_the_positives_squared_gradient_norm_and_is_split_free() -> None:
    torch.manual_seed(0)
    embeddings = torch.randn(4, 5, 3)
    weight = torch.randn(5, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).bool()
    positive = torch.tensor([True, False, True, False])
    unit_positions = torch.tensor([1, 2, 4])

    def penalty(rows: list[int]) -> Tensor:
        x = embeddings[rows].clone().requires_grad_()
        logits = torch.tanh((x * weight).sum(-1)).cumsum(1)[:, unit_positions]
        return gradient_penalty(logits, x, mask[rows], positive[rows], positive_traces=2)

    whole = penalty([0, 1, 2, 3])
    expected = 0.0
    for row in (0, 2):
        x = embeddings[row].clone().requires_grad_()
        logits = torch.tanh((x * weight).sum(-1)).cumsum(0)[unit_positions][mask[row]]
        expected += float(torch.autograd.grad(logits.sum(), x)[0].pow(2).sum()) / 2
    assert float(whole.detach()) == pytest.approx(expected, rel=1e-5)
    assert sum(float(penalty(part).detach()) for part in ([3, 0], [2], [1])) == pytest.approx(
        expected, rel=1e-5
    )
    (gradient,) = torch.autograd.grad(whole, weight)
    assert gradient.abs().sum() > 0, "the penalty itself can be trained on"


def test_the_drift_penalty_bounds_wgan_at_the_inverse_of_its_weight() -> None:
    """Free logits settle at +1/drift on positives and -1/drift on negatives, whatever their counts."""
    logits = torch.zeros(5, 1, requires_grad=True)
    positive = torch.tensor([True, False, True, True, False])
    totals = Totals(positive_units=3, negative_units=2, positive_traces=3, negative_traces=2, pairs=0)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")
    config = DiscriminatorLoss(type="wgan", drift_penalty=0.25)

    def closure() -> Tensor:
        optimizer.zero_grad()
        outputs, mask = DiscriminatorOutputs(logits), torch.ones(5, 1)
        loss, _ = discriminator_loss(outputs, mask, positive, torch.zeros(5), None, totals, config)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logits[:, 0].tolist() == pytest.approx([4.0, -4.0, 4.0, 4.0, -4.0], rel=1e-3)
