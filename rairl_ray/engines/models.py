"""Loading models for training: a causal language model or a token classifier, full or with LoRA.

Of engines/, transformers or peft is imported by this file, heads.py, sources.py, adapters.py, artifacts.py,
hf_engine.py, packed_attention.py and vllm_engine.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import nn

from rairl_ray.config.schema import Model
from rairl_ray.engines.adapters import one_line_errors
from rairl_ray.engines.origin import commit_of
from rairl_ray.engines.sources import resolve_model
from rairl_ray.errors import ModelError
from rairl_ray.imports import NOT_FOR_TEXT, without
from rairl_ray.keys import key_seed

with without(*NOT_FOR_TEXT):
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForTokenClassification,
        BitsAndBytesConfig,
    )

__all__ = ["adapter_config", "load_causal_lm", "load_token_classifier", "resolve_model"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_DROPOUTS = (
    "attention_dropout",
    "hidden_dropout",
    "classifier_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
)


def load_causal_lm(
    path: str, model: Model, *, device: str = "cpu", trainable: bool = True, seed: int = 0
) -> Any:
    """A causal language model, wrapped by PEFT where `lora.rank` is set, in training mode if trainable.

    Dropout inside the base model is off, so training and scoring compute the same function; `lora.dropout`
    alone is kept. `trainable=False` gives the plain frozen base model. `seed` keys the adapter's start.

    Raises:
        ModelError: what cannot be loaded, and why, in one line.
    """
    loaded = _from_pretrained(AutoModelForCausalLM, path, model, device)
    if not trainable:
        return loaded.eval().requires_grad_(False).to(device)
    return _prepare(loaded, model, "CAUSAL_LM", seed).to(device)


def load_token_classifier(
    path: str, model: Model, *, outputs: int = 1, device: str = "cpu", seed: int = 0
) -> Any:
    """A token classifier with `outputs` numbers per position (2 for the `airl` loss: g and the potential h).

    From a causal checkpoint the head is new: drawn from `seed`, so small that all scores start near 0. From a
    token classifier (such as an earlier `final/reward_model`) the head is kept.
    """
    loaded, info = _from_pretrained(
        AutoModelForTokenClassification, path, model, device, num_labels=outputs, output_loading_info=True
    )
    head = getattr(loaded, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(f"{path}: its token classifier has no linear `score` head; use a Llama or Qwen model")
    if any(key.startswith("score.") for key in info["missing_keys"]):
        _draw_head(head, key_seed(seed, "scalar head"))
    return _prepare(loaded, model, "TOKEN_CLS", seed).to(device)


def adapter_config(module: Any) -> dict[str, Any]:
    """JSON-able PEFT configuration of a module of heads.py (`adapter_config.json` of its adapter)."""
    config = dict(module.wrapped.peft_config["default"].to_dict())
    config["inference_mode"] = True
    return {key: _plain(value) for key, value in config.items()}


def _from_pretrained(kind: Any, path: str, model: Model, device: str, **extra: Any) -> Any:
    """`kind.from_pretrained` with the settings of `model` and every base dropout at 0.

    Only a 4-bit base is loaded to `device` (where it is packed), everything else to the CPU.
    """
    check_device(path, model, device)
    revision = one_line_errors(path, lambda: commit_of(path, model.revision))
    shared = {"revision": revision, "trust_remote_code": model.trust_remote_code}
    config = one_line_errors(path, lambda: AutoConfig.from_pretrained(path, **shared))
    for key in _DROPOUTS:
        if getattr(config, key, None):
            setattr(config, key, 0.0)
    if kind is AutoModelForTokenClassification:
        config.classifier_dropout = 0.0  # absent, it means 0.1
        config.num_labels = extra.pop("num_labels")
    loaded = one_line_errors(
        path,
        lambda: kind.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[model.dtype],
            attn_implementation=model.attention,
            **_quantised(model, device),
            **shared,
            **extra,
        ),
    )
    (loaded[0] if isinstance(loaded, tuple) else loaded).loaded_commit = revision
    return loaded


def _quantised(model: Model, device: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for the blocks' linear layers in 4 bits, the rest in bfloat16.

    PEFT's `prepare_model_for_kbit_training` is left out: it casts the rest to float32, which DeepSpeed's
    bfloat16 mode (float32 masters of what is trained) would cast back, and its hook for gradient checkpointing
    is needed by the reentrant kind alone.
    """
    if model.quantization == "none":
        return {}
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[model.dtype],
        llm_int8_skip_modules=["lm_head", "score"],  # despite its name for 4 bits too
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def missing_packages(model: Model) -> list[tuple[str, str, str]]:
    """(key of the section, its value, package) for what `model` asks for and is not installed."""
    wanted: list[tuple[str, str, str, str]] = []
    if model.attention == "flash_attention_2":
        wanted.append(("attention", model.attention, "flash-attn", "flash_attn"))
    if model.quantization != "none":
        wanted.append(("quantization", model.quantization, "bitsandbytes", "bitsandbytes"))
    return [
        (key, value, package)
        for key, value, package, module in wanted
        if importlib.util.find_spec(module) is None
    ]


def check_device(path: str, model: Model, device: str) -> None:
    """Refuse what the device or the installation cannot do, before anything is loaded.

    Raises:
        ModelError: one line.
    """
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    if model.attention == "flash_attention_2" and not on_gpu:
        raise ModelError(f"{path}: model.*.attention={model.attention} needs a GPU; use model.*.attention=sdpa")
    if model.quantization != "none" and not on_gpu:
        raise ModelError(f"{path}: model.*.quantization={model.quantization} needs a GPU; write none")
    for key, value, package in missing_packages(model):
        raise ModelError(f"{path}: model.*.{key}={value} needs the package {package}; pip install {package}")
    if on_gpu and model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ModelError(f"{path}: model.*.dtype=bfloat16 needs a GPU of compute capability 8.0; write float32")


def _prepare(loaded: Any, model: Model, task: Literal["CAUSAL_LM", "TOKEN_CLS"], seed: int) -> Any:
    """Training mode, gradient checkpointing, and the adapter where one is asked for."""
    if model.gradient_checkpointing:
        loaded.gradient_checkpointing_enable({"use_reentrant": False})
    loaded.train()
    if model.lora.rank is None:
        return loaded
    targets = _linear_names(loaded) if model.lora.target_modules == "all-linear" else model.lora.target_modules
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type=task,
        r=model.lora.rank,
        lora_alpha=model.lora.alpha or 2 * model.lora.rank,
        lora_dropout=model.lora.dropout,
        target_modules=list(targets),
        modules_to_save=["score"] if task == "TOKEN_CLS" else None,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "lora"))
        return one_line_errors(
            loaded.name_or_path, lambda: get_peft_model(loaded, config, autocast_adapter_dtype=False)
        )


def _linear_names(loaded: Any) -> list[str]:
    """Last name components of all linear layers except the head.

    PEFT's own "all-linear" would write full layer paths into small models' `adapter_config.json`.
    """
    heads = (loaded.get_output_embeddings(), getattr(loaded, "score", None))
    named = ((name, layer) for name, layer in loaded.named_modules() if isinstance(layer, nn.Linear))
    return sorted(
        {name.rsplit(".", 1)[-1] for name, layer in named if all(layer is not head for head in heads)}
    )


def _draw_head(head: nn.Linear, seed: int) -> None:
    """Normal weights of deviation 0.1 / sqrt(H): normalised hidden states then give scores around 0.1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        drawn = torch.randn(head.weight.shape, generator=generator) * 0.1 / head.in_features**0.5
        head.weight.copy_(drawn)
        if head.bias is not None:
            head.bias.zero_()


def _plain(value: Any) -> Any:
    """A value of a PEFT configuration as JSON has it."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
