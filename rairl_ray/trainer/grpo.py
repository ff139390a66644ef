"""GRPO: the same step as R-AIRL with the task's correctness as reward and no discriminator (METHOD 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks.base import Task
from rairl_ray.metrics import PhaseTimer, mean
from rairl_ray.rewards.reading import trace_of
from rairl_ray.types import RewardedTrace, RolloutGroup


class GrpoStrategy:
    """Reward 1 for a correct answer, else 0, on every token of the trace."""

    def __init__(self, task: Task, renderer: Renderer) -> None:
        self._task = task
        self._renderer = renderer

    def rewards(
        self, groups: Sequence[RolloutGroup], step: int, timer: PhaseTimer
    ) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
        """One list of rewarded traces per group, and the step's reward metrics."""
        rewarded: list[list[RewardedTrace]] = []
        values: list[float] = []
        with timer.phase(names.TIME_SCORE):
            for group in groups:
                traces = []
                for rollout in group.rollouts:
                    value = float(self._task.grade(group.prompt, rollout.text).correct)
                    values.append(value)
                    tokens = self._renderer.tokenize(trace_of(group.prompt, rollout), same_tokenizer=True)
                    traces.append(
                        RewardedTrace(
                            tokens=tokens,
                            sampling_logprobs=np.asarray(rollout.logprobs, dtype=np.float32),
                            token_rewards=np.full(len(tokens.completion_ids), value, dtype=np.float32),
                            last_unit_reward=value,
                            policy_version=rollout.policy_version,
                            discriminator_version=None,
                        )
                    )
                rewarded.append(traces)
        return rewarded, {
            names.REWARD_MEAN: mean(values),
            names.REWARD_STD: float(np.std(values)) if values else float("nan"),
            names.REWARD_OUTCOME: mean(values),
        }

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: dict) -> None:
        del state
