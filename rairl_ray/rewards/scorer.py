"""What every reward is to the rest of the system: it scores the units of traces, and says with which version.

Three serve it: the live discriminator (`live.py`), a saved reward model (`saved.py`; a pool of them over a file
in `pool.py`) and the task's own grade (`grade.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rairl_ray.algorithms.density import backfill
from rairl_ray.config.schema import Reward
from rairl_ray.data.rendering import Renderer
from rairl_ray.types import RewardedTrace, Rollout, Trace, TraceScores


class Scorer(Protocol):
    """Scores the units of traces."""

    @property
    def reward(self) -> Reward:
        """How its scores become rewards (`algorithms.rewards.unit_rewards`)."""

    def score(self, traces: Sequence[Trace]) -> list[TraceScores]:
        """One answer a trace, with the version that gave it; no units where `refusal` says why."""


def rewarded_trace(
    trace: Trace, rollout: Rollout | None, scores: TraceScores, rewards: np.ndarray, policy: Renderer, own: bool
) -> RewardedTrace:
    """The trace with its units' rewards [U] on the policy's tokens. `rollout` is None for an expert trace.

    policy: how the policy reads traces. own: the units are on its tokens, and are matched by index, exactly;
    else by characters.
    """
    tokens = policy.tokenize(trace, same_tokenizer=True)
    unit_tokens = scores.unit_tokens if own else None
    return RewardedTrace(
        tokens=tokens,
        sampling_logprobs=None if rollout is None else np.asarray(rollout.logprobs, dtype=np.float32),
        token_rewards=backfill(scores.unit_char_ends, rewards, tokens.char_ends, unit_tokens),
        last_unit_reward=float(rewards[-1]) if len(rewards) else float("nan"),
        policy_version=-1 if rollout is None else rollout.policy_version,
        discriminator_version=scores.discriminator_version,
        expert=rollout is None,
    )
