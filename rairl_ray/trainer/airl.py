"""R-AIRL's own part of a step: train the discriminator, then let it score the policy's samples.

    groups ──> discriminator.score                    (only with reward.rescore: stamped d, for the drift)
    groups ──> labelled batch (experts +, samples -, perturbed experts -, replayed samples -)
                   └─> discriminator.update  x updates_per_policy_step      (version d -> d + n)
    groups ──> discriminator.score ──> unit rewards ──> token rewards        (stamped d + n)

The discriminator learns BEFORE it scores: the reward that the policy sees has already met these samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.actors.discriminator import DiscriminatorWorkers
from rairl_ray.actors.policy import PolicyWorkers
from rairl_ray.algorithms.negatives import perturb
from rairl_ray.algorithms.replay import ReplayBuffer
from rairl_ray.algorithms.rewards import clipped_count, unit_rewards
from rairl_ray.config.schema import Reward, RunConfig
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks.base import Task
from rairl_ray.keys import keyed_random, occurrences
from rairl_ray.metrics import PhaseTimer, mean
from rairl_ray.rewards.live import LiveReward
from rairl_ray.rewards.reading import TraceReader, TraceUnits, trace_of
from rairl_ray.rewards.scorer import rewarded_trace
from rairl_ray.trainer.discriminator_batch import LabelledTrace, labelled_batch, segment_logprobs
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.types import (
    Demonstration,
    DiscriminatorBatch,
    PolicySample,
    RewardedTrace,
    Rollout,
    RolloutGroup,
    Trace,
    TraceScores,
)

Candidate = tuple[Trace, Rollout | None]
"""A trace that gets a reward: a sample with its rollout, or an expert trace with None."""


class AirlStrategy:
    """Owns the discriminator's data: experts, negatives, replay. Knows no optimizer and no engine."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        sampler: PromptSampler,
        policy_renderer: Renderer,
        reader: TraceReader,
        discriminator: DiscriminatorWorkers,
        policy: PolicyWorkers,
    ) -> None:
        self._config = config
        self._task = task
        self._sampler = sampler
        self._renderer = policy_renderer
        self._reader = reader
        self._discriminator = discriminator
        self._policy = policy
        self.scorer = LiveReward(discriminator, reader, config.reward)
        self._arrived: list[TraceScores] | None = None
        """Scores of the step's traces before the discriminator learned from them (`reward.rescore`)."""
        self._replay = ReplayBuffer(config.discriminator.replay.capacity, config.seed)

    # --- the step ------------------------------------------------------------------------------

    def learn(self, groups: Sequence[RolloutGroup], step: int, timer: PhaseTimer) -> dict[str, float]:
        """Update the discriminator on the step's groups, which `score` is given next."""
        metrics: dict[str, float] = {}
        self._arrived = None
        if self._config.reward.rescore:
            with timer.phase(names.TIME_SCORE):
                self._arrived = self._score(self._candidates(groups))
                # What is measured changes nothing: kernels round by batch, and the update asks with its own.
                self._discriminator.forget_references()
        with timer.phase(names.TIME_DISCRIMINATOR):
            demonstrations = [self._sampler.demonstration(group.prompt.id) for group in groups]
            for repeat in range(self._config.discriminator.updates_per_policy_step):
                metrics = self.update(groups, demonstrations, epoch=f"step/{step}/{repeat}")
            self._replay.add([trace_of(group.prompt, r) for group in groups for r in group.rollouts])
        return metrics

    def score(
        self, groups: Sequence[RolloutGroup], timer: PhaseTimer
    ) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
        """Rewarded traces of each group under the newest discriminator."""
        with timer.phase(names.TIME_SCORE):
            candidates = self._candidates(groups)
            scores = self._score(candidates)
            rewarded, metrics = self._rewarded_groups(candidates, scores)
        if self._arrived is not None:
            metrics[names.REWARD_DRIFT] = _drift(self._arrived, scores, self._config.reward)
        return rewarded, metrics

    def update(
        self, groups: Sequence[RolloutGroup], demonstrations: Sequence[Demonstration], epoch: str
    ) -> dict[str, float]:
        """One discriminator update on these groups and the experts of the same prompts.

        `epoch` keys its perturbations and replay. With `discriminator.demonstrations_per_update` the experts
        come from their own cursor instead.
        """
        if self._config.discriminator.demonstrations_per_update is not None:
            demonstrations = self._sampler.next_demonstrations(
                self._config.discriminator.demonstrations_per_update
            )
        batch, dropped = self._batch(groups, demonstrations, epoch)
        result = self._discriminator.update(batch)
        return {
            **result.metrics,
            names.DISCRIMINATOR_VERSION: float(result.version),
            names.DISCRIMINATOR_DROPPED_PERTURBATIONS: float(dropped),
        }

    # --- who is positive, who is negative ------------------------------------------------------

    def _batch(
        self, groups: Sequence[RolloutGroup], demonstrations: Sequence[Demonstration], epoch: str
    ) -> tuple[DiscriminatorBatch, int]:
        config = self._config.discriminator
        pair_ids = {group.prompt.id: index for index, group in enumerate(groups)}
        labelled: list[LabelledTrace] = []
        dropped = 0
        places = occurrences(demonstration.prompt.id for demonstration in demonstrations)
        for demonstration, place in zip(demonstrations, places, strict=True):
            pair = pair_ids.setdefault(demonstration.prompt.id, len(pair_ids))
            copies, lost = self._perturbed(demonstration, again(epoch, place))
            dropped += lost
            for index, trace in enumerate([_expert_trace(demonstration), *copies]):
                read = self._reader.read(trace)
                labelled.append(LabelledTrace(read=read, positive=index == 0, pair_id=pair))
        for trace in self._policy_traces(groups, epoch):
            read = self._reader.read(trace)
            positive = (
                config.positives == "expert_and_correct" and self._task.grade(trace.prompt, trace.text).correct
            )
            pair = pair_ids.setdefault(trace.prompt.id, len(pair_ids))
            labelled.append(LabelledTrace(read=read, positive=positive, pair_id=pair))
        policy_logprobs = None
        if config.loss.needs.policy_logprobs:
            policy_logprobs = self._segment_logprobs([item.read for item in labelled])
        from_edit = config.perturbations.label == "from_edit"
        return labelled_batch(labelled, from_edit, policy_logprobs), dropped

    def _perturbed(self, demonstration: Demonstration, epoch: str) -> tuple[list[Trace], int]:
        config = self._config.discriminator.perturbations
        if config.count == 0:
            return [], 0
        key = (self._config.seed, demonstration.prompt.id, epoch)
        copies, dropped = perturb(demonstration, count=config.count, kinds=config.kinds, key=key)
        traces = [
            Trace(prompt=demonstration.prompt, text=copy.text, edit_char=copy.edit_char) for copy in copies
        ]
        return traces, dropped

    def _policy_traces(self, groups: Sequence[RolloutGroup], epoch: str) -> list[Trace]:
        """The groups' own samples, with a share replaced by replayed ones of earlier policies."""
        fresh: list[Trace] = []
        for group, place in zip(groups, occurrences(group.prompt.id for group in groups), strict=True):
            chosen = list(group.rollouts)
            limit = self._config.discriminator.negatives_per_prompt
            if limit is not None and limit < len(chosen):
                key = (self._config.seed, "negatives", again(epoch, place), group.prompt.id)
                chosen = keyed_random(*key).sample(chosen, limit)
            fresh += [trace_of(group.prompt, rollout) for rollout in chosen]
        count = round(self._config.discriminator.replay.share * len(fresh))
        replayed = self._replay.sample(count, (epoch,)) if count else []
        if replayed:
            keyed_random(self._config.seed, "replay-keep", epoch).shuffle(fresh)
            fresh = fresh[: len(fresh) - len(replayed)]
        return fresh + replayed

    def _segment_logprobs(self, reads: Sequence[TraceUnits]) -> list[np.ndarray]:
        """[U] per trace: log pi of each segment.

        Of every trace under the learner's newest policy, at the rollouts' temperature, over the whole
        vocabulary: the loss compares experts with samples, so a second policy (a stale sample's) or a second
        distribution (the engine's, renormalised over the nucleus) on one side would tell the labels apart.
        """
        tokens = [self._renderer.tokenize(read.trace, same_tokenizer=True) for read in reads]
        asked = [
            PolicySample(
                prompt_ids=token.prompt_ids,
                completion_ids=token.completion_ids,
                advantages=np.zeros(len(token.completion_ids), dtype=np.float32),
                sampling_logprobs=None,
            )
            for token in tokens
        ]
        answers = self._policy.logprobs(asked)
        return [
            segment_logprobs(read, token.char_ends, values)
            for read, token, values in zip(reads, tokens, answers, strict=True)
        ]

    # --- rewards -------------------------------------------------------------------------------

    def _score(self, candidates: Sequence[Sequence[Candidate]]) -> list[TraceScores]:
        return self.scorer.score([trace for traces in candidates for trace, _ in traces])

    def _rewarded_groups(
        self, candidates: Sequence[Sequence[Candidate]], trace_scores: Sequence[TraceScores]
    ) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
        scores = iter(trace_scores)
        rewarded: list[list[RewardedTrace]] = []
        values: list[float] = []
        clipped = units = unscored = 0
        outcomes: list[float] = []
        for traces in candidates:
            rows = []
            for trace, rollout in traces:
                score = next(scores)
                row = self._rewarded(trace, rollout, score, outcomes)
                rows.append(row)
                clipped += clipped_count(score.logits, self._config.reward)
                units += len(score.logits)
                if rollout is not None and len(score.logits):
                    values.append(float(row.token_rewards.mean()))
                unscored += rollout is not None and not len(score.logits)
            rewarded.append(rows)
        return rewarded, {
            names.REWARD_MEAN: mean(values),
            names.REWARD_STD: float(np.std(values)) if values else float("nan"),
            names.REWARD_CLIPPED_SHARE: clipped / max(units, 1),
            names.REWARD_UNSCORED: float(unscored),
            **({names.REWARD_OUTCOME: mean(outcomes)} if outcomes else {}),
        }

    def _candidates(self, groups: Sequence[RolloutGroup]) -> list[list[Candidate]]:
        return [self._candidates_of(group) for group in groups]

    def _candidates_of(self, group: RolloutGroup) -> list[Candidate]:
        """The group's samples, followed by its expert traces where `advantage.expert` asks for them."""
        traces: list[Candidate] = [(trace_of(group.prompt, r), r) for r in group.rollouts]
        copies = self._config.advantage.expert_copies(len(group.rollouts))
        if copies and group.rollouts:
            expert = _expert_trace(self._sampler.demonstration(group.prompt.id))
            traces += [(expert, None)] * copies
        return traces

    def _rewarded(
        self, trace: Trace, rollout: Rollout | None, scores: TraceScores, outcomes: list[float]
    ) -> RewardedTrace:
        outcome = None
        if trace.prompt.answer is not None:
            outcome = float(self._task.grade(trace.prompt, trace.text).correct)
            if rollout is not None:
                outcomes.append(outcome)
        rewards = unit_rewards(scores.logits, self._config.reward, outcome)
        return rewarded_trace(trace, rollout, scores, rewards, self._renderer, self._reader.same_tokenizer)

    # --- resume --------------------------------------------------------------------------------

    def state(self) -> dict[str, object]:
        return {"replay": self._replay.state()}

    def restore(self, state: dict) -> None:
        self._replay = ReplayBuffer.from_state(state["replay"])


def again(epoch: str, place: int) -> str:
    """The key of a prompt's occurrence in an update: drawn twice, it gets other draws the second time."""
    return f"{epoch}/again/{place}" if place else epoch


def _drift(before: Sequence[TraceScores], after: Sequence[TraceScores], config: Reward) -> float:
    """Mean absolute change of a unit's reward from one discriminator version to another."""
    changes = [
        np.abs(unit_rewards(new.logits, config, None) - unit_rewards(old.logits, config, None))
        for old, new in zip(before, after, strict=True)
    ]
    return float(np.concatenate(changes).mean()) if sum(map(len, changes)) else float("nan")


def _expert_trace(demonstration: Demonstration) -> Trace:
    if demonstration.completion is None:
        raise ValueError(f"prompt {demonstration.prompt.id} has no expert trace")
    return Trace(prompt=demonstration.prompt, text=demonstration.completion)
