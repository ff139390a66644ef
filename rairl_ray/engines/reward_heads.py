"""The discriminator's heads, one entry each: how it is loaded and reads units. And a saved one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rairl_ray.algorithms.discriminator_losses import DiscriminatorOutputs, segment_sums
from rairl_ray.config.schema import Discriminator, Model
from rairl_ray.config.variants import complete
from rairl_ray.data.batching import DiscriminatorTensors
from rairl_ray.engines.artifacts import Dtype, RewardSettings, read_settings, saved_reference
from rairl_ray.engines.heads import ImplicitModel, ScalarModel
from rairl_ray.engines.models import load_causal_lm, load_token_classifier
from rairl_ray.errors import ModelError
from rairl_ray.files import REWARD_FILE

Penalty = Callable[[Tensor, Tensor], Tensor]
"""Of the unit values [B, U] and the input embeddings [B, L, H] that they were computed from."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """One kind of reward model."""

    load: Callable[..., Any]
    """(path, model, *, beta, potential, device, seed): the trainable module over a model or a saved reward."""
    read: Callable[..., tuple[DiscriminatorOutputs, Tensor | None]]
    """(forward, batch, *, potential, penalty): what it says of a micro-batch's units, and the penalty where one
    was asked for. `forward` is the module or an engine around it; `potential` asks for h, too."""


def _load_scalar(
    path: str, model: Model, *, beta: float, potential: bool = False, device: str = "cpu", seed: int = 0
) -> ScalarModel:
    outputs = 2 if potential else 1
    return ScalarModel(load_token_classifier(path, model, outputs=outputs, device=device, seed=seed))


def _load_implicit(
    path: str, model: Model, *, beta: float, potential: bool = False, device: str = "cpu", seed: int = 0
) -> ImplicitModel:
    """Over a saved implicit reward with the reference saved beside it."""
    causal_lm = load_causal_lm(path, model, device=device, seed=seed)
    return ImplicitModel(causal_lm, beta=beta, reference=saved_reference(path, model.dtype))


def _read_scalar(
    forward: Any, batch: DiscriminatorTensors, *, potential: bool = False, penalty: Penalty | None = None
) -> tuple[DiscriminatorOutputs, Tensor | None]:
    # The potential h is read at the state in front of each unit: one token before its segment.
    before = batch.prompt_lengths[:, None] + batch.unit_start_index - 1 if potential else None
    values, shaping, cost = forward(
        batch.input_ids, batch.attention_mask, batch.unit_positions, before,
        penalty=penalty, packing=batch.packing,
    )  # fmt: skip
    return DiscriminatorOutputs(values, shaping), cost


def _read_implicit(
    forward: Any, batch: DiscriminatorTensors, *, potential: bool = False, penalty: Penalty | None = None
) -> tuple[DiscriminatorOutputs, Tensor | None]:
    ratios = forward(
        batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
        reference_BT=batch.reference_logprobs, packing=batch.packing,
    )  # fmt: skip
    values = segment_sums(ratios, batch.unit_start_index, batch.unit_end_index, batch.unit_mask)
    return DiscriminatorOutputs(values), None


HEADS = {
    "scalar": Head(load=_load_scalar, read=_read_scalar),
    "implicit": Head(load=_load_implicit, read=_read_implicit),
}
complete(f"{__name__}.HEADS", HEADS, Discriminator, "head")


class RewardModel:
    """A saved reward model, ready to score."""

    def __init__(self, settings: RewardSettings, module: Any, device: str) -> None:
        self.settings = settings
        self._module = module.eval().to(device)
        self._device = device
        self.packs = module.padded_because is None
        """Whether `score` can be given packed rows."""

    @classmethod
    def load(cls, folder: Path, *, device: str = "cpu", dtype: Dtype = "float32") -> RewardModel:
        """Load `final/reward_model`, to score in `dtype`.

        Raises:
            ModelError: not a reward model folder, or the reference is not the one that it was trained against.
        """
        settings = read_settings(Path(folder))
        if settings is None:
            raise ModelError(f"{folder}: {REWARD_FILE} is missing; give a final/reward_model folder")
        module = HEADS[settings.head].load(str(folder), Model(dtype=dtype), beta=settings.beta)
        return cls(settings, module, device)

    @torch.no_grad()
    def score(self, batch: DiscriminatorTensors) -> Tensor:
        """[B, U] float32 unit logits on the CPU, before temperature and clip; padding is to be masked."""
        outputs, _ = HEADS[self.settings.head].read(self._module, batch.to(self._device))
        return outputs.values.cpu()
