"""The rollout actor: one engine in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Literal, NamedTuple

from rairl_ray.actors.group import RankActor
from rairl_ray.actors.weight_sync import WeightUpdate, fetched
from rairl_ray.config.machine_schema import Rollout
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.variants import complete
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.environment import compute_environment, threads_of
from rairl_ray.engines.rollout_engine import (
    Decode,
    EngineOptions,
    Generation,
    GenerationRequest,
    RolloutEngine,
    SamplingSettings,
    SyncReport,
    engine_options,
)
from rairl_ray.engines.sources import end_tokens
from rairl_ray.engines.weights import whole

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

    def sync(self, update: WeightUpdate, check_traces: Traces = ()) -> tuple[SyncReport, list[list[float]]]:
        """Take new weights; answers the version and checksum that the engine now serves, and its
        log-probabilities of the completions of `check_traces` ([N][T_i], at temperature 1)."""
        report = self.load(update)
        return report, self.engine.score_tokens([p for p, _ in check_traces], [c for _, c in check_traces])

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
    return ENGINES[config.rollout.engine].open(options, renderer.completion_text)


def rollout_environment(config: RunConfig, device: Literal["cpu", "cuda"]) -> dict[str, str]:
    """Environment of the actor's process, set before it starts."""
    return ENGINES[config.rollout.engine].environment(device, threads_of(config, "rollout"))


def _vllm_environment(device: Literal["cpu", "cuda"], threads: int) -> dict[str, str]:
    from rairl_ray.engines.vllm_engine import vllm_environment

    return vllm_environment(device=device, threads=threads)


class Engine(NamedTuple):
    """A kind of rollout engine; its library is imported in the actor's process alone."""

    module: str
    name: str
    """Of the class in `module`: a RolloutEngine, made from EngineOptions and Decode."""
    environment: Callable[[Literal["cpu", "cuda"], int], dict[str, str]]

    def open(self, options: EngineOptions, decode: Decode) -> RolloutEngine:
        engine: RolloutEngine = getattr(import_module(self.module), self.name)(options, decode)
        return engine


ENGINES = {
    "vllm": Engine("rairl_ray.engines.vllm_engine", "VllmEngine", _vllm_environment),
    "hf": Engine("rairl_ray.engines.hf_engine", "HfEngine", compute_environment),
}
complete(f"{__name__}.ENGINES", ENGINES, Rollout, "engine")
