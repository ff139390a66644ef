"""Weights on their way between processes: bounded chunks, numpy views, a checksum, adapters in shared memory.

A numpy view travels through Ray's object store without a copy; torch tensors do not.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")

Packed = dict[str, tuple[np.ndarray, str]]
"""Name -> (array, torch dtype name). bfloat16, which numpy lacks, travels as its int16 bits."""

CHUNK_BYTES = 2**27
"""Weights are gathered, sent and loaded in chunks of at most this size; a larger tensor is one by itself."""

WRAPPER_PREFIX = "wrapped."
"""Attribute under which the modules of heads.py hold the Hugging Face or PEFT model."""

SHARED_MEMORY = Path("/dev/shm")


def exported_name(name: str) -> str:
    """Parameter name of a module of heads.py -> the name in a Hugging Face or PEFT weight file."""
    name = name.removeprefix(WRAPPER_PREFIX)
    name = name.replace(".modules_to_save.default.", ".")
    return name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.")


def bounded(items: Iterable[tuple[T, int]], limit: int = CHUNK_BYTES) -> Iterator[list[T]]:
    """Consecutive items, given with their bytes, in groups of at most `limit` bytes (or of one item)."""
    group: list[T] = []
    total = 0
    for item, size in items:
        if group and total + size > limit:
            yield group
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield group


def whole(chunks: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All chunks as one mapping: for adapters, and for the final artifacts."""
    return {name: tensor for chunk in chunks for name, tensor in chunk.items()}


def pack(named: Mapping[str, Tensor]) -> Packed:
    """CPU tensors as numpy views (no copy for contiguous CPU tensors)."""
    packed: Packed = {}
    for name, tensor in named.items():
        plain = tensor.detach().cpu().contiguous()
        bits = plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain
        packed[name] = (bits.numpy(), str(plain.dtype).removeprefix("torch."))
    return packed


def unpack(packed: Packed) -> dict[str, Tensor]:
    """Inverse of `pack` without a copy. The tensors may lie in the object store: nobody may write to them."""
    named = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        for name, (array, dtype) in packed.items():
            tensor = torch.from_numpy(array)
            named[name] = tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
    return named


class Checksum:
    """Digest of named tensors as they pass by, independent of their order and of how they are chunked.

    Over names, dtypes, shapes and bits: a tensor that is missing, changed, cast or under another's name
    changes it. It finds accidents, not forgeries (XXH3, 128 bits a tensor).
    """

    def __init__(self) -> None:
        self._digests: dict[str, str] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """
        Raises:
            ValueError: the name came before.
        """
        if name in self._digests:
            raise ValueError(f"{name} came twice")
        plain = tensor.detach().cpu().contiguous()
        digest = xxhash.xxh3_128(f"{name}|{plain.dtype}|{tuple(plain.shape)}|".encode())
        if plain.numel():
            digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
        self._digests[name] = digest.hexdigest()

    def update(self, named: Mapping[str, Tensor]) -> None:
        """`add` for each of them."""
        for name, tensor in named.items():
            self.add(name, tensor)

    def hexdigest(self) -> str:
        """Digest of everything that was added so far: of the sorted digests of the single tensors."""
        return xxhash.xxh3_128("".join(sorted(self._digests.values())).encode()).hexdigest()


def checksum(named: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str:
    """`Checksum` of all of them."""
    digest = Checksum()
    for name, tensor in named.items() if isinstance(named, Mapping) else named:
        digest.add(name, tensor)
    return digest.hexdigest()


def saved_chunks(folder: Path) -> tuple[Iterator[dict[str, Tensor]], dict[str, Any] | None]:
    """Chunks of a saved policy (`final/policy`), read as they are asked for, and its PEFT configuration."""
    adapter = folder / "adapter_config.json"
    config = json.loads(adapter.read_text()) if adapter.is_file() else None
    return _read_chunks(sorted(folder.glob("*.safetensors"))), config


def _read_chunks(files: Iterable[Path]) -> Iterator[dict[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            sizes = ((name, _saved_bytes(tensors.get_slice(name))) for name in tensors.keys())  # noqa: SIM118
            for names in bounded(sizes):
                yield {name: tensors.get_tensor(name) for name in names}


def _saved_bytes(tensor: Any) -> int:
    # an upper bound: no dtype of ours has more than 8 bytes
    return int(np.prod(tensor.get_shape(), dtype=np.int64)) * 8


@contextmanager
def adapter_folder(tensors: Mapping[str, Tensor], adapter_config: Mapping[str, Any]) -> Iterator[str]:
    """An adapter as PEFT saves it, in shared memory where there is room for it, gone afterwards.

    The folder's name is never used again. vLLM takes adapters only as folders.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in plain.values())
    folder = Path(tempfile.mkdtemp(prefix=f"rairl-adapter-{os.getpid()}-", dir=_memory_for(size)))
    try:
        save_file(plain, str(folder / "adapter_model.safetensors"))
        (folder / "adapter_config.json").write_text(json.dumps(dict(adapter_config), default=list))
        yield str(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _memory_for(size: int) -> Path | None:
    """Where to put so many bytes; None: the ordinary temporary folder (containers often have 64 MB here)."""
    try:
        roomy = os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > 2 * size
    except OSError:
        return None
    return SHARED_MEMORY if roomy else None
