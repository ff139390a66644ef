"""The task's own grade as a reward: one unit a trace, the whole of it (docs/method.md 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rairl_ray.config.schema import Reward
from rairl_ray.config.variants import complete
from rairl_ray.data.tasks.base import Task
from rairl_ray.data.verifiable_rewards import CORRECT_REWARD, CORRECTNESS, verifiable_rewards
from rairl_ray.types import Trace, TraceScores

VALUES: dict[str, Callable[[Mapping[str, float]], float]] = {
    "correctness": lambda parts: parts[CORRECTNESS] / CORRECT_REWARD,
    "official": lambda parts: sum(parts.values()),
}
"""A trace's value from its verifiable rewards."""
complete(f"{__name__}.VALUES", {**VALUES, "discriminator": None}, Reward, "type")


class TaskGrade:
    """Scores with the task's grader.

    `correctness`: 1 for a right answer, else 0. `official`: the sum of all verifiable rewards.
    """

    def __init__(self, task: Task, reward: Reward) -> None:
        self._task = task
        # A grade is a reward already: clip and temperature are those of learned logits.
        self.reward = Reward(type=reward.type)

    def score(self, traces: Sequence[Trace]) -> list[TraceScores]:
        return [self._scores(trace) for trace in traces]

    def _scores(self, trace: Trace) -> TraceScores:
        parts = verifiable_rewards(self._task.grade(trace.prompt, trace.text), trace.text)
        return TraceScores(
            logits=np.array([VALUES[self.reward.type](parts)]),
            unit_tokens=np.array([max(len(trace.token_ids or ()) - 1, 0)]),
            unit_char_ends=np.array([len(trace.text) + 1]),
            discriminator_version=None,
            parts=parts,
        )
