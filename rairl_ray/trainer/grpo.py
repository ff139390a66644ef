"""GRPO: the same step as R-AIRL with verifiable rewards and no discriminator (docs/method.md 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.config.schema import Reward
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks.base import Task
from rairl_ray.data.verifiable_rewards import NAMES, verifiable_rewards
from rairl_ray.metrics import PhaseTimer, mean
from rairl_ray.rewards.reading import trace_of
from rairl_ray.types import RewardedTrace, RolloutGroup

CORRECTNESS = Reward(type="correctness")


class GrpoStrategy:
    """The same reward on every token of a trace.

    `correctness`: 1 for a right answer, else 0. `official`: the sum of all verifiable rewards.
    """

    def __init__(self, task: Task, renderer: Renderer, reward: Reward = CORRECTNESS) -> None:
        self._task = task
        self._renderer = renderer
        self._official = reward.type == "official"

    def rewards(
        self, groups: Sequence[RolloutGroup], step: int, timer: PhaseTimer
    ) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
        """One list of rewarded traces per group, and the step's reward metrics."""
        rewarded: list[list[RewardedTrace]] = []
        values: list[float] = []
        right: list[float] = []
        parts: dict[str, list[float]] = {name: [] for name in NAMES}
        with timer.phase(names.TIME_SCORE):
            for group in groups:
                traces = []
                for rollout in group.rollouts:
                    grade = self._task.grade(group.prompt, rollout.text)
                    verifiable = verifiable_rewards(grade, rollout.text)
                    right.append(float(grade.correct))
                    value = sum(verifiable.values()) if self._official else right[-1]
                    values.append(value)
                    for name, part in verifiable.items():
                        parts[name].append(part)
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
            names.REWARD_OUTCOME: mean(right),
            **{names.REWARD_VERIFIABLE.format(name=name): mean(part) for name, part in parts.items()},
        }

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: dict) -> None:
        del state
