"""What a rollout engine is: the contract that the vLLM and the Hugging Face engine both keep.

An engine samples completions and scores given ones, for ONE version of the policy at a time. It is opened
from a model on disk, which makes it STALE: it serves nothing before its first sync (`load_weights`,
`load_adapter`, or `mark_synced` where the weights on disk are the current ones). So a restarted engine can
never answer with old weights.

Log-probabilities are those of the distribution that was sampled from, in float32:
`log_softmax(logits / temperature)`; with `top_p < 1` renormalised over the nucleus, so they are higher than
a learner's full-vocabulary value by at most -log(top_p); at temperature 0 (greedy) `log_softmax(logits)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from rairl_ray.config.schema import RunConfig
from rairl_ray.config.transport import Transport, adapter_of, weight_transport
from rairl_ray.errors import DataError, ModelError
from rairl_ray.types import FinishReason

Decode = Callable[[Sequence[int]], str]
"""Completion ids -> text: `data.rendering.Renderer.completion_text`, which owns tokenisation."""


class StaleEngineError(RuntimeError):
    """The engine was asked to serve before its first sync."""


class WeightSyncError(RuntimeError):
    """Weights that do not fit the engine's model: names that are missing, unknown or of another shape."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine is opened; `engine_options` makes it from a run's configuration."""

    model_path: str
    """Folder or hub id of the weights it starts from."""
    eos_id: int
    """The token that ends a turn."""
    max_prompt_tokens: int
    max_completion_tokens: int
    stop_ids: tuple[int, ...] = ()
    """Other tokens that end a completion too."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"
    lora_rank: int | None = None
    """Largest adapter rank; None: the engine takes weights only."""
    partial_syncs: bool = False
    """A sync brings some layers, each whole; the others stay as they are on disk (a merged adapter)."""
    max_sequences: int = 256
    """Sequences decoded at once."""
    prefix_caching: bool = True
    tensor_parallel: int = 1
    memory_share: float = 0.5
    """CUDA: share of the device's memory."""
    cpu_cache_gib: float = 1.0
    """CPU: size of the key-value cache in GiB."""
    sleep: bool = False
    """CUDA: `sleep()` gives the memory back; elsewhere it does nothing."""
    weight_transport: Transport = "object_store"
    """vLLM: how full weights reach it; `object_store` is what `load_weights` needs."""

    @property
    def max_tokens(self) -> int:
        """Longest prompt + completion."""
        return self.max_prompt_tokens + self.max_completion_tokens


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    prompt_ids: tuple[int, ...]
    seed: int
    """Keys every random draw of this request (63 bits; `keys.key_seed`)."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    max_tokens: int
    """Longest completion, the end-of-sequence token included."""
    temperature: float = 1.0
    """0: greedy."""
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One sampled completion."""

    token_ids: tuple[int, ...]
    """[T], ending with the end-of-sequence token exactly when finish_reason is 'stop'."""
    logprobs: tuple[float, ...]
    """[T] log-probability of each token under the distribution it was sampled from (see the module)."""
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What an engine answers after a sync."""

    version: int
    checksum: str
    """`weights.Checksum` of the tensors as they were received."""
    seconds: float


class RolloutEngine(Protocol):
    """The contract; tests/engines/test_rollout_engines.py runs it against every engine."""

    @property
    def version(self) -> int | None:
        """Policy version that it serves; None before the first sync."""

    @property
    def checksum(self) -> str | None:
        """Checksum of the last sync; None before it, and after `mark_synced` without one."""

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        """One completion per request, in their order."""

    def score_tokens(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """[N][T_i] log-probabilities of given completion tokens, at temperature 1 over the full vocabulary."""

    def load_weights(self, chunks: Iterable[Mapping[str, Tensor]], version: int) -> SyncReport:
        """All weights of the model under their Hugging Face names (a tied head may be left out).

        With `EngineOptions.partial_syncs` those of some layers. One chunk after the other is loaded and let
        go; its tensors are read, never written.
        """

    def load_adapter(
        self, tensors: Mapping[str, Tensor], adapter_config: Mapping[str, Any], version: int
    ) -> SyncReport:
        """A LoRA adapter as PEFT saves it: its tensors (read, never written) and its adapter_config.json."""

    def mark_synced(self, version: int, checksum: str | None = None) -> None:
        """Declare the weights it was opened with to be policy `version`."""

    def sleep(self) -> None:
        """Give device memory back until the next call (only with `EngineOptions.sleep`, on CUDA)."""

    def wake(self) -> None: ...

    def close(self) -> None:
        """End the engine; it cannot be used afterwards. Closing twice is harmless."""


def engine_options(
    config: RunConfig,
    *,
    model_path: str,
    eos_id: int,
    stop_ids: tuple[int, ...] = (),
    device: Literal["cpu", "cuda"],
) -> EngineOptions:
    """The rollout engine of a run. `model_path` is where `model.policy` lies by now (engines.models)."""
    policy, rollout = config.model.policy, config.rollout
    return EngineOptions(
        model_path=model_path,
        eos_id=eos_id,
        stop_ids=stop_ids,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_completion_tokens=rollout.max_completion_tokens,
        revision=policy.revision if model_path == policy.path else None,
        trust_remote_code=policy.trust_remote_code,
        dtype=policy.dtype,
        device=device,
        lora_rank=policy.lora.rank if adapter_of(config) == "served" else None,
        partial_syncs=adapter_of(config) == "merged",
        max_sequences=rollout.max_sequences,
        prefix_caching=rollout.prefix_caching,
        tensor_parallel=rollout.tensor_parallel,
        memory_share=rollout.memory_share,
        cpu_cache_gib=rollout.cpu_cache_gib,
        sleep=rollout.sleep,
        weight_transport=weight_transport(config, device),
    )


class SyncState:
    """Which version an engine serves: the bookkeeping that both engines share."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.checksum: str | None = None

    def require(self) -> None:
        if self.version is None:
            raise StaleEngineError(
                "the rollout engine has no policy version yet: sync it (load_weights, load_adapter or "
                "mark_synced) before it serves"
            )

    def begin(self) -> None:
        """A sync that fails half-way must leave the engine stale, not half new."""
        self.version = self.checksum = None

    def finish(self, checksum: str, version: int, started: float) -> SyncReport:
        self.version, self.checksum = version, checksum
        return SyncReport(version=version, checksum=checksum, seconds=time.perf_counter() - started)


def check_requests(
    requests: Sequence[GenerationRequest], sampling: SamplingSettings, options: EngineOptions
) -> None:
    """Refuse what the engine's window cannot hold, instead of cutting completions short without a word."""
    longest = max((len(request.prompt_ids) for request in requests), default=0)
    if longest + sampling.max_tokens > options.max_tokens:
        raise DataError(
            f"a prompt of {longest} tokens with a completion of up to {sampling.max_tokens} is longer than the "
            f"rollout engine's window of {options.max_tokens} tokens; raise data.max_prompt_tokens or "
            "rollout.max_completion_tokens"
        )
    if any(not request.prompt_ids for request in requests):
        raise DataError("a prompt has no tokens; check data.system_prompt and the chat template")


def check_completions(
    prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], options: EngineOptions
) -> None:
    """Refuse traces that cannot be scored; an empty completion has no scores, and that is fine."""
    for prompt, completion in zip(prompt_ids, completion_ids, strict=True):
        if not prompt or len(prompt) + len(completion) > options.max_tokens:
            raise DataError(
                f"a trace of {len(prompt)} prompt + {len(completion)} completion tokens cannot be scored: "
                f"the rollout engine's window has 1 to {options.max_tokens} tokens; raise "
                "data.max_prompt_tokens or rollout.max_completion_tokens"
            )


def check_adapter(adapter_config: Mapping[str, Any], options: EngineOptions) -> None:
    """Refuse an adapter that the engine was not opened for."""
    rank = max([int(adapter_config["r"]), *(adapter_config.get("rank_pattern") or {}).values()])
    if options.lora_rank is None:
        raise ModelError(
            f"an adapter of rank {rank} cannot be loaded: model.policy.lora.rank is null, so the rollout "
            f"engine was opened for full weights; set model.policy.lora.rank={rank}"
        )
    if rank > options.lora_rank:
        raise ModelError(
            f"an adapter of rank {rank} cannot be loaded: the rollout engine was opened for "
            f"model.policy.lora.rank={options.lora_rank}; set model.policy.lora.rank={rank}"
        )
