"""Makes discriminator batches of labelled traces: who is positive, who is negative, and on which units.

Pure bookkeeping on the driver: no tensors, no actors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rairl_ray.algorithms.density import unit_of_tokens
from rairl_ray.rewards.reading import TraceUnits
from rairl_ray.types import DiscriminatorBatch, DiscriminatorSample


@dataclass(frozen=True, kw_only=True)
class LabelledTrace:
    """A read trace with its label; `pair_id` ties it to the expert of its own prompt."""

    read: TraceUnits
    positive: bool
    pair_id: int


def labelled_batch(
    traces: Sequence[LabelledTrace], from_edit: bool, policy_logprobs: Sequence[np.ndarray] | None = None
) -> DiscriminatorBatch:
    """Labelled traces with the global counts that the losses divide by (docs/method.md 3).

    Args:
        from_edit: leave out a perturbed copy's units before its edit: up to there it equals the expert trace,
            and a causal model would see one prefix with two labels.
        policy_logprobs: per trace [U] log pi of each unit's segment, for the `airl` loss.
    """
    samples: list[DiscriminatorSample] = []
    for index, item in enumerate(traces):
        keep = np.ones(len(item.read.unit_tokens), dtype=bool)
        if from_edit and item.read.trace.edit_char is not None:
            keep = item.read.unit_char_ends > item.read.trace.edit_char
        if not keep.any():
            continue
        sample = DiscriminatorSample(
            prompt_ids=item.read.tokens.prompt_ids,
            completion_ids=item.read.tokens.completion_ids,
            unit_tokens=item.read.unit_tokens[keep],
            unit_starts=item.read.unit_starts[keep],
            positive=item.positive,
            pair_id=item.pair_id,
            policy_logprobs=None if policy_logprobs is None else policy_logprobs[index][keep],
        )
        samples.append(sample)
    return batch_of(samples)


def batch_of(samples: Sequence[DiscriminatorSample]) -> DiscriminatorBatch:
    positives = [s for s in samples if s.positive]
    negatives = [s for s in samples if not s.positive]
    negative_pairs: dict[int, int] = {}
    for sample in negatives:
        negative_pairs[sample.pair_id] = negative_pairs.get(sample.pair_id, 0) + 1
    return DiscriminatorBatch(
        samples=tuple(samples),
        positive_units=sum(len(s.unit_tokens) for s in positives),
        negative_units=sum(len(s.unit_tokens) for s in negatives),
        positive_traces=len(positives),
        negative_traces=len(negatives),
        pairs=sum(negative_pairs.get(s.pair_id, 0) for s in positives),
    )


def segment_logprobs(
    read: TraceUnits, char_ends: Sequence[int], logprobs: Sequence[float] | np.ndarray
) -> np.ndarray:
    """[U] log pi of each unit's segment: the sum over the policy's tokens that belong to it.

    With one tokenizer these are the unit's own tokens, by index; with two, tokens are given to units as rewards
    are given to tokens (`density.unit_of_tokens`). Every token counts exactly once.

    Args:
        char_ends: [T] character ends of the POLICY's tokens of the same text.
        logprobs: [T]
    """
    sums = np.zeros(len(read.unit_tokens))
    if len(sums):
        units = unit_of_tokens(read.unit_char_ends, char_ends, read.unit_tokens if read.policy_tokens else None)
        np.add.at(sums, units, np.asarray(logprobs, dtype=np.float64))
    return sums.astype(np.float32)
