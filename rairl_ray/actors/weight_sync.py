"""A version of the policy on its way from the learner to the rollout actors: through the object store, or
pushed by the learner's GPUs (NCCL, CUDA IPC) with Ray carrying the control calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from torch import Tensor

from rairl_ray.engines.weights import Checksum, pack, unpack


@dataclass(frozen=True, kw_only=True)
class WeightUpdate:
    """What a rollout actor needs to serve one version."""

    version: int
    checksum: str
    """Of the tensors as the sender holds them; every engine must answer the same."""
    chunks: tuple[ray.ObjectRef, ...] | None
    """References to `weights.Packed` chunks; None: the learner has pushed them into the engines already."""
    adapter_config: Mapping[str, Any] | None = None
    """PEFT configuration of an adapter; None: weights."""


def put_update(
    chunks: Iterable[Mapping[str, Tensor]], version: int, adapter_config: Mapping[str, Any] | None
) -> WeightUpdate:
    """Put each chunk into the object store as it comes, and let it go before the next: one put, N readers."""
    digest, refs = Checksum(), []
    for chunk in chunks:
        if chunk:
            digest.update(chunk)
            refs.append(ray.put(pack(chunk)))
        del chunk
    return WeightUpdate(
        version=version, checksum=digest.hexdigest(), chunks=tuple(refs), adapter_config=adapter_config
    )


def fetched(chunks: Iterable[ray.ObjectRef]) -> Iterator[dict[str, Tensor]]:
    """The chunks of an update, one at a time, as views into the object store."""
    for ref in chunks:
        yield unpack(ray.get(ref))


class EngineClient:
    """The four control calls of vLLM's `VLLMWeightSyncClient`, to every rollout actor at once.

    vLLM's own Ray client gives all engines the same NCCL rank offset, which serves the workers of one engine;
    ours are engines of their own, so each gets the offset of its first worker.

    Not run: no GPU was available.
    """

    def __init__(self, handles: Sequence[Any], workers_per_engine: int, deadline_seconds: float) -> None:
        self._handles = list(handles)
        self._workers = workers_per_engine
        self._deadline = deadline_seconds
        self.version = 0
        """Version of the update under way."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        refs = []
        for index, handle in enumerate(self._handles):
            own = dict(init_info)
            if "rank_offset" in own:
                own["rank_offset"] += index * self._workers
            refs.append(handle.init_weight_transfer_engine.remote(own))
        self._wait(refs)

    def start_weight_update(self) -> None:
        self._wait([handle.start_weight_update.remote() for handle in self._handles])

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._wait([handle.update_weights.remote(update_info, self.version) for handle in self._handles])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._wait([handle.finish_weight_update.remote(self.version) for handle in self._handles])

    def _wait(self, refs: list[ray.ObjectRef]) -> None:
        ray.get(refs, timeout=self._deadline)
