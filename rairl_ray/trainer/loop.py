"""The training loop: who waits for whom, and nothing else.

    PromptSampler ──prompts──> RolloutWorkers ──[RolloutGroup, policy version p]──┐
                                   ^                                              v
                                   │                     reward.learn (airl: discriminator.update)
                              weight sync                reward.score (airl: its scores; grpo: the task's grade)
                              (p -> p + 1)                                        │ token rewards, stamped d
                                   │                                              v
                             PolicyWorkers <──[PolicyBatch]────────── advantages per group

One step runs strictly left to right; every arrow is a wait with a deadline. With
`trainer.max_staleness_steps` the rollouts of later steps are sampled meanwhile (trainer/rollout_buffer.py). The
loop knows the order, not the mathematics (rairl_ray/algorithms), not the machines (rairl_ray/actors).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.actors.policy import PolicyWorkers
from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.algorithms.advantages import advantages
from rairl_ray.config.schema import RunConfig
from rairl_ray.keys import keyed_random
from rairl_ray.metrics import PhaseTimer, mean
from rairl_ray.rewards.scorer import Scorer
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.trainer.rollout_buffer import RolloutBuffer, StepRollouts
from rairl_ray.trainer.sync_check import RARELY, SYNC_CHECK_TRACES, make_sync_check, samples_tell
from rairl_ray.types import PolicyBatch, PolicySample, RewardedTrace, RolloutGroup, UpdateResult


class Strategy(Protocol):
    """What distinguishes airl from grpo: where token rewards come from, and what learns to give them."""

    @property
    def scorer(self) -> Scorer:
        """The reward itself, over any traces."""

    def learn(self, groups: Sequence[RolloutGroup], step: int, timer: PhaseTimer) -> dict[str, float]:
        """Let the reward learn from the step's samples; its metrics."""

    def score(
        self, groups: Sequence[RolloutGroup], timer: PhaseTimer
    ) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
        """Rewarded traces of each group, and metrics."""

    def state(self) -> dict[str, object]: ...

    def restore(self, state: dict) -> None: ...


class Loop:
    """The parts of a run wired together; `step` is one policy step."""

    def __init__(
        self,
        config: RunConfig,
        sampler: PromptSampler,
        rollouts: RolloutWorkers,
        policy: PolicyWorkers,
        reward: Strategy,
    ) -> None:
        self.config = config
        self.rollouts = rollouts
        self.buffer = RolloutBuffer(config, sampler, rollouts)
        self.policy = policy
        self.reward = reward
        self._checked = False
        self.check = make_sync_check(sampler.fixed(SYNC_CHECK_TRACES, "probe"), rollouts.renderer, config)

    def step(
        self, step: int, timer: PhaseTimer
    ) -> tuple[dict[str, float], list[RolloutGroup], list[list[RewardedTrace]]]:
        """One whole step; returns its metrics, and for the log its rollouts and what each was rewarded with."""
        with timer.phase(names.TIME_ROLLOUT):
            rollouts = self.buffer.get(step)
        groups, replicas = rollouts.groups, len(self.rollouts)
        metrics = self.reward.learn(groups, step, timer)
        rewarded, measured = self.reward.score(groups, timer)
        batches = policy_batches(rewarded, self.config, step)
        with timer.phase(names.TIME_POLICY):
            result = self.policy.update(batches)
        self._check_samples(result)
        with timer.phase(names.TIME_SYNC):
            self.sync()
        metrics |= measured | rollout_metrics(rollouts, result.version - 1)
        metrics |= self.buffer.sync_metrics
        metrics |= result.metrics
        metrics[names.ROLLOUT_REPLICAS] = float(replicas)
        metrics[names.POLICY_VERSION] = float(result.version)
        return metrics, groups, rewarded

    def sync(self) -> None:
        """Give the newest policy to every rollout replica; each proves that it serves what the learner has.

        Raises:
            GroupFailure: an engine answers another version or checksum, or other log-probabilities.
        """
        update = self.policy.weights(self.rollouts.processes)
        every = self.config.rollout.sync_check_every
        if every is None:
            every = RARELY if samples_tell(self.config) else 1
        if not every or (self._checked and update.version % every):
            self.buffer.sync(update)
            return
        self._checked = True
        learner = self.policy.logprobs(self.check.samples, temperature=1.0)
        self.buffer.sync(
            update, self.check.traces, partial(self._compare, self.rollouts, update.version, learner)
        )

    def bring_up(self, replica: RolloutWorkers) -> None:
        """Give one new replica the newest policy, with the checks of `sync`; the learners must be at rest."""
        update = self.policy.weights(replica.processes)
        learner = self.policy.logprobs(self.check.samples, temperature=1.0)
        self._compare(replica, update.version, learner, replica.sync(update, self.check.traces))

    def _check_samples(self, result: UpdateResult) -> None:
        """The standing check of the engines: what they recorded of the step's samples. Raises GroupFailure."""
        gap = result.metrics.get(names.ROLLOUT_LOGPROB_GAP)
        if gap is None or not result.metrics[names.POLICY_TOKENS] or not samples_tell(self.config):
            return
        dtype = self.config.model.policy.dtype
        cause = self.check.refusal(gap, result.version - 1, dtype, "the samples of its step")
        if cause is not None:
            raise self.rollouts.refused(0, cause)

    def _compare(
        self,
        replicas: RolloutWorkers,
        version: int,
        learner: Sequence[np.ndarray],
        answers: Sequence[Sequence[Sequence[float]]],
    ) -> dict[str, float]:
        """The sync check's gap of the replica that is farthest from the learner."""
        gaps = [self.check.gap(learner, scores) for scores in answers]
        for place, gap in enumerate(gaps):
            cause = self.check.refusal(gap, version, self.config.model.policy.dtype)
            if cause is not None:
                raise replicas.refused(place, cause)
        return {names.SYNC_LOGPROB_GAP: max(gaps)}


def policy_batches(
    rewarded: Sequence[Sequence[RewardedTrace]], config: RunConfig, step: int
) -> list[PolicyBatch]:
    """Advantages per group, then one batch per optimizer update, each with its global denominators."""
    samples: list[PolicySample] = []
    for traces in rewarded:
        if not traces:
            continue
        per_trace = advantages(
            [trace.token_rewards for trace in traces],
            np.asarray([trace.last_unit_reward for trace in traces], dtype=np.float32),
            config.advantage,
        )
        for trace, values in zip(traces, per_trace, strict=True):
            sample = PolicySample(
                prompt_ids=trace.tokens.prompt_ids,
                completion_ids=trace.tokens.completion_ids,
                advantages=values,
                sampling_logprobs=trace.sampling_logprobs,
            )
            samples.append(sample)
    count = config.policy.minibatches_per_step
    if count > 1:
        keyed_random(config.seed, "minibatches", step).shuffle(samples)
    parts = [samples[index::count] for index in range(count)]
    return [policy_batch(part) for part in parts if part]


def policy_batch(samples: Sequence[PolicySample]) -> PolicyBatch:
    return PolicyBatch(
        samples=tuple(samples),
        total_tokens=sum(len(sample.completion_ids) for sample in samples),
        total_samples=len(samples),
    )


def rollout_metrics(step: StepRollouts, trained_version: int) -> dict[str, float]:
    """What the samples of a step look like; staleness is in policy versions, averaged over samples."""
    rollouts = [rollout for group in step.groups for rollout in group.rollouts]
    tokens = sum(len(rollout.token_ids) for rollout in rollouts)
    return {
        names.ROLLOUT_TOKENS: float(tokens),
        names.ROLLOUT_TOKENS_PER_SECOND: tokens / step.seconds if step.seconds else float("nan"),
        names.ROLLOUT_COMPLETION_TOKENS: tokens / len(rollouts) if rollouts else float("nan"),
        names.ROLLOUT_TRUNCATED: mean([float(r.finish_reason == "length") for r in rollouts]),
        names.ROLLOUT_STALENESS: mean([float(trained_version - r.policy_version) for r in rollouts]),
        names.ROLLOUT_FAILED_GROUPS: float(sum(not group.rollouts for group in step.groups)),
        names.ROLLOUT_DROPPED_GROUPS: float(step.dropped_groups),
    }
