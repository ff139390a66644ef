"""Traces as a reward model reads them: its tokens, and the units that its density scores (docs/method.md 2).

The density's units come from this one place for training, scoring, reranking and localisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rairl_ray.algorithms.density import unit_starts, unit_tokens
from rairl_ray.config.schema import Density
from rairl_ray.data.rendering import Renderer
from rairl_ray.types import DiscriminatorSample, Prompt, Rollout, TokenizedTrace, Trace, TraceScores


@dataclass(frozen=True, kw_only=True)
class TraceUnits:
    """A trace in discriminator tokens with the units that its density scores."""

    trace: Trace
    tokens: TokenizedTrace
    unit_tokens: np.ndarray
    """[U]"""
    unit_starts: np.ndarray
    """[U]"""
    policy_tokens: bool = False
    """Whether `tokens` are the policy's own: both models share one tokenizer."""

    @property
    def unit_char_ends(self) -> np.ndarray:
        """[U] character end of each unit."""
        return np.asarray(self.tokens.char_ends, dtype=np.int64)[self.unit_tokens]

    def scores(self, logits: np.ndarray, version: int, refusal: str = "") -> TraceScores:
        """What a discriminator of `version` says of the units; none of them has a score without `logits`."""
        return TraceScores(
            logits=logits,
            unit_tokens=self.unit_tokens[: len(logits)],
            unit_char_ends=self.unit_char_ends[: len(logits)],
            discriminator_version=version,
            refusal=refusal,
        )


class TraceReader:
    """Reads traces as the discriminator does: its tokenizer, its density."""

    def __init__(self, renderer: Renderer, density: Density, policy_fingerprint: str) -> None:
        self.renderer = renderer
        self.density = density
        self.same_tokenizer = renderer.fingerprint == policy_fingerprint

    def read(self, trace: Trace) -> TraceUnits:
        tokens = self.renderer.tokenize(trace, same_tokenizer=self.same_tokenizer)
        units = unit_tokens(trace.text, tokens.char_ends, self.density)
        return TraceUnits(
            trace=trace,
            tokens=tokens,
            unit_tokens=units,
            unit_starts=unit_starts(units),
            policy_tokens=self.same_tokenizer,
        )


def sample_of(read: TraceUnits, *, positive: bool = False, pair_id: int = 0) -> DiscriminatorSample:
    """All units of a trace, for scoring (the label is then without meaning)."""
    return DiscriminatorSample(
        prompt_ids=read.tokens.prompt_ids,
        completion_ids=read.tokens.completion_ids,
        unit_tokens=read.unit_tokens,
        unit_starts=read.unit_starts,
        positive=positive,
        pair_id=pair_id,
    )


def trace_of(prompt: Prompt, rollout: Rollout) -> Trace:
    """The trace of one rollout, with the sampled tokens kept for a discriminator of the same tokenizer."""
    return Trace(
        prompt=prompt,
        text=rollout.text,
        finished=rollout.finish_reason == "stop",
        token_ids=rollout.token_ids,
    )
