"""What a `gpu` test needs, as marks whose reasons name the missing capability."""

from __future__ import annotations

import importlib.util

import pytest
import torch

GPUS = torch.cuda.device_count()


def gpus(count: int) -> pytest.MarkDecorator:
    """Skip where fewer GPUs are to be seen."""
    return pytest.mark.skipif(count > GPUS, reason=f"needs {count} CUDA device(s), torch sees {GPUS}")


def package(module: str, name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"needs the package {name}")


flash_attention = package("flash_attn", "flash-attn")
bitsandbytes = package("bitsandbytes", "bitsandbytes")
vllm = package("vllm", "vllm")
