"""Checks that engines compute what the learner does: a few fixed traces after a sync, the samples of each step.

The checksum says that the right bytes arrived; these say that the engine computes the same function of them.
Both sides score the fixed traces at temperature 1 over the whole vocabulary, whatever the rollouts sample with.
The samples cost nothing: what sampling recorded against what the learner's first pass over them computes
(`rollout/logprob_gap`). They tell the same where both mean one distribution: on-policy, `top_p: 1`, no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rairl_ray.config.schema import RunConfig
from rairl_ray.data.rendering import Renderer
from rairl_ray.types import Demonstration, PolicySample, Trace

SYNC_CHECK_TRACES = 4
SYNC_CHECK_TOKENS = 64
"""Completion tokens of a trace that are compared, at most."""

RARELY = 50
"""Syncs from one check to the next where every step's samples are compared."""

LARGEST_GAP = {"float32": 1e-3, "bfloat16": 0.1}
"""Default of `rollout.max_sync_logprob_gap` by model.policy.dtype, well above what was measured on a CPU."""


@dataclass(frozen=True, kw_only=True)
class SyncCheck:
    """The fixed traces, and how far an engine's log-probabilities of them may lie from the learner's."""

    samples: tuple[PolicySample, ...]
    bound: float

    @property
    def traces(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """(prompt ids, completion ids), as `RolloutEngine.score_tokens` takes them."""
        return [(sample.prompt_ids, sample.completion_ids) for sample in self.samples]

    def gap(self, learner: Sequence[np.ndarray], engine: Sequence[Sequence[float]]) -> float:
        """Mean |difference| a token between the learner's and one engine's log-probabilities, each [N][T_i]."""
        differences = np.concatenate(learner) - np.concatenate([np.asarray(row) for row in engine])
        return float(np.abs(differences).mean())

    def refusal(self, gap: float, version: int, dtype: str, where: str = "") -> str | None:
        """Why an engine with this gap cannot be trusted; None where it can. A NaN cannot."""
        if gap <= self.bound:
            return None
        where = where or f"the sync check's {len(self.samples)} traces"
        return (
            f"policy version {version} arrived whole, but its log-probabilities are {gap:.3g} a token away "
            f"from the learner's on {where}, and at most {self.bound:g} is "
            f"allowed (rollout.max_sync_logprob_gap, for model.policy.dtype={dtype}): the engine does not "
            "compute what the learner computes; if their numerics differ by intent, raise the bound"
        )


def samples_tell(config: RunConfig) -> bool:
    """Whether `rollout/logprob_gap` of a step is rounding alone where engines compute what the learner does."""
    fresh = config.trainer.max_staleness_steps == 0
    return fresh and config.rollout.top_p == 1.0 and config.model.policy.lora.dropout == 0.0


def make_sync_check(
    demonstrations: Sequence[Demonstration], renderer: Renderer, config: RunConfig
) -> SyncCheck:
    """The sync check of a run, from a few of its training problems.

    Where there is no expert trace (grpo) the second half of the prompt is scored instead.
    """
    longest = min(SYNC_CHECK_TOKENS, config.rollout.max_completion_tokens)
    samples = []
    for item in demonstrations:
        prompt = renderer.prompt_ids(item.prompt)
        if item.completion is None:
            prompt, completion = prompt[: len(prompt) // 2], prompt[len(prompt) // 2 :]
        else:
            trace = Trace(prompt=item.prompt, text=item.completion)
            completion = renderer.tokenize(trace, same_tokenizer=True).completion_ids
        completion = completion[:longest]
        samples.append(
            PolicySample(
                prompt_ids=prompt,
                completion_ids=completion,
                advantages=np.zeros(len(completion), dtype=np.float32),
                sampling_logprobs=None,
            )
        )
    bound = config.rollout.max_sync_logprob_gap or LARGEST_GAP[config.model.policy.dtype]
    return SyncCheck(samples=tuple(samples), bound=bound)
