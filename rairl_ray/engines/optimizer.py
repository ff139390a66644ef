"""AdamW as the learners use it, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from rairl_ray.config.schema import Optimizer
from rairl_ray.config.variants import complete


class RecordingAdamW(torch.optim.AdamW):
    """torch AdamW (its state resumes bit-exactly) with two additions that work under every ZeRO stage.

    ZeRO hands the optimizer its float32 master partitions, so a clamp here reaches the masters.
    """

    def __init__(
        self, params: Any, *, max_grad_norm: float | None, weight_clip: float | None, **kwargs: Any
    ) -> None:
        super().__init__(params, **kwargs)
        self.max_grad_norm = max_grad_norm
        self.weight_clip = weight_clip
        self.grad_norm: float | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self.max_grad_norm is not None:
            self.grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        super().step(closure)
        if self.weight_clip is not None:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.clamp_(-self.weight_clip, self.weight_clip)


def learning_rate_factor(update: int, settings: Optimizer, total_updates: int) -> float:
    """Multiplier of the learning rate for the update with index `update` (from 0).

    Rises linearly from zero over the first `warmup_ratio` of all updates (the first one already moves),
    then stays, or falls to zero linearly or along a half cosine at `total_updates`.
    """
    warmup = int(settings.warmup_ratio * total_updates)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    return SCHEDULES[settings.schedule](min(1.0, (update - warmup) / max(1, total_updates - warmup)))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
}
"""Multiplier of the learning rate after the warm-up, from the share 0..1 of the updates that follow it."""
complete(f"{__name__}.SCHEDULES", SCHEDULES, Optimizer, "schedule")
