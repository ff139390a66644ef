"""Keeps rollouts of later steps, which are sampled ahead while the learners work on this one.

With `trainer.max_staleness_steps = n` the groups of step t are sampled by policy version max(0, t - 1 - n),
always: actors do what they are given in order, and a sync is given to them between two samplings.

    replica:  | sample t+1 (version t-n)  | sync t-n+1 | sample t+2 (version t-n+1) | ...
    learners: | step t: reward, update    | step t+1 ...

So nothing depends on who is faster: n = 0 is the synchronous run, bit for bit, and a resumed run has the
groups that the interrupted one had. The buffer (at most n steps of groups) is KEPT in the checkpoint: the
weights that would be needed to sample it again are gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rairl_ray.actors.rollout import PendingGroups, PendingSync, RolloutWorkers, Sampled
from rairl_ray.actors.rollout_actor import Traces
from rairl_ray.actors.weight_sync import WeightUpdate
from rairl_ray.config.schema import RunConfig
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.types import Rollout, RolloutGroup

Check = Callable[[list[list[list[float]]]], dict[str, float]]
"""[replicas][traces][T_i] log-probabilities of `check_traces` -> metrics; raises when they cannot be right."""


@dataclass(frozen=True)
class StepRollouts:
    """The groups of one step as they are consumed."""

    groups: list[RolloutGroup]
    seconds: float
    """How long the slowest replica sampled; most of it beside earlier steps when running ahead."""
    dropped_groups: int
    """Groups that were older than the bound and are not trained on."""


@dataclass
class _Buffered:
    """A step's rollouts: being sampled (`pending`), or here (`sampled`)."""

    step: int
    rows: list[int]
    """Rows of the training split, in the order of the groups."""
    pending: PendingGroups | None = None
    sampled: Sampled | None = None


@dataclass(frozen=True)
class _Sync:
    pending: PendingSync
    check: Check | None


class RolloutBuffer:
    """Keeps the replicas up to n steps ahead of the learners; owns what they were asked and have not given."""

    def __init__(self, config: RunConfig, sampler: PromptSampler, rollouts: RolloutWorkers) -> None:
        self._steps = config.trainer.steps
        self._prompts_per_step = config.trainer.prompts_per_step
        self._bound = config.trainer.max_staleness_steps
        self._sampler = sampler
        self._rollouts = rollouts
        self._buffer: deque[_Buffered] = deque()
        self._waiting: deque[_Buffered | _Sync] = deque()
        """What the replicas were given, in that order; deadlines are met in that order too."""
        self.sync_metrics: dict[str, float] = {}
        """Of the newest sync that was waited for."""

    def get(self, step: int) -> StepRollouts:
        """The groups of `step`, for a policy at version step - 1; starts the sampling of step + n first."""
        newest = self._buffer[-1].step if self._buffer else step - 1
        for later in range(newest + 1, min(step + self._bound, self._steps) + 1):
            asked = _Buffered(later, self._sampler.next_rows(self._prompts_per_step))
            asked.pending = self._rollouts.start(self._sampler.prompts(asked.rows), f"train/{later}")
            self._buffer.append(asked)
            self._waiting.append(asked)
        item = self._buffer.popleft()
        assert item.step == step
        sampled = self._finish(item)
        groups = [group for group in sampled.groups if self._is_fresh(group, step)]
        dropped = len(sampled.groups) - len(groups)
        if not groups:  # all too old: a run resumed with a smaller bound
            sampled = self._rollouts.collect(
                self._rollouts.start(self._sampler.prompts(item.rows), f"train/{step}")
            )
            groups = sampled.groups
        return StepRollouts(groups, sampled.seconds, dropped)

    def sync(self, update: WeightUpdate, check_traces: Traces = (), check: Check | None = None) -> None:
        """Give new weights to the replicas, behind what they are sampling; waits for it only at n = 0.

        `check` judges the replicas' scores of `check_traces`; what it returns is in `sync_metrics` afterwards.
        """
        self._waiting.append(_Sync(self._rollouts.start_sync(update, check_traces), check))
        if not any(isinstance(item, _Buffered) for item in self._waiting):
            self.drain()

    def drain(self) -> None:
        """Wait until the replicas have done all that they were given (before evaluation and checkpoints)."""
        while self._waiting:
            self._finish_next()

    def state(self) -> dict[str, Any]:
        """The buffer as a JSON object; call `drain` before."""
        return {"steps": [_as_json(item) for item in self._buffer]}

    def restore(self, state: dict[str, Any]) -> None:
        """Take the buffer of a checkpoint instead of sampling anew."""
        self._buffer.clear()
        for saved in state["steps"]:
            prompts = self._sampler.prompts(saved["rows"])
            groups = [
                RolloutGroup(prompt=prompt, rollouts=tuple(_from_json(row) for row in rows))
                for prompt, rows in zip(prompts, saved["groups"], strict=True)
            ]
            self._buffer.append(
                _Buffered(saved["step"], saved["rows"], sampled=Sampled(groups, saved["seconds"]))
            )

    # --- inside ----------------------------------------------------------------------------------

    def _finish(self, item: _Buffered) -> Sampled:
        while item.sampled is None:
            self._finish_next()
        return item.sampled

    def _finish_next(self) -> None:
        item = self._waiting.popleft()
        if isinstance(item, _Sync):
            answers = self._rollouts.finish_sync(item.pending)
            self.sync_metrics = item.check(answers) if item.check else {}
        else:
            assert item.pending is not None
            item.sampled = self._rollouts.collect(item.pending)
            item.pending = None

    def _is_fresh(self, group: RolloutGroup, step: int) -> bool:
        return all(step - 1 - rollout.policy_version <= self._bound for rollout in group.rollouts)


def _as_json(item: _Buffered) -> dict[str, Any]:
    assert item.sampled is not None
    groups = [[asdict(rollout) for rollout in group.rollouts] for group in item.sampled.groups]
    return {"step": item.step, "rows": item.rows, "seconds": item.sampled.seconds, "groups": groups}


def _from_json(row: dict[str, Any]) -> Rollout:
    return Rollout(**{**row, "token_ids": tuple(row["token_ids"]), "logprobs": tuple(row["logprobs"])})
