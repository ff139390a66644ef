"""The discriminator's losses (docs/method.md 3) as pure functions of tensors and GLOBAL denominators.

Every function returns this micro-batch's CONTRIBUTION: the contributions of all micro-batches on all ranks add
up to the loss of the whole update, however it was split or ordered. No function divides by its own size.

Shapes: B traces, U units (padded; `unit_mask` says which exist), T completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rairl_ray import metrics
from rairl_ray.config.schema import DiscriminatorLoss
from rairl_ray.config.variants import complete
from rairl_ray.types import DiscriminatorBatch

POSITIVE_COUNT = "discriminator/positive_count"
NEGATIVE_COUNT = "discriminator/negative_count"
_RIGHT_POSITIVES = "discriminator/right_positives"
_RIGHT_NEGATIVES = "discriminator/right_negatives"


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Counts over all micro-batches and ranks of one update; a trace without units counts nowhere."""

    positive_units: int
    negative_units: int
    positive_traces: int
    negative_traces: int
    pairs: int
    """(positive, negative) pairs of traces that share a pair_id."""

    @classmethod
    def of_batch(cls, batch: DiscriminatorBatch) -> Totals:
        return cls(
            positive_units=batch.positive_units,
            negative_units=batch.negative_units,
            positive_traces=batch.positive_traces,
            negative_traces=batch.negative_traces,
            pairs=batch.pairs,
        )


@dataclass(frozen=True)
class DiscriminatorOutputs:
    """What a head says about the units."""

    values: Tensor
    """[B, U]: the unit logits f_u; under the `airl` loss g_u. This is the reward that is carried off."""
    shaping: Tensor | None = None
    """[B, U], `airl` with a scalar head: potential h_u of the state BEFORE unit u, that is, read at the token
    in front of its segment (the prompt's last token for the first unit). None means h = 0: the implicit head
    has none."""


@dataclass(frozen=True)
class Items:
    """What most losses compare: units, or whole traces, flattened to one axis of N with their labels."""

    logits: Tensor
    positive: Tensor
    positive_total: int
    negative_total: int


@dataclass(frozen=True)
class Labelled:
    """A micro-batch as a loss sees it."""

    logits: Tensor
    """[B, U], 0 off the mask."""
    unit_mask: Tensor
    positive: Tensor
    """[B]"""
    pair_id: Tensor
    """[B]"""
    totals: Totals
    items: Items


def discriminator_loss(
    outputs: DiscriminatorOutputs,
    unit_mask: Tensor,
    positive_B: Tensor,
    pair_id_B: Tensor,
    policy_logprobs_BU: Tensor | None,
    totals: Totals,
    config: DiscriminatorLoss,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The one entry: this micro-batch's contribution to the loss `config.type`, and its metric SUMS.

    unit_mask [B, U] bool; positive_B [B] bool; pair_id_B [B] int; policy_logprobs_BU [B, U] only for `airl`.
    The sums (all-reduce them, then `mean_metrics`) are over units, or over traces at level `trace`.
    `bradley_terry` compares traces, so a micro-batch must hold all traces of each of its pair_ids.
    The gradient penalty is separate (`gradient_penalty`): it needs the input embeddings.
    """
    unit_mask, positive_B = unit_mask.bool(), positive_B.bool()
    if config.needs.policy_logprobs and policy_logprobs_BU is None:
        raise ValueError(
            f"discriminator.loss.type {config.type} needs the policy's log-probabilities of the units"
        )
    kind = LOSSES[config.type]
    logits_BU = torch.where(unit_mask, kind.logits(outputs, unit_mask, policy_logprobs_BU, config), 0.0)
    items = _items(logits_BU, unit_mask, positive_B, totals, config)
    loss = kind.contribution(Labelled(logits_BU, unit_mask, positive_B, pair_id_B, totals, items), config)
    return loss, _metric_sums(loss, items)


def bce(
    logits: Tensor, positive: Tensor, *, positive_total: int, negative_total: int, label_smoothing: float
) -> Tensor:
    """L = 1/2 mean over positives + 1/2 mean over negatives of the cross-entropy (docs/method.md 3).

    logits [N], positive [N] bool; targets are 1 - label_smoothing and label_smoothing. Each class has its own
    global denominator, so their balance never depends on how many of either a micro-batch happens to hold.
    """
    smooth = torch.full_like(logits, label_smoothing)
    targets = torch.where(positive, 1 - smooth, smooth)
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return torch.dot(losses, _class_weights(losses, positive, 0.5, 0.5, positive_total, negative_total))


def wgan(
    logits: Tensor, positive: Tensor, *, positive_total: int, negative_total: int, drift_penalty: float = 0.0
) -> Tensor:
    """mean f(negative) - mean f(positive): unsmoothed, since its labels are signs and not probabilities.

    It has no minimum by itself: `discriminator.loss.gradient_penalty`, `weight_clip` or `drift_penalty` must
    bound it. The last adds drift_penalty * (1/2 mean f^2 over positives + 1/2 mean f^2 over negatives).
    """
    totals = (positive_total, negative_total)
    loss = torch.dot(logits, _class_weights(logits, positive, -1.0, 1.0, *totals))
    if drift_penalty:
        loss = loss + drift_penalty * torch.dot(logits**2, _class_weights(logits, positive, 0.5, 0.5, *totals))
    return loss


def bradley_terry(trace_logits: Tensor, positive: Tensor, pair_ids: Tensor, *, pair_total: int) -> Tensor:
    """-log sigmoid(f(positive) - f(negative)), mean over all such pairs of one prompt (arXiv 2511.10643).

    trace_logits [B], positive [B] bool, pair_ids [B].
    """
    margins_BB = trace_logits[:, None] - trace_logits[None, :]
    is_pair = positive[:, None] & ~positive[None, :] & (pair_ids[:, None] == pair_ids[None, :])
    return torch.where(is_pair, F.softplus(-margins_BB), 0.0).sum() / max(pair_total, 1)


def airl(
    outputs: DiscriminatorOutputs, unit_mask: Tensor, policy_logprobs_BU: Tensor, *, gamma: float
) -> Tensor:
    """Logits [B, U] = f_u - log pi(segment_u), f_u = g_u + gamma h_{u+1} - h_u (AIRL, arXiv 1710.11248).

    log pi is detached; units are left-aligned in their row. The potential after a trace's last unit is 0, also
    after that of a truncated trace: the length limit ends the episode, for nothing behind it is ever rewarded.
    To read h there instead would be no bootstrap but a hole: no trace goes on from the limit, so no other term
    would hold that h, and g of a truncated trace's last unit could be anything that gamma h makes up for.
    """
    f_BU = outputs.values.float()
    if outputs.shaping is not None:
        h_BU = torch.where(unit_mask, outputs.shaping.float(), 0.0)
        next_h_BU = torch.cat([h_BU[:, 1:], torch.zeros_like(h_BU[:, :1])], dim=1)
        f_BU = f_BU + gamma * next_h_BU - h_BU
    return f_BU - policy_logprobs_BU.detach().float()


def gradient_penalty(
    logits_BU: Tensor, embeddings_BLD: Tensor, unit_mask: Tensor, positive_B: Tensor, *, positive_traces: int
) -> Tensor:
    """R1 (arXiv 1801.04406): mean over positives of the squared gradient norm of the summed unit logits.

    embeddings_BLD [B, L, D]: the input embeddings that logits_BU were computed from, requiring grad. Returns
    this micro-batch's contribution, without the coefficient `discriminator.loss.gradient_penalty`; it can be
    differentiated again.
    """
    chosen_BU = unit_mask.bool() & positive_B.bool()[:, None]
    # Rows do not interact, so the gradient of the total is each row's own gradient.
    total = torch.where(chosen_BU, logits_BU, 0.0).sum()
    (gradient_BLD,) = torch.autograd.grad(total, embeddings_BLD, create_graph=True)
    return gradient_BLD.float().pow(2).sum() / max(positive_traces, 1)


def segment_sums(token_values_BT: Tensor, starts_BU: Tensor, ends_BU: Tensor, mask_BU: Tensor) -> Tensor:
    """[B, U] float32: sum of token values over each unit's segment starts..ends (inclusive); 0 off the mask.

    With token values beta (log pi_phi - log pi_ref) these are the implicit head's unit logits (arXiv
    2502.01456); with log pi they are the segment log-probabilities of `airl`.
    Differences of running sums lose digits on long traces in float32, hence float64 inside.
    """
    running_BT = F.pad(token_values_BT.double().cumsum(dim=1), (1, 0))
    mask_BU = mask_BU.bool()
    after_BU = torch.where(mask_BU, ends_BU + 1, 0)
    before_BU = torch.where(mask_BU, starts_BU, 0)
    return (running_BT.gather(1, after_BU) - running_BT.gather(1, before_BU)).float()


def mean_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from the sums over all micro-batches and ranks. Accuracy weighs both classes equally."""
    positives, negatives = sums[POSITIVE_COUNT], sums[NEGATIVE_COUNT]
    nan = float("nan")
    return {
        metrics.DISCRIMINATOR_LOSS: sums[metrics.DISCRIMINATOR_LOSS],
        metrics.DISCRIMINATOR_POSITIVE_LOGIT: (
            sums[metrics.DISCRIMINATOR_POSITIVE_LOGIT] / positives if positives else nan
        ),
        metrics.DISCRIMINATOR_NEGATIVE_LOGIT: (
            sums[metrics.DISCRIMINATOR_NEGATIVE_LOGIT] / negatives if negatives else nan
        ),
        metrics.DISCRIMINATOR_ACCURACY: (
            0.5 * sums[_RIGHT_POSITIVES] / positives + 0.5 * sums[_RIGHT_NEGATIVES] / negatives
            if positives and negatives
            else nan
        ),
    }


def _bce(batch: Labelled, config: DiscriminatorLoss) -> Tensor:
    items = batch.items
    return bce(
        items.logits,
        items.positive,
        positive_total=items.positive_total,
        negative_total=items.negative_total,
        label_smoothing=config.label_smoothing,
    )


def _wgan(batch: Labelled, config: DiscriminatorLoss) -> Tensor:
    items = batch.items
    return wgan(
        items.logits,
        items.positive,
        positive_total=items.positive_total,
        negative_total=items.negative_total,
        drift_penalty=config.drift_penalty,
    )


def _bradley_terry(batch: Labelled, config: DiscriminatorLoss) -> Tensor:
    present_B = batch.unit_mask.any(dim=1)
    logits_B = batch.logits.sum(dim=1)
    if config.level == "unit":  # the mean keeps a long trace from winning by its length
        logits_B = logits_B / batch.unit_mask.sum(dim=1).clamp(min=1)
    return bradley_terry(
        logits_B[present_B],
        batch.positive[present_B],
        batch.pair_id[present_B],
        pair_total=batch.totals.pairs,
    )


def _plain_logits(
    outputs: DiscriminatorOutputs, unit_mask: Tensor, logprobs_BU: Tensor | None, config: DiscriminatorLoss
) -> Tensor:
    return outputs.values.float()


def _airl_logits(
    outputs: DiscriminatorOutputs, unit_mask: Tensor, logprobs_BU: Tensor | None, config: DiscriminatorLoss
) -> Tensor:
    assert logprobs_BU is not None
    return airl(outputs, unit_mask, logprobs_BU, gamma=config.gamma)


class Loss(NamedTuple):
    """A loss: a micro-batch's contribution from the units' logits, and what these are of the head's outputs."""

    contribution: Callable[[Labelled, DiscriminatorLoss], Tensor]
    logits: Callable[[DiscriminatorOutputs, Tensor, Tensor | None, DiscriminatorLoss], Tensor] = _plain_logits


LOSSES = {
    "bce": Loss(_bce),
    "wgan": Loss(_wgan),
    "bradley_terry": Loss(_bradley_terry),
    "airl": Loss(_bce, _airl_logits),
}
complete(f"{__name__}.LOSSES", LOSSES, DiscriminatorLoss, "type")


def _items(
    logits_BU: Tensor, unit_mask: Tensor, positive_B: Tensor, totals: Totals, config: DiscriminatorLoss
) -> Items:
    if config.level == "trace":
        present_B = unit_mask.any(dim=1)
        return Items(
            logits_BU.sum(dim=1)[present_B],
            positive_B[present_B],
            totals.positive_traces,
            totals.negative_traces,
        )
    positive_BU = positive_B[:, None].expand_as(unit_mask)
    return Items(logits_BU[unit_mask], positive_BU[unit_mask], totals.positive_units, totals.negative_units)


def _class_weights(
    like: Tensor, positive: Tensor, positive_share: float, negative_share: float, positives: int, negatives: int
) -> Tensor:
    """[N]: share of its class over the class's global count (an absent class adds nothing)."""
    return torch.where(
        positive,
        torch.full_like(like, positive_share / max(positives, 1)),
        torch.full_like(like, negative_share / max(negatives, 1)),
    )


def _metric_sums(loss: Tensor, items: Items) -> dict[str, Tensor]:
    logits, positive = items.logits.detach(), items.positive
    return {
        metrics.DISCRIMINATOR_LOSS: loss.detach(),
        metrics.DISCRIMINATOR_POSITIVE_LOGIT: logits[positive].sum(),
        metrics.DISCRIMINATOR_NEGATIVE_LOGIT: logits[~positive].sum(),
        _RIGHT_POSITIVES: (logits[positive] > 0).sum(),
        _RIGHT_NEGATIVES: (logits[~positive] < 0).sum(),
        POSITIVE_COUNT: positive.sum(),
        NEGATIVE_COUNT: (~positive).sum(),
    }
