"""What this project uses of vLLM's weight transfer, looked for in the installed version. Imports vllm on call.

The interface has changed its shape several times. Everything bound to it is here, in
`weight_transfer_vllm.py` (both ends of it) and in `VllmEngine` (the control calls).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rairl_ray.config.transport import Transport
from rairl_ray.errors import ModelError

WRITTEN_FOR = "0.32"

BACKENDS: Mapping[Transport, str] = {
    "object_store": "rairl_object_store", "nccl": "rairl_nccl", "ipc": "rairl_ipc",
}  # fmt: skip
"""Names under which `weight_transfer_vllm` registers its engines with vLLM."""

NEEDED: Mapping[str, tuple[str, ...]] = {
    "vllm": (
        "LLM.init_weight_transfer_engine", "LLM.start_weight_update", "LLM.update_weights",
        "LLM.finish_weight_update", "LLM.get_weight_version", "LLM.collective_rpc",
    ),
    "vllm.distributed.weight_transfer.base": (
        "WeightTransferEngine", "WeightTransferInitInfo", "WeightTransferUpdateInfo", "WeightSource",
        "ParamMeta", "TrainerWeightTransferEngine",
    ),
    "vllm.distributed.weight_transfer.factory": (
        "WeightTransferEngineFactory.register_engine", "WeightTransferTrainerFactory.trainer_init",
    ),
    "vllm.distributed.weight_transfer.nccl_engine": ("NCCLWeightTransferEngine", "NCCLTrainerInitInfo"),
    "vllm.distributed.weight_transfer.ipc_engine": ("IPCWeightTransferEngine", "IPCTrainerInitInfo"),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "get_layerwise_info", "initialize_layerwise_reload", "finalize_layerwise_reload",
    ),
}  # fmt: skip


def check_vllm(needed: Mapping[str, tuple[str, ...]] = NEEDED) -> None:
    """
    Raises:
        ModelError: one line with everything that the installed vLLM lacks.
    """
    missing = [f"{module}.{name}" for module, names in needed.items() for name in _absent(module, names)]
    if missing:
        version = getattr(import_module("vllm"), "__version__", "unknown")
        raise ModelError(
            f"rollout.engine=vllm: vLLM {version} has no {', '.join(missing)}; rairl-ray is written for vLLM "
            f"{WRITTEN_FOR}: install that version, or set rollout.engine=hf"
        )


def _absent(module: str, names: tuple[str, ...]) -> list[str]:
    try:
        found: Any = import_module(module)
    except ImportError:
        return list(names)
    return [name for name in names if not _has(found, name)]


def _has(module: Any, dotted: str) -> bool:
    for part in dotted.split("."):
        module = getattr(module, part, None)
    return module is not None
