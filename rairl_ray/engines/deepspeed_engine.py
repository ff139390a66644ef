"""DeepSpeed ZeRO 0-3 around one trainable module: the only file that imports `deepspeed`.

Call `environment.setup_environment` before importing this module. Two engines never share a process.

Gradient semantics. Each micro-batch returns its CONTRIBUTION to the global loss (already divided by global
denominators), and a step uses the SUM of the gradients over micro-batches and ranks. DeepSpeed averages
over ranks, so each contribution is multiplied by the number of ranks; its division by accumulation steps
is switched off. `managed_gradient_accumulation: false` is DeepSpeed's own mode for a number of
micro-batches that differs from step to step: `backward` accumulates, `step` reduces and updates.

ZeRO-3 gathers weights inside the module's forward with collectives, so every rank must run the same
number of forward and backward passes; a rank with less work runs a pass whose loss is multiplied by zero.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
from deepspeed.utils import logger as deepspeed_logger

from rairl_ray.config.schema import Learner, Optimizer
from rairl_ray.engines.weights import CHUNK_BYTES, bounded, exported_name
from rairl_ray.keys import key_seed

deepspeed_logger.setLevel(logging.WARNING)

STATE_TAG = "state"
"""Name of DeepSpeed's own subfolder in a saved engine folder."""


class RecordingAdamW(torch.optim.AdamW):
    """torch AdamW (its state resumes bit-exactly) with two additions that work under every ZeRO stage.

    ZeRO hands the optimizer its float32 master partitions, so a clamp here reaches the masters.
    """

    def __init__(
        self, params: Any, *, clip_norm: float | None, weight_clip: float | None, **kwargs: Any
    ) -> None:
        super().__init__(params, **kwargs)
        self.clip_norm = clip_norm
        self.weight_clip = weight_clip
        self.grad_norm: float | None = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        if self.clip_norm is not None:
            self.grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.clip_norm))
        super().step(closure)
        if self.weight_clip is not None:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.clamp_(-self.weight_clip, self.weight_clip)


def learning_rate_factor(update: int, settings: Optimizer, total_updates: int) -> float:
    """Multiplier of the learning rate for the update with index `update` (from 0).

    Rises linearly from zero over the first `warmup_share` of all updates (the first one already moves),
    then stays, or falls to zero linearly or along a half cosine at `total_updates`.
    """
    warmup = int(settings.warmup_share * total_updates)
    if update < warmup:
        return (update + 1) / (warmup + 1)
    if settings.schedule == "constant":
        return 1.0
    progress = min(1.0, (update - warmup) / max(1, total_updates - warmup))
    return 1.0 - progress if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def join_group(device: str, timeout_seconds: float) -> None:
    """Join the process group that the environment describes; a collective fails after the timeout."""
    if torch.distributed.is_initialized():
        return
    # DeepSpeed would compile `deepspeed_shm_comm` here (36 s), a kernel that only its inference all-reduce
    # uses. It builds what this cached table of buildable extensions names; our table names none.
    deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if device.startswith("cuda") else "gloo"
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_seconds),
    )


def _set_timeouts(timeout_seconds: float) -> None:
    """Give DeepSpeed's own subgroups the deadline too: it makes them with torch's 30-minute default."""
    world = torch.distributed.distributed_c10d
    for group in list(world._world.pg_map):
        world._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def _config(settings: Optimizer, learner: Learner, *, bfloat16: bool, persistent_numel: int) -> dict[str, Any]:
    """DeepSpeed's configuration; stage 0 clips in our optimizer, as DeepSpeed reports no norm there."""
    stage = _stage(learner, bfloat16)
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": persistent_numel,
    }
    if learner.offload == "cpu" and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": settings.clip_norm if stage > 0 else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if bfloat16:
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _stage(learner: Learner, bfloat16: bool) -> int:
    """ZeRO stage; bfloat16 without partitions cannot accumulate in float32, so stage 0 becomes 1 there."""
    return max(1, learner.zero_stage) if bfloat16 else learner.zero_stage


def _nbytes(parameter: nn.Parameter) -> int:
    """Bytes of the whole parameter, also where this rank holds a part of it."""
    return getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()


class DeepSpeedEngine:
    """One rank's share of a data-parallel learner.

    `total_updates` is the length of the learning-rate schedule; `weight_clip` clamps every trained weight
    after each update (`wgan`); `seed` keys dropout. The module's parameters must be float32, or all bfloat16
    (then float32 master weights and float32 gradient accumulation are kept). Only parameters that require
    gradients are trained; matrices get weight decay, vectors (norms, biases) do not.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Optimizer,
        learner: Learner,
        *,
        total_updates: int,
        device: str,
        timeout_seconds: float = 1800.0,
        weight_clip: float | None = None,
        seed: int = 0,
    ) -> None:
        join_group(device, timeout_seconds)
        self._seed = seed
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()
        self.module = module
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        bfloat16 = next(p.dtype for p in module.parameters()) == torch.bfloat16
        stage = _stage(learner, bfloat16)
        self._sharded = stage == 3
        self._saves_all = len(named) == sum(1 for _ in module.parameters())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = RecordingAdamW(
            [group for group in groups if group["params"]],  # DeepSpeed drops empty ones, the schedule does not
            clip_norm=settings.clip_norm if stage == 0 else None,
            weight_clip=weight_clip,
            lr=settings.learning_rate,
            betas=settings.betas,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: learning_rate_factor(update, settings, total_updates)
        )
        vectors = [p.numel() for p in module.parameters() if p.ndim <= 1]
        self._optimizer = optimizer
        self._engine, _, _, self._scheduler = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=_config(settings, learner, bfloat16=bfloat16, persistent_numel=max(vectors, default=0)),
        )
        _set_timeouts(timeout_seconds)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass with gradients; to be called inside the losses given to `update`."""
        return self._engine(*args, **kwargs)

    def infer(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass without gradients, in evaluation mode. Under ZeRO-3 all ranks must call it."""
        self._engine.eval()
        try:
            with torch.no_grad():
                return self._engine(*args, **kwargs)
        finally:
            self._engine.train()

    def update(self, losses: Sequence[Callable[[], Tensor]]) -> dict[str, float]:
        """One optimizer step from the micro-batches' loss contributions (scalars), evaluated in order.

        Every rank passes at least one. Returns `grad_norm` (of the summed gradient, before clipping),
        `learning_rate` (used in this step) and `loss` (this rank's sum of contributions).
        """
        if not losses:
            raise ValueError("a rank without micro-batches must pass one whose loss is multiplied by zero")
        self._engine.train()
        # Dropout must not depend on what this process has drawn before: a resumed run repeats itself.
        torch.manual_seed(key_seed(self._seed, "dropout", self._engine.global_steps, self.rank))
        learning_rate = self._scheduler.get_last_lr()[0]
        total = 0.0
        for loss in losses:
            contribution = loss()
            total += contribution.item()
            self._engine.backward(contribution * self.world_size, scale_wrt_gas=False)
        self._engine.step()
        norm = self._optimizer.grad_norm
        norm = float(self._engine.get_global_grad_norm()) if norm is None else norm
        return {"grad_norm": norm, "learning_rate": learning_rate, "loss": total}

    def trainable_state(
        self, *, chunk_bytes: int = CHUNK_BYTES, on_device: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Trained weights under Hugging Face (full) or PEFT (adapter) names, in chunks of `chunk_bytes`.

        All ranks must run through it together: under ZeRO-3 each chunk is gathered as it is asked for and let
        go before the next, so no rank ever holds more than one chunk (or one tensor that is larger) besides
        its share. Rank 0 gets copies on the CPU, the others empty chunks; `on_device` gives copies on the
        device to all ranks.
        """
        named = ((item, _nbytes(item[1])) for item in self._trained())
        for group in bounded(named, chunk_bytes):
            yield self._chunk(group, on_device)  # no name of ours keeps it while the next one is gathered

    def trainable_shapes(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """Name, dtype and whole shape of what `trainable_state` yields, in its order; gathers nothing."""
        return [
            (exported_name(name), p.dtype, tuple(getattr(p, "ds_shape", p.shape)))
            for name, p in self._trained()
        ]

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]

    def _chunk(self, group: Sequence[tuple[str, nn.Parameter]], on_device: bool) -> dict[str, Tensor]:
        with self._gathered([parameter for _, parameter in group]):
            if self.rank != 0 and not on_device:
                return {}
            return {
                exported_name(name): p.detach().to(p.device if on_device else "cpu", copy=True)
                for name, p in group
            }

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> Any:
        if not self._sharded:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Write this rank's share of weights, optimizer and schedule, and `client_state`. All ranks call it.

        Frozen base weights of a LoRA model are left out: they come from the model's own path.
        """
        self._engine.save_checkpoint(
            str(folder),
            tag=STATE_TAG,
            client_state={"client": client_state},
            save_latest=False,
            exclude_frozen_parameters=not self._saves_all,
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote, bit-exactly, and return its client state. All ranks call it.

        The number of ranks and the ZeRO stage must be those of `save`.
        """
        path, state = self._engine.load_checkpoint(
            str(folder), tag=STATE_TAG, load_module_strict=self._saves_all
        )
        if path is None:
            raise FileNotFoundError(f"{folder}: no saved learner state for rank {self.rank}")
        return dict(state["client"])

    def destroy(self) -> None:
        """Free the engine. The process stays in its group until it ends."""
        self._engine.destroy()
