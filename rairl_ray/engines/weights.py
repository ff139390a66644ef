"""Weights on their way between processes: named tensors as numpy views, and their checksum.

A numpy view travels through Ray's object store without a copy; torch tensors do not (RUNTIME.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

Packed = dict[str, tuple[np.ndarray, str]]
"""Name -> (array, torch dtype name). bfloat16, which numpy lacks, travels as its int16 bits."""

WRAPPER_PREFIX = "wrapped."
"""Attribute under which the modules of heads.py hold the Hugging Face or PEFT model."""


def exported_name(name: str) -> str:
    """Parameter name of a module of heads.py -> the name in a Hugging Face or PEFT weight file."""
    name = name.removeprefix(WRAPPER_PREFIX)
    name = name.replace(".modules_to_save.default.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def pack(named: Mapping[str, Tensor]) -> Packed:
    """CPU tensors as numpy views (no copy for contiguous CPU tensors)."""
    packed: Packed = {}
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
        packed[name] = (bits.numpy(), str(plain.dtype).removeprefix("torch."))
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Inverse of `pack`; read-only arrays (from the object store) are copied, others are shared."""
    named = {}
    for name, (array, dtype) in packed.items():
        tensor = torch.from_numpy(array if array.flags.writeable else array.copy())
        named[name] = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    return named


def checksum(named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """Hex digest of names, dtypes, shapes and bits; independent of the order of the names."""
    items = dict(named)
    digest = hashlib.sha256()
    for name in sorted(items):
        plain = items[name].detach().cpu().contiguous()
        digest.update(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        if plain.numel():
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def payload(state: Mapping[str, Tensor], adapter: Mapping[str, Any] | None) -> dict[str, Any]:
    """What travels to a rollout engine: full weights, or an adapter with its PEFT configuration."""
    if adapter is None:
        return {"kind": "full", "tensors": pack(state)}
    return {"kind": "adapter", "tensors": pack(state), "adapter_config": dict(adapter)}


def read_payload(folder: Path) -> dict[str, Any]:
    """The payload of a saved policy (`final/policy`): a Hugging Face folder or a PEFT adapter folder."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        return payload(load_file(folder / "adapter_model.safetensors"), json.loads(adapter.read_text()))
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return payload(state, None)
