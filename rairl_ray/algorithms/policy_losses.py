"""The policy's clipped surrogate (docs/method.md 4) with GLOBAL denominators.

`policy_loss` returns this micro-batch's CONTRIBUTION: contributions of all micro-batches on all ranks add up
to the loss of the whole update. Shapes: B traces, T completion tokens (right padded).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rairl_ray import metrics
from rairl_ray.config.schema import Policy
from rairl_ray.config.variants import complete

MAX_LOG_RATIO = 20.0
"""Log-ratios beyond this are cut (and give no gradient), so that one absurd token cannot make the loss inf."""


def policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor | None,
    sampling_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    reference_logprobs_BT: Tensor | None,
    expert_B: Tensor,
    config: Policy,
    *,
    total_tokens: int,
    total_samples: int,
    max_completion_tokens: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Contribution to the loss, and metric SUMS over the policy's own tokens (see `mean_metrics`).

    All [B, T] float except mask_BT (True on completion tokens); expert_B [B] marks expert traces. Everything
    but logprobs_BT is a constant. Per token: min(r A, clip(r, 1 - clip_low, 1 + clip_high) A). A sum of what
    nobody measured (KL without a reference, weights without a cap) is absent.

    - tis_cap None: r = pi / pi_sampling, straight to the rollout engine's log-probabilities.
    - tis_cap c: r = pi / pi_old with the learner's own pi_old before the update, and the token's loss
      is weighted by min(pi_old / pi_sampling, c). old_logprobs_BT None means that this is the only update on
      these samples, so pi_old is pi itself.
    - expert tokens: r = 1 with pi's gradient, weight 1; their sampling and old log-probabilities are not read.
    """
    mask = mask_BT.bool()
    expert_BT = expert_B.bool()[:, None] & mask
    logprobs = torch.where(mask, logprobs_BT.float(), 0.0)
    old, sampling = _constants(logprobs, old_logprobs_BT, sampling_logprobs_BT, mask & ~expert_BT)
    if config.tis_cap is None:
        anchor, weight = sampling, torch.ones_like(logprobs)
    else:
        anchor, weight = old, _exp(old - sampling).clamp(max=config.tis_cap)
    ratio = _exp(logprobs - anchor)
    advantage = torch.where(mask, advantages_BT.float(), 0.0)
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    unclipped_gain, clipped_gain = ratio * advantage, clipped * advantage
    token_losses = -weight * torch.minimum(unclipped_gain, clipped_gain)

    measured: dict[str, Tensor] = {} if config.tis_cap is None else {metrics.POLICY_IMPORTANCE_WEIGHT: weight}
    if reference_logprobs_BT is not None:
        measured[metrics.POLICY_KL] = kl = k3(logprobs, torch.where(mask, reference_logprobs_BT.float(), 0.0))
        token_losses = token_losses + config.kl_coefficient * kl

    counts = Counts(total_tokens, total_samples, max_completion_tokens)
    loss = AGGREGATIONS[config.aggregation](torch.where(mask, token_losses, 0.0), mask, counts)
    own = mask & ~expert_BT
    sums = {
        metrics.POLICY_TOKENS: own.sum(),
        metrics.POLICY_LOSS: loss.detach(),
        metrics.POLICY_RATIO_MEAN: ratio.detach()[own].sum(),
        metrics.POLICY_CLIP_SHARE: (clipped_gain < unclipped_gain)[own].sum(),
        metrics.POLICY_ENTROPY: -logprobs.detach()[own].sum(),
        metrics.ROLLOUT_LOGPROB_GAP: (old - sampling).abs()[own].sum(),
        metrics.ROLLOUT_GAP_TOKENS: own.sum(),
    }
    return loss, sums | {name: values.detach()[own].sum() for name, values in measured.items()}


def k3(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate of KL(policy || reference) a token: e^d - d - 1, d = log ref - log pi; never negative.

    Under samples of pi its mean is KL(pi || ref), with less variance than -d. Its gradient is another's: it is
    (1 - ref/pi) grad log pi, whose mean is that of KL(ref || pi), the direction that covers what the reference
    does. Both agree to first order at pi = ref. Nothing here differentiates through the sampling itself.
    """
    difference = reference_logprobs - logprobs
    return _exp(difference) - difference - 1


def mean_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Metrics from the sums over all micro-batches and ranks.

    The loss is a sum of contributions already; the rest are means over the policy's own tokens.
    `policy/entropy` is the one-sample estimate, the mean of -log pi of the sampled tokens.
    `rollout/logprob_gap` is the mean |log pi_old - log pi_sampling| over the tokens for which pi_old is known:
    what sampling and learning disagree about. Below it lies rounding; staleness, and top_p < 1 (up to
    -log top_p), add to it.
    """
    tokens = sums[metrics.POLICY_TOKENS]
    counts = {metrics.ROLLOUT_LOGPROB_GAP: sums[metrics.ROLLOUT_GAP_TOKENS]}
    whole = {metrics.POLICY_TOKENS, metrics.POLICY_LOSS}
    return {
        name: value if name in whole else _mean(value, counts.get(name, tokens))
        for name, value in sums.items()
        if name != metrics.ROLLOUT_GAP_TOKENS
    }


def _mean(total: float, count: float) -> float:
    return total / count if count else float("nan")


def _constants(
    logprobs: Tensor, old_BT: Tensor | None, sampling_BT: Tensor, sampled: Tensor
) -> tuple[Tensor, Tensor]:
    """Old and sampling log-probabilities; the policy's own, detached, where no sampling took place."""
    current = logprobs.detach()
    old = current if old_BT is None else torch.where(sampled, old_BT.detach().float(), current)
    return old, torch.where(sampled, sampling_BT.detach().float(), current)


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


class Counts(NamedTuple):
    """The denominators of an update over all micro-batches and ranks."""

    tokens: int
    samples: int
    longest: int
    """`rollout.max_completion_tokens`."""


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, Counts], Tensor]] = {
    # GRPO
    "sequence_mean": lambda losses_BT, mask_BT, counts: (
        (losses_BT.sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)).sum() / max(counts.samples, 1)
    ),
    # DAPO, BNPO
    "token_mean": lambda losses_BT, mask_BT, counts: losses_BT.sum() / max(counts.tokens, 1),
    # Dr. GRPO
    "constant": lambda losses_BT, mask_BT, counts: losses_BT.sum() / (max(counts.samples, 1) * counts.longest),
}
"""This micro-batch's contribution from its tokens' losses [B, T] (0 off the mask)."""
complete(f"{__name__}.AGGREGATIONS", AGGREGATIONS, Policy, "aggregation")
