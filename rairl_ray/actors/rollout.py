"""Rollout actors: one engine each, spread over the cluster; the driver sees `RolloutWorkers`."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, Literal

import ray

from rairl_ray.actors.group import ActorGroup, GroupFailure, Member, RankActor
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
from rairl_ray.engines.weights import unpack
from rairl_ray.keys import key_seed
from rairl_ray.types import Prompt, Rollout, RolloutGroup


class RolloutActor(RankActor):
    """One rollout engine in its own process."""

    def __init__(self, rank: int, config: RunConfig, policy_path: str, device: Literal["cpu", "cuda"]) -> None:
        super().__init__(rank)
        self._config = config
        self._policy_path = policy_path
        self._device = device
        self._engine: RolloutEngine | None = None

    def open(self) -> None:
        """Load the engine. It is STALE, and serves nothing, until its first sync."""
        self._engine = open_engine(self._config, self._policy_path, self._device)
        self._engine.sleep()

    @property
    def engine(self) -> RolloutEngine:
        if self._engine is None:
            raise RuntimeError("the rollout engine is not open; call open() first")
        return self._engine

    def generate(
        self, requests: list[GenerationRequest], sampling: SamplingSettings
    ) -> tuple[list[Generation], int | None]:
        """Completions in the order of the requests, and the version that made them."""
        generations = self.engine.generate(requests, sampling)
        self.engine.sleep()  # the learners work next
        return generations, self.engine.version

    def sync(self, payload: dict[str, Any], version: int) -> SyncReport:
        """Take new weights; answers the version and checksum that the engine now serves."""
        tensors = unpack(payload["tensors"])
        if payload["kind"] == "adapter":
            return self.engine.load_adapter(tensors, payload["adapter_config"], version)
        return self.engine.load_weights(tensors.items(), version)

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
    options = engine_options(config, model_path=policy_path, eos_id=renderer.eos_id, device=device)
    if config.rollout.engine == "vllm":
        from rairl_ray.engines.vllm_engine import VllmEngine

        return VllmEngine(options, renderer.decode)
    from rairl_ray.engines.hf_engine import HfEngine

    return HfEngine(options, renderer.decode)


class RolloutWorkers(ActorGroup):
    """All rollout replicas as one sampler."""

    def __init__(self, members: Sequence[Member], config: RunConfig, renderer: Renderer) -> None:
        super().__init__("rollout", members)
        self._config = config
        self._renderer = renderer

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
    ) -> list[RolloutGroup]:
        """Sample every prompt; the seed of each request is keyed by (run seed, stream, prompt, sample).

        All samples of a prompt go to one replica, which computes the prompt once (prefix caching).
        """
        count = samples_per_prompt or self._config.rollout.samples_per_prompt
        settings = sampling or SamplingSettings(
            temperature=self._config.rollout.temperature,
            top_p=self._config.rollout.top_p,
            max_tokens=self._config.rollout.max_completion_tokens,
        )
        prompt_ids = [self._renderer.prompt_ids(prompt) for prompt in prompts]
        shares = balance([len(ids) + settings.max_tokens for ids in prompt_ids], len(self))
        requests = [
            [
                GenerationRequest(prompt_ids=prompt_ids[i], seed=self._seed(stream, prompts[i], sample))
                for i in share
                for sample in range(count)
            ]
            for share in shares
        ]
        answers = self.call(
            "generate",
            self._config.timeouts.rollout_seconds,
            lambda actor, rank: actor.generate.remote(requests[rank], settings),
        )
        groups: dict[int, RolloutGroup] = {}
        for share, asked, (generations, version) in zip(shares, requests, answers, strict=True):
            for place, i in enumerate(share):
                rows = range(place * count, (place + 1) * count)
                rollouts = tuple(
                    _rollout(prompts[i], sample, generations[row], asked[row].seed, version)
                    for sample, row in enumerate(rows)
                )
                groups[i] = RolloutGroup(prompt=prompts[i], rollouts=rollouts)
        return [groups[i] for i in range(len(prompts))]

    def sync(self, payload: ray.ObjectRef, version: int) -> None:
        """Every replica loads the payload from the object store and must answer this version and one checksum.

        Raises:
            RuntimeError: when a replica answers another version, or replicas disagree on the checksum.
        """
        reports = self.call(
            "sync",
            self._config.timeouts.sync_seconds,
            lambda actor, _rank: actor.sync.remote(payload, version),
        )
        checksums = {report.checksum for report in reports}
        if any(report.version != version for report in reports) or len(checksums) != 1:
            raise RuntimeError(f"rollout: sync to version {version} was answered with {reports}")

    def close(self) -> None:
        if self.members:
            # A dead or hung engine cannot be closed politely; the kill below ends it.
            with contextlib.suppress(GroupFailure):
                self.call("close", 30, lambda actor, _rank: actor.close.remote())
        super().close()

    def _seed(self, stream: str, prompt: Prompt, sample: int) -> int:
        return key_seed(self._config.seed, "rollout", stream, prompt.id, sample) % 2**31


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
