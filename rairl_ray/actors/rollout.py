"""Rollout actors: one engine each, spread over the cluster; the driver sees `RolloutWorkers`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rairl_ray.actors.group import ActorGroup, GroupFailure, Interrupted, Member, Pending, RankActor
from rairl_ray.actors.weight_sync import WeightUpdate, fetched
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import balance
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.rollout_engine import (
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingSettings,
    SyncReport,
    engine_options,
)
from rairl_ray.engines.sources import end_tokens
from rairl_ray.engines.weights import whole
from rairl_ray.keys import key_seed, occurrences
from rairl_ray.types import Prompt, Rollout, RolloutGroup

Traces = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Prompt ids and completion ids of each trace."""


class RolloutActor(RankActor):
    """One rollout engine in its own process."""

    def __init__(self, rank: int, config: RunConfig, policy_path: str, device: Literal["cpu", "cuda"]) -> None:
        super().__init__(rank)
        self._config = config
        self._policy_path = policy_path
        self._device = device
        self._engine: RolloutEngine | None = None

    def open(self) -> None:
        """Load the engine, anew if there is one. It is STALE, and serves nothing, until its first sync."""
        self.close()
        self._engine = open_engine(self._config, self._policy_path, self._device)
        self._engine.sleep()

    @property
    def engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError("the rollout engine is not open; call open() first")
        return self._engine

    def generate(
        self, requests: list[GenerationRequest], sampling: SamplingSettings
    ) -> tuple[list[Generation], int | None, float]:
        """Completions in the order of the requests, the version that made them, and the seconds it took."""
        started = time.perf_counter()
        generations = self.engine.generate(requests, sampling)
        seconds = time.perf_counter() - started
        self.engine.sleep()  # the learners work next
        return generations, self.engine.version, seconds

    def sync(self, update: WeightUpdate, probe: Traces = ()) -> tuple[SyncReport, list[list[float]]]:
        """Take new weights; answers the version and checksum that the engine now serves, and its
        log-probabilities of the probe's completions ([N][T_i], at temperature 1)."""
        report = self.load(update)
        return report, self.engine.score_tokens([p for p, _ in probe], [c for _, c in probe])

    def load(self, update: WeightUpdate) -> SyncReport:
        if update.chunks is None:
            assert self.engine.version is not None and self.engine.checksum is not None
            return SyncReport(version=self.engine.version, checksum=self.engine.checksum, seconds=0.0)
        chunks = fetched(update.chunks)
        if update.adapter_config is not None:
            return self.engine.load_adapter(whole(chunks), update.adapter_config, update.version)
        return self.engine.load_weights(chunks, update.version)

    # What a learner calls while it pushes weights itself (vLLM's own verbs, see weight_sync.EngineClient).

    def init_weight_transfer_engine(self, init_info: Mapping[str, Any]) -> None:
        self._vllm.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        self._update_started = time.perf_counter()
        self._vllm.start_weight_update()

    def update_weights(self, update_info: Mapping[str, Any], version: int) -> None:
        self._vllm.update_weights(update_info, version)

    def finish_weight_update(self, version: int) -> None:
        self._vllm.finish_weight_update(version, self._update_started)

    @property
    def _vllm(self) -> Any:
        """The engine, where it is one that a learner can push weights into (config.transport)."""
        return self.engine

    def serve_disk_weights(self) -> None:
        """Declare the weights that the engine was opened with to be version 0."""
        self.engine.mark_synced(0)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def open_engine(config: RunConfig, policy_path: str, device: Literal["cpu", "cuda"]) -> RolloutEngine:
    """The engine that `rollout.engine` names; each heavy library is imported only where it is used."""
    renderer = Renderer(load_tokenizer(policy_path, config.model.policy), "")
    stops = {*renderer.stop_ids, *end_tokens(policy_path, config.model.policy.revision)}
    options = engine_options(
        config,
        model_path=policy_path,
        eos_id=renderer.eos_id,
        stop_ids=tuple(sorted(stops - {renderer.eos_id})),
        device=device,
    )
    if config.rollout.engine == "vllm":
        from rairl_ray.engines.vllm_engine import VllmEngine

        return VllmEngine(options, renderer.completion_text)
    from rairl_ray.engines.hf_engine import HfEngine

    return HfEngine(options, renderer.completion_text)


@dataclass(frozen=True)
class PendingGroups:
    """Sampling that was started; `shares` and `requests` are by replica."""

    prompts: tuple[Prompt, ...]
    count: int
    """Samples of each prompt."""
    shares: Sequence[Sequence[int]]
    requests: Sequence[Sequence[GenerationRequest]]
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


class RolloutWorkers(ActorGroup):
    """All rollout replicas as one sampler."""

    def __init__(self, members: Sequence[Member], config: RunConfig, renderer: Renderer) -> None:
        super().__init__("rollout", members)
        self._config = config
        self._renderer = renderer
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
        shares = balance([len(ids) + settings.max_tokens for ids in prompt_ids], len(self))
        requests = [
            [
                GenerationRequest(
                    prompt_ids=prompt_ids[i],
                    seed=sampling_seed(self._config.seed, stream, prompts[i].id, firsts[i] + sample),
                )
                for i in share
                for sample in range(count)
            ]
            for share in shares
        ]
        pending = self.submit(
            "generate",
            self._config.timeouts.rollout_seconds,
            lambda actor, rank: actor.generate.remote(requests[rank], settings),
        )
        return PendingGroups(tuple(prompts), count, shares, requests, pending)

    def collect(self, started: PendingGroups, unless: Callable[[], bool] | None = None) -> Sampled:
        """Wait for what `start` began; `unless` as in `generate`."""
        try:
            answers = self.wait(started.pending, unless)
        except Interrupted:
            self._busy = True
            raise
        groups: dict[int, RolloutGroup] = {}
        seconds = 0.0
        for share, asked, answer in zip(started.shares, started.requests, answers, strict=True):
            generations, version, spent = answer
            seconds = max(seconds, spent)
            for place, i in enumerate(share):
                rows = range(place * started.count, (place + 1) * started.count)
                rollouts = tuple(
                    _rollout(started.prompts[i], sample, generations[row], asked[row].seed, version)
                    for sample, row in enumerate(rows)
                )
                groups[i] = RolloutGroup(prompt=started.prompts[i], rollouts=rollouts)
        return Sampled([groups[i] for i in range(len(started.prompts))], seconds)

    def sync(self, update: WeightUpdate, probe: Traces = ()) -> list[list[list[float]]]:
        """Every replica takes the update and answers the sender's version and checksum.

        Returns:
            [replicas][traces][T_i] log-probabilities of the probe's completions.

        Raises:
            GroupFailure: naming the first replica that serves something else than was sent.
        """
        return self.finish_sync(self.start_sync(update, probe))

    def start_sync(self, update: WeightUpdate, probe: Traces = ()) -> PendingSync:
        """Submit a sync behind whatever is being sampled; samples started after it are of this version."""
        pending = self.submit(
            "sync",
            self._config.timeouts.sync_seconds,
            lambda actor, _rank: actor.sync.remote(update, probe),
        )
        return PendingSync(update, pending)

    def finish_sync(self, started: PendingSync) -> list[list[list[float]]]:
        """Wait for a sync and check its answers; returns and raises as `sync`."""
        update = started.update
        answers = self.wait(started.pending)
        for rank, (report, _) in enumerate(answers):
            if (report.version, report.checksum) != (update.version, update.checksum):
                raise self.refused(
                    rank,
                    f"policy version {update.version} left the learner with checksum {update.checksum}, and "
                    f"the engine now holds version {report.version} with checksum {report.checksum}: its "
                    "weights are not the learner's",
                )
        return [scores for _, scores in answers]

    def refused(self, rank: int, cause: str) -> GroupFailure:
        """The failure of a replica whose weights or numbers cannot be trusted."""
        member = self.members[rank]
        return GroupFailure(
            f"{member.name} failed in phase sync, last finished step {self.last_step}: {cause}",
            role=self.role,
            rank=rank,
            node=member.node,
            phase="sync",
            last_step=self.last_step,
        )

    @property
    def renderer(self) -> Renderer:
        """How the policy reads prompts."""
        return self._renderer

    def close(self) -> None:
        if self.members and not self._busy:
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


def rollout_environment(config: RunConfig, device: Literal["cpu", "cuda"], threads: int) -> dict[str, str]:
    """Environment of the actor's process, set before it starts."""
    if config.rollout.engine == "vllm":
        from rairl_ray.engines.vllm_engine import vllm_environment

        return vllm_environment(device=device, threads=threads)
    return {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
