"""What leaves a learner for engines and files: trained tensors, or base weights with the adapter added.

Only names and recipes are made here; `DeepSpeedEngine.outgoing` gathers what a recipe needs, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rairl_ray.engines.weights import exported_name
from rairl_ray.errors import ModelError

ADAPTER = "default"
"""PEFT's name for the only adapter of a learner."""


@dataclass(frozen=True)
class Outgoing:
    """One tensor, and the parameters that must be whole on this rank before it can be made.

    The first parameter alone, or with the adapter's two matrices: weight + scale * up @ down.
    """

    name: str
    """In a Hugging Face or PEFT weight file."""
    parameters: tuple[Tensor, ...]
    scale: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Whole, also where this rank holds a part."""
        return tuple(getattr(self.parameters[0], "ds_shape", self.parameters[0].shape))

    @property
    def nbytes(self) -> int:
        """Of all that has to be whole."""
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.parameters)

    def tensor(self, device: torch.device | str) -> Tensor:
        """A new tensor; nothing that the learner holds is written."""
        weight, *adapter = (parameter.detach() for parameter in self.parameters)
        if not adapter:
            return weight.to(device, copy=True)
        down, up = adapter
        return merge(weight, down, up, self.scale).to(device)


def merge(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """weight + scale * up @ down, added in float32 and rounded once, to the weight's dtype."""
    wide = weight.to(torch.float32, copy=True)
    return wide.addmm_(up.float(), down.float(), alpha=scale).to(weight.dtype)


def trained(module: nn.Module) -> list[Outgoing]:
    """All trained weights: of the whole model, or of its adapter."""
    named = module.named_parameters()
    return [Outgoing(exported_name(name), (p,)) for name, p in named if p.requires_grad]


def merged(module: nn.Module) -> list[Outgoing]:
    """The matrices that the adapter changes, with it added to the stored base, under the base's own names.

    The linear layers beside a changed one go along as they are: an engine that holds q, k and v as one matrix
    cannot take one of them alone.

    Raises:
        ModelError: something is trained that cannot be added to a linear layer.
    """
    found = list(_merged(module))
    used = {id(parameter) for item in found for parameter in item.parameters}
    odd = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in used]
    if odd:
        raise ModelError(
            f"rollout.adapter=merged: {exported_name(odd[0])} is no part of an adapted linear layer; take its "
            "module out of model.policy.lora.target_modules, or write rollout.adapter=served"
        )
    return found


def _merged(module: nn.Module) -> Iterator[Outgoing]:
    layers: dict[str, Any] = dict(module.named_modules())
    adapted = {name for name, layer in layers.items() if ADAPTER in getattr(layer, "lora_A", ())}
    beside = {name.rpartition(".")[0] for name in adapted}
    for name, layer in layers.items():
        base = layer.base_layer if name in adapted else layer
        if name.rpartition(".")[0] not in beside or not isinstance(base, nn.Linear):
            continue
        plain = exported_name(name).removeprefix("base_model.model.")
        if name in adapted:
            down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            yield Outgoing(f"{plain}.weight", (base.weight, down, up), layer.scaling[ADAPTER])
        else:
            yield Outgoing(f"{plain}.weight", (base.weight,))
        if base.bias is not None:
            yield Outgoing(f"{plain}.bias", (base.bias,))
