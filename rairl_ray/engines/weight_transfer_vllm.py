"""Both ends of vLLM's weight transfer. Import it after `weight_transfer.check_vllm`: it imports vllm.

Engine side: three engines registered with vLLM. One loads chunks that it is handed in process (the rollout
actor reads them from the object store); the others are vLLM's own for NCCL and CUDA IPC. All three see every
tensor on its way into the model, so each answers the checksum of what arrived and what was never filled.

Learner side (`open_sender`): vLLM's trainer engines for NCCL and IPC over our learner's chunks. Written
against vLLM 0.32's source. NO GPU WAS AVAILABLE: the two GPU engines and the learner side have not been run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLWeightTransferEngine
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from rairl_ray.config.transport import Transport
from rairl_ray.engines.weight_transfer import BACKENDS
from rairl_ray.engines.weights import CHUNK_BYTES, Checksum

Report = tuple[str | None, list[str], list[str], str]
"""Of an update: what did not fit; parameters that got nothing; layers that got a part; checksum of it all."""

HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")


# --- the engine's side -----------------------------------------------------------------------------------


@dataclass
class NoInit(WeightTransferInitInfo):
    """The object store needs no rendezvous."""


@dataclass
class Chunk(WeightTransferUpdateInfo):
    named: list[tuple[str, Tensor]] = field(default_factory=list)


class Watched:
    """Mixin for vLLM's weight transfer engines: looks at every tensor between the transport and the model."""

    model: Any
    model_config: Any
    device: torch.device

    def start_weight_update(self) -> None:
        self._expected = {name.replace(".base_layer.", ".") for name, _ in self.model.named_parameters()}
        self._filled: set[str] = set()
        self._halves: list[str] = []
        self._fault: str | None = None
        self._digest = Checksum()
        super().start_weight_update()  # type: ignore[misc]
        load = self.model.load_weights

        def watched(weights: Iterable[tuple[str, Tensor]]) -> None:
            self._filled.update(load(self._passing(weights)))

        self.model.load_weights = watched  # what all transports hand their tensors to

    def receive_weights(self, update_info: Any) -> None:
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        except BaseException:
            del self.model.load_weights
            self._abandon()
            raise

    def finish_weight_update(self) -> None:
        del self.model.load_weights
        self._halves = [name for name, layer in self.model.named_modules() if _half_loaded(layer)]
        try:
            super().finish_weight_update()  # type: ignore[misc]
        except Exception as error:  # it must return: the worker would take the update for unfinished for ever
            self._fault = str(error)
            self._abandon()

    def report(self) -> Report:
        return self._fault, sorted(self._expected - self._filled), self._halves, self._digest.hexdigest()

    def _abandon(self) -> None:
        """Put the old tensors back into layers that are not whole.

        Else they would take the next update's first tensors for the rest of this one.
        """
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        finalize_layerwise_reload(self.model, self.model_config)

    def _passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` with a tied head, which transformers does not count among the parameters.

        On a CPU vLLM keeps a repacked copy of it, which would silently stay the old one.
        """
        tied = getattr(self.model_config.hf_text_config, "tie_word_embeddings", False)
        for name, tensor in weights:
            self._digest.add(name, tensor)
            yield name, tensor
            if tied and self.device.type == "cpu" and name.endswith(EMBEDDINGS):
                yield HEAD, tensor


def _half_loaded(layer: Any) -> bool:
    """Whether vLLM would go on with whatever memory held in the rest of this layer.

    True as well for one that is padded: an embedding, but no linear layer.
    """
    info = get_layerwise_info(layer)
    return info.can_load() and 0 < info.load_numel < info.load_numel_total


class _ChunkLoader(WeightTransferEngine[NoInit, Chunk]):
    """Loads chunks that are handed over in process, layer by layer as vLLM's own engines do."""

    init_info_cls, update_info_cls = NoInit, Chunk

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own ends with a synchronisation that raises where there is no accelerator
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Chunk) -> None:
        self.model.load_weights(update_info.named)

    def shutdown(self) -> None:
        pass


class ObjectStoreEngine(Watched, _ChunkLoader):
    pass


class NcclEngine(Watched, NCCLWeightTransferEngine):
    pass


class IpcEngine(Watched, IPCWeightTransferEngine):
    pass


for _transport, _engine in (("object_store", ObjectStoreEngine), ("nccl", NcclEngine), ("ipc", IpcEngine)):
    WeightTransferEngineFactory.register_engine(BACKENDS[_transport], _engine)  # type: ignore[index]


class TransferReport:
    """Worker extension. vLLM imports it in each of its workers, which registers the engines there as well."""

    weight_transfer_engine: Any

    def transfer_report(self) -> Report:
        return self.weight_transfer_engine.report()


# --- the learner's side ----------------------------------------------------------------------------------


class LearnerSource(WeightSource):
    """The learner's trained weights as vLLM's trainer engines read them; every pass makes a new checksum.

    Args:
        shapes: name, dtype and whole shape of what comes, in its order.
        chunks: starts a pass; tensors on this rank's device, the same names in the same order.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
        chunks: Callable[[], Iterator[Mapping[str, Tensor]]],
    ) -> None:
        self._metadata = [ParamMeta(*shape) for shape in shapes]
        self._chunks = chunks
        self.digest = Checksum()

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.digest = Checksum()
        for chunk in self._chunks():
            for name, tensor in chunk.items():
                self.digest.add(name, tensor)
                yield name, tensor


def open_sender(
    transport: Transport,
    source: LearnerSource,
    client: Any,
    *,
    rank: int,
    address: tuple[str, int],
    receivers: int,
) -> TrainerWeightTransferEngine:
    """vLLM's trainer engine, ready to send; every learner rank opens one, rank 0 sends.

    Args:
        client: vLLM's `VLLMWeightSyncClient`: four control calls that reach every engine.
        address: where rank 0 waits for the receivers (NCCL).
        receivers: vLLM workers over all engines.
    """
    if transport == "nccl":
        info: Any = NCCLTrainerInitInfo(
            rank=rank,
            master_address=address[0],
            master_port=address[1],
            world_size=1 + receivers,
            packed=True,
            packed_buffer_size_bytes=CHUNK_BYTES,
        )
    else:
        largest = max(meta.dtype.itemsize * torch.Size(meta.shape).numel() for meta in source.metadata())
        info = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(CHUNK_BYTES, largest))
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)
