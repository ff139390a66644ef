"""The discriminator of a run as a reward: what its learners hold at the moment, also a frozen foreign one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray.actors.discriminator import DiscriminatorWorkers
from rairl_ray.config.schema import Reward
from rairl_ray.rewards.reading import TraceReader, sample_of
from rairl_ray.types import Trace, TraceScores


class LiveReward:
    """Scores with the newest discriminator."""

    def __init__(self, workers: DiscriminatorWorkers, reader: TraceReader, reward: Reward) -> None:
        self._workers, self._reader = workers, reader
        self.reward = reward

    def score(self, traces: Sequence[Trace]) -> list[TraceScores]:
        reads = [self._reader.read(trace) for trace in traces]
        logits, version = self._workers.score([sample_of(read) for read in reads if len(read.unit_tokens)])
        answers = iter(logits)
        none = np.zeros(0, dtype=np.float32)
        return [read.scores(next(answers) if len(read.unit_tokens) else none, version) for read in reads]
