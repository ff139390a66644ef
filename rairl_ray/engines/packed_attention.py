"""Attention over packed rows (data/packing.py), as an attention function of transformers.

The function is a model's own for good: padded rows reach torch's kernel as before, packed ones bring their
`Packing` along as a keyword argument, which gradient checkpointing keeps for its second forward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rairl_ray.data.packing import Packing

NAME = "rairl_packed"
SERVED = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose attention is softmax(q k) v, whole or in a window, and reaches transformers' interface."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """query [B, H, L, D], key and value [B, heads of keys, L, D] -> [B, L, H, D]."""
    packing: Packing | None = options.pop("packing", None)
    if packing is None:
        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **options
        )
        return padded
    window = options.get("sliding_window")
    query_NHD, key_NHD, value_NHD = (states[0].transpose(0, 1) for states in (query, key, value))
    sharing = query.shape[1] // key.shape[1]
    answers = []
    for stretches in packing.stretches:
        mask = stretches.mask(window, query.dtype)
        keys, values = _gather(key_NHD, stretches.keys), _gather(value_NHD, stretches.keys)
        if sharing > 1 and query.is_cuda and mask is not None:  # else CUDA takes its slowest kernel
            keys, values = keys.repeat_interleave(sharing, 1), values.repeat_interleave(sharing, 1)
        answer_SHQD = F.scaled_dot_product_attention(
            _gather(query_NHD, stretches.queries),
            keys,
            values,
            attn_mask=mask,
            dropout_p=options.get("dropout", 0.0),
            is_causal=mask is None,
            scale=options.get("scaling"),
            enable_gqa=keys.shape[1] != query.shape[1],
        )
        answers.append(answer_SHQD.transpose(1, 2).flatten(0, 1))
    return torch.cat(answers).index_select(0, packing.order)[None], None


def _gather(states_NHD: Tensor, index_SQ: Tensor) -> Tensor:
    """[S, H, Q, D]"""
    return states_NHD.index_select(0, index_SQ.flatten()).unflatten(0, index_SQ.shape).transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def why_padded(config: Any) -> str | None:
    """What keeps a Hugging Face model from reading packed rows; None where it can."""
    if config.model_type not in SERVED:
        return f"models of type {config.model_type} read padded rows; {', '.join(SERVED)} can share prompts"
    if config._attn_implementation not in ("sdpa", NAME):
        return f"attention {config._attn_implementation} reads padded rows; sdpa can share prompts"
    kind = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind in ("dynamic", "longrope"):
        return f"{kind} positions depend on a row's length: it reads padded rows"
    return None


def serve(model: Any) -> str | None:
    """Make a Hugging Face model ready for packed rows, or say why it cannot read them."""
    reason = why_padded(model.config)
    if reason is None:
        model.set_attn_implementation(NAME)
    return reason


def model_inputs(input_ids: Tensor, attention_mask: Tensor, packing: Packing | None) -> dict[str, Any]:
    """Keyword arguments of a backbone for padded rows [B, L], which a packing turns into one packed row."""
    if packing is None:
        return {"input_ids": input_ids, "attention_mask": attention_mask}
    return {
        "input_ids": input_ids.flatten()[packing.source][None],
        "position_ids": packing.position_ids[None],
        # four dimensions: transformers makes no mask of its own, and ours is made for each stretch
        "attention_mask": attention_mask.new_zeros(1, 1, 1, 1),
        "packing": packing,
    }
