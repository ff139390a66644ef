"""GRPO: the same step as R-AIRL with verifiable rewards and no discriminator (docs/method.md 4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.algorithms.rewards import unit_rewards
from rairl_ray.config.schema import Reward
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks.base import Task
from rairl_ray.data.verifiable_rewards import CORRECT_REWARD, CORRECTNESS, NAMES
from rairl_ray.metrics import PhaseTimer, mean
from rairl_ray.rewards.grade import TaskGrade
from rairl_ray.rewards.reading import trace_of
from rairl_ray.rewards.scorer import rewarded_trace
from rairl_ray.types import RewardedTrace, RolloutGroup

CORRECTNESS_ALONE = Reward(type="correctness")


class GrpoStrategy:
    """The task's own grade of a trace on each of its tokens."""

    def __init__(self, task: Task, renderer: Renderer, reward: Reward = CORRECTNESS_ALONE) -> None:
        self._renderer = renderer
        self.scorer = TaskGrade(task, reward)

    def learn(self, groups: Sequence[RolloutGroup], step: int, timer: PhaseTimer) -> dict[str, float]:
        """Nothing: the reward is given."""
        del groups, step, timer
        return {}

    def score(
        self, groups: Sequence[RolloutGroup], timer: PhaseTimer
    ) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
        """One list of rewarded traces per group, and the step's reward metrics."""
        with timer.phase(names.TIME_SCORE):
            pairs = [
                [(trace_of(group.prompt, rollout), rollout) for rollout in group.rollouts] for group in groups
            ]
            scores = self.scorer.score([trace for group in pairs for trace, _ in group])
            given = iter(scores)
            rewarded = []
            for group in pairs:
                rows = []
                for trace, rollout in group:
                    found = next(given)
                    rewards = unit_rewards(found.logits, self.scorer.reward)
                    rows.append(rewarded_trace(trace, rollout, found, rewards, self._renderer, own=True))
                rewarded.append(rows)
        values = [float(found.logits[0]) for found in scores]
        parts = {name: [found.parts[name] for found in scores] for name in NAMES}
        return rewarded, {
            names.REWARD_MEAN: mean(values),
            names.REWARD_STD: float(np.std(values)) if values else float("nan"),
            names.REWARD_OUTCOME: mean([value / CORRECT_REWARD for value in parts[CORRECTNESS]]),
            **{names.REWARD_VERIFIABLE.format(name=name): mean(part) for name, part in parts.items()},
        }

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: dict) -> None:
        del state
