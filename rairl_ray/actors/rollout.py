"""All rollout replicas as one sampler, which is what the driver sees of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rairl_ray.actors.group import ActorGroup, ActorProcess, GroupFailure, Interrupted, Pending
from rairl_ray.actors.rollout_actor import Traces
from rairl_ray.actors.weight_sync import WeightUpdate
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import balance
from rairl_ray.data.rendering import Renderer
from rairl_ray.engines.rollout_engine import (
    Generation,
    GenerationRequest,
    SamplingSettings,
)
from rairl_ray.keys import key_seed, occurrences
from rairl_ray.types import Prompt, Rollout, RolloutGroup


@dataclass(frozen=True)
class PendingGroups:
    """Sampling that was started; `shares` (of the prompts) and `requests` are by rank."""

    prompts: tuple[Prompt, ...]
    count: int
    """Samples of each prompt."""
    shares: Mapping[int, Sequence[int]]
    requests: Mapping[int, Sequence[GenerationRequest]]
    settings: SamplingSettings
    pending: Pending


@dataclass(frozen=True)
class PendingSync:
    """A sync that was submitted; it keeps the update's chunks alive until the engines have read them."""

    update: WeightUpdate
    pending: Pending


@dataclass(frozen=True)
class Sampled:
    """What `collect` answers."""

    groups: list[RolloutGroup]
    """In the order of the prompts."""
    seconds: float
    """How long the slowest replica sampled."""


Answer = tuple[list[Generation], int | None, float]
"""Of one replica: completions in the order of its requests, the version that made them, and the seconds."""


class RolloutWorkers(ActorGroup):
    """All rollout replicas as one sampler. Ranks only grow: a replica that has left leaves a gap."""

    by_themselves = frozenset({"generate"})

    def __init__(self, processes: Sequence[ActorProcess], config: RunConfig, renderer: Renderer) -> None:
        super().__init__("rollout", processes)
        self._config = config
        self._renderer = renderer
        self.lost: Callable[[GroupFailure], None] | None = None
        """Takes a lost replica out of the group, or puts another in its place; raises the failure where neither
        may be (pool.py). None: a lost replica is a failure of the group."""
        self._busy = False
        """Whether the engines still sample what nobody waits for."""

    def open(self) -> None:
        self.call("open", self._config.timeouts.start_seconds, lambda actor, _rank: actor.open.remote())

    def serve_disk_weights(self) -> None:
        """Serve the model as it lies on disk, as version 0 (SFT evaluates before any learner exists)."""
        deadline = self._config.timeouts.sync_seconds
        self.call("sync", deadline, lambda actor, _rank: actor.serve_disk_weights.remote())

    def generate(
        self,
        prompts: Sequence[Prompt],
        stream: str,
        samples_per_prompt: int | None = None,
        sampling: SamplingSettings | None = None,
        unless: Callable[[], bool] | None = None,
    ) -> list[RolloutGroup]:
        """Sample every prompt; the seed of each request is keyed by (run seed, stream, prompt, sample).

        Raises:
            Interrupted: `unless` said True before all was sampled; then only `close` is left to call.
        """
        return self.collect(self.start(prompts, stream, samples_per_prompt, sampling), unless).groups

    def start(
        self,
        prompts: Sequence[Prompt],
        stream: str,
        samples_per_prompt: int | None = None,
        sampling: SamplingSettings | None = None,
    ) -> PendingGroups:
        """Start to sample; the version that serves is the one of the newest `sync` submitted before.

        All samples of a prompt go to one replica, which computes the prompt once (prefix caching).
        """
        count = samples_per_prompt or self._config.rollout.samples_per_prompt
        settings = sampling or SamplingSettings(
            temperature=self._config.rollout.temperature,
            top_p=self._config.rollout.top_p,
            max_tokens=self._config.rollout.max_completion_tokens,
        )
        prompt_ids = [self._renderer.prompt_ids(prompt) for prompt in prompts]
        # A problem that is drawn twice goes on counting, so its samples are others.
        firsts = [count * place for place in occurrences(prompt.id for prompt in prompts)]
        costs = [len(ids) + settings.max_tokens for ids in prompt_ids]
        shares = self._shared(costs)
        requests = {
            rank: [
                GenerationRequest(
                    prompt_ids=prompt_ids[i],
                    seed=sampling_seed(self._config.seed, stream, prompts[i].id, firsts[i] + sample),
                )
                for i in share
                for sample in range(count)
            ]
            for rank, share in shares.items()
        }
        pending = self._sample(requests, settings)
        return PendingGroups(tuple(prompts), count, shares, requests, settings, pending)

    def collect(self, started: PendingGroups, unless: Callable[[], bool] | None = None) -> Sampled:
        """Wait for what `start` began; `unless` as in `generate`."""
        try:
            answers = self._answers(started.requests, started, started.pending, unless)
        except Interrupted:
            self._busy = True
            raise
        groups: dict[int, RolloutGroup] = {}
        seconds = 0.0
        for rank, share in started.shares.items():
            asked = started.requests[rank]
            generations, version, spent = answers[rank]
            seconds = max(seconds, spent)
            for place, i in enumerate(share):
                rows = range(place * started.count, (place + 1) * started.count)
                rollouts = tuple(
                    _rollout(started.prompts[i], sample, generations[row], asked[row].seed, version)
                    for sample, row in enumerate(rows)
                )
                groups[i] = RolloutGroup(prompt=started.prompts[i], rollouts=rollouts)
        return Sampled([groups[i] for i in range(len(started.prompts))], seconds)

    def _shared(self, costs: Sequence[int]) -> dict[int, list[int]]:
        """Rank -> its share of things of these costs."""
        shares = balance(costs, len(self))
        return {process.rank: share for process, share in zip(self.processes, shares, strict=True)}

    def _sample(
        self, requests: Mapping[int, Sequence[GenerationRequest]], settings: SamplingSettings
    ) -> Pending:
        return self.submit(
            "generate",
            self._config.timeouts.rollout_seconds,
            lambda actor, rank: actor.generate.remote(requests[rank], settings),
        )

    def _answers(
        self,
        requests: Mapping[int, Sequence[GenerationRequest]],
        started: PendingGroups,
        pending: Pending,
        unless: Callable[[], bool] | None,
    ) -> dict[int, Answer]:
        """Rank -> the answer to its requests; what a lost replica was asked, all sample again."""
        answers = self._wait_for_those_left(pending, unless)
        for rank in requests.keys() - answers.keys():
            answers[rank] = self._sampled_again(requests[rank], started, unless)
        return answers

    def _sampled_again(
        self, requests: Sequence[GenerationRequest], started: PendingGroups, unless: Callable[[], bool] | None
    ) -> Answer:
        """A lost share, divided among all replicas by whole prompts; their seeds give the same samples."""
        shares = self._shared([1] * (len(requests) // started.count))
        rows = {
            rank: [prompt * started.count + i for prompt in share for i in range(started.count)]
            for rank, share in shares.items()
        }
        asked = {rank: [requests[row] for row in own] for rank, own in rows.items()}
        answers = self._answers(asked, started, self._sample(asked, started.settings), unless)
        made = {
            row: generation
            for rank, own in rows.items()
            for row, generation in zip(own, answers[rank][0], strict=True)
        }
        versions = [version for _, version, _ in answers.values()]
        seconds = max(spent for *_, spent in answers.values())
        return [made[row] for row in range(len(requests))], versions[0], seconds

    def _wait_for_those_left(
        self, pending: Pending, unless: Callable[[], bool] | None = None
    ) -> dict[int, Any]:
        """Rank -> result of a call, without those of replicas that were lost meanwhile."""
        lost = set[int]()
        while True:
            try:
                self.wait(pending, unless)
                break
            except GroupFailure as failure:
                if self.lost is None or failure.phase != pending.phase or failure.rank is None:
                    raise
                self.lost(failure)
                lost.add(failure.rank)
                refs = {ref: process for ref, process in pending.refs.items() if process.rank not in lost}
                pending = replace(pending, refs=refs)
                self._queue.append(pending)
        return {rank: result for rank, result in pending.results.items() if rank not in lost}

    def alone(self, process: ActorProcess) -> RolloutWorkers:
        """A replica that does not belong to the group yet, as a group of one."""
        one = RolloutWorkers([process], self._config, self._renderer)
        one.monitor, one.last_step = self.monitor, self.last_step
        return one

    def sync(self, update: WeightUpdate, check_traces: Traces = ()) -> list[list[list[float]]]:
        """Every replica takes the update and answers the sender's version and checksum.

        Returns:
            [replicas][traces][T_i] log-probabilities of the completions of `check_traces`.

        Raises:
            GroupFailure: naming the first replica that serves something else than was sent.
        """
        return self.finish_sync(self.start_sync(update, check_traces))

    def start_sync(self, update: WeightUpdate, check_traces: Traces = ()) -> PendingSync:
        """Submit a sync behind whatever is being sampled; samples started after it are of this version."""
        pending = self.submit(
            "sync",
            self._config.timeouts.sync_seconds,
            lambda actor, _rank: actor.sync.remote(update, check_traces),
        )
        return PendingSync(update, pending)

    def finish_sync(self, started: PendingSync) -> list[list[list[float]]]:
        """Wait for a sync and check its answers; returns and raises as `sync`."""
        update = started.update
        answers = self._wait_for_those_left(started.pending)
        for place, process in enumerate(self.processes):
            report, _ = answers[process.rank]
            if (report.version, report.checksum) != (update.version, update.checksum):
                raise self.refused(
                    place,
                    f"policy version {update.version} left the learner with checksum {update.checksum}, and "
                    f"the engine now holds version {report.version} with checksum {report.checksum}: its "
                    "weights are not the learner's",
                )
        return [answers[process.rank][1] for process in self.processes]

    def refused(self, place: int, cause: str) -> GroupFailure:
        """The failure of the `place`-th replica, whose weights or numbers cannot be trusted."""
        process = self.processes[place]
        return GroupFailure(
            f"{process.name} failed in phase sync, last finished step {self.last_step}: {cause}",
            role=self.role,
            rank=process.rank,
            node=process.node,
            phase="sync",
            last_step=self.last_step,
        )

    @property
    def renderer(self) -> Renderer:
        """How the policy reads prompts."""
        return self._renderer

    def close(self) -> None:
        if self.processes and not self._busy:
            self.forget()
            # A dead or hung engine cannot be closed politely; the kill below ends it.
            with contextlib.suppress(GroupFailure):
                deadline = self._config.timeouts.teardown_seconds
                self.call("close", deadline, lambda actor, _rank: actor.close.remote())
        super().close()


def sampling_seed(run_seed: int, stream: str, prompt_id: str, sample: int) -> int:
    """The seed of one request: a run, its final evaluation and a later `evaluate` draw the same samples."""
    return key_seed(run_seed, "rollout", stream, prompt_id, sample) % 2**31


def _rollout(prompt: Prompt, sample: int, made: Generation, seed: int, version: int | None) -> Rollout:
    return Rollout(
        prompt_id=prompt.id,
        sample_index=sample,
        text=made.text,
        token_ids=made.token_ids,
        logprobs=made.logprobs,
        finish_reason=made.finish_reason,
        policy_version=-1 if version is None else version,
        seed=seed,
    )
