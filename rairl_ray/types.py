"""The data that flows through a step: frozen, keyword-only, plain Python and numpy.

Every part of the system speaks in these types. Dimension letters used in names and comments:
``G`` samples of one prompt, ``T`` completion tokens of one trace, ``U`` scored units of one trace.
A *completion* never contains a prompt token, an assistant header or padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem of a task."""

    id: str
    """Stable id, unique in its task and split; every random draw about this prompt is keyed by it."""
    question: str
    """What the user asks, without system prompt or chat markup."""
    answer: str | None = None
    """Gold answer in the task's own notation; None where the data has none."""
    metadata: dict[str, object] = field(default_factory=dict)
    """What the task's grader needs besides the answer (options, numbers, category)."""


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """An expert's chain of thought for one prompt, rendered in the task's completion format."""

    prompt: Prompt
    completion: str | None
    """Expert completion text, without an end-of-sequence token, always a finished trace; None where the
    data has no expert for this prompt."""
    corrupted: tuple[str, ...] = ()
    """Wrong versions of the same completion that the dataset itself ships, if any."""


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sample of the policy."""

    prompt_id: str
    sample_index: int
    """0..G-1 within its group; with the policy version and run seed it keys the sampling seed."""
    text: str
    """What the template has prefilled (`Renderer.prefilled`) and the decoded completion, no special tokens."""
    token_ids: tuple[int, ...]
    """[T] policy-tokenizer ids; ends with the end-of-sequence token exactly when finish_reason is 'stop'."""
    logprobs: tuple[float, ...]
    """[T] log-probability of each sampled token under the sampling distribution of `policy_version`."""
    finish_reason: FinishReason
    """'length' marks a truncated sample: it has no end-of-sequence token and none is ever added."""
    policy_version: int
    """Number of policy updates in the weights that sampled it."""
    seed: int
    """The per-request sampling seed that was used."""


@dataclass(frozen=True, kw_only=True)
class RolloutGroup:
    """All G samples of one prompt. An empty `rollouts` is a failed group (counted, never trained on)."""

    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A prompt with one completion, as text or as the policy's own tokens: what a discriminator reads."""

    prompt: Prompt
    text: str
    finished: bool = True
    """Whether the trace ended by itself (an end-of-sequence token follows) or was cut at the length limit."""
    token_ids: tuple[int, ...] | None = None
    """[T] sampled policy ids incl. end-of-sequence token; used when both models share one tokenizer."""
    edit_char: int | None = None
    """For a perturbed copy: offset of the first edited character in `text`."""


@dataclass(frozen=True, kw_only=True)
class TokenizedTrace:
    """A trace in one model's tokens, with the character end of every completion token."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """[T]"""
    char_ends: tuple[int, ...]
    """[T] end offset (exclusive) of each token in the trace's text, non-decreasing; the end-of-sequence
    token of a finished trace has len(text) + 1, so that it sorts after the last visible token."""


@dataclass(frozen=True, kw_only=True)
class TraceScores:
    """A reward's scores of the units of one trace, such as logits (before temperature and clip)."""

    logits: np.ndarray
    """[U] float32, one per unit."""
    unit_tokens: np.ndarray
    """[U] int64, completion-token index (discriminator tokenizer) of each unit's last token, increasing."""
    unit_char_ends: np.ndarray
    """[U] int64, character end of each unit, comparable with TokenizedTrace.char_ends of any tokenizer."""
    discriminator_version: int | None
    """Number of discriminator updates in the weights that scored it; None for a verifiable reward."""
    refusal: str = ""
    """Why a trace that has no units could not be scored."""
    parts: dict[str, float] = field(default_factory=dict)
    """The verifiable rewards of a trace that the task graded, by name."""


@dataclass(frozen=True, kw_only=True)
class RewardedTrace:
    """One trace of a group with its rewards on the policy's own tokens."""

    tokens: TokenizedTrace
    sampling_logprobs: np.ndarray | None
    """[T] float32; None for an expert trace."""
    token_rewards: np.ndarray
    """[T] float32; a token carries the reward of the next unit at or after it."""
    last_unit_reward: float
    policy_version: int
    """Version that sampled the trace (an expert trace: the current one)."""
    discriminator_version: int | None
    """Version that scored it; None for a verifiable reward."""
    expert: bool = False


@dataclass(frozen=True, kw_only=True)
class PolicySample:
    """One trace as the policy learner needs it."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """[T]"""
    advantages: np.ndarray
    """[T] float32"""
    sampling_logprobs: np.ndarray | None
    """[T] float32; None for an expert trace in the group (its importance ratio is 1)."""


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """All samples of one optimizer step over all ranks, with the denominators of the whole."""

    samples: tuple[PolicySample, ...]
    total_tokens: int
    """Completion tokens over all samples and ranks."""
    total_samples: int
    """Samples over all ranks."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorSample:
    """One labelled trace in the discriminator's tokens, with its scored units."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    """[T]"""
    unit_tokens: np.ndarray
    """[U] int64: token index of each unit's last token; units before an edit are already left out."""
    unit_starts: np.ndarray
    """[U] int64: token index of each unit's first token (a unit's segment is starts..tokens inclusive)."""
    positive: bool
    pair_id: int
    """Traces of one prompt share it; pairwise losses compare within it."""
    policy_logprobs: np.ndarray | None = None
    """[U] float32: log pi of each unit's segment, detached; only the `airl` loss needs it."""
    reference_logprobs: np.ndarray | None = None
    """[T] float32: the implicit head's reference on the completion, where it is known already."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorBatch:
    """All labelled traces of one discriminator update over all ranks."""

    samples: tuple[DiscriminatorSample, ...]
    positive_units: int
    """Units of positive traces over all ranks: the denominator of the positive half of the loss."""
    negative_units: int
    positive_traces: int
    negative_traces: int
    pairs: int
    """(positive, negative) pairs of one prompt over all ranks."""


@dataclass(frozen=True, kw_only=True)
class UpdateResult:
    """What an optimizer step reports."""

    version: int
    """Version of the weights after the step."""
    metrics: dict[str, float]
    """Metric name (rairl_ray.metrics) -> value, already reduced over ranks."""


@dataclass(frozen=True)
class Written:
    """What one rank, or a group of them, has written of a checkpoint beside training."""

    files: dict[str, dict[str, Any]]
    """Name below the role's folder -> size in bytes and sha256, of what was meant to be written."""
    parts: dict[str, tuple[str, ...]]
    """"weights", "optimizer", "scheduler", ... -> names of the files that hold them."""
    seconds: float
    """From the start of the write until all of it was durable; the slowest rank's."""
    error: str | None = None
    """File and cause where the disk failed; `files` is empty then."""
