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

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

from rairl_ray.config.machine_schema import Learner
from rairl_ray.config.schema import Optimizer
from rairl_ray.engines import zero_shards
from rairl_ray.engines.async_writer import AsyncWriter, snapshot
from rairl_ray.engines.optimizer import RecordingAdamW, learning_rate_factor
from rairl_ray.engines.outgoing import Outgoing, trained
from rairl_ray.engines.safe_files import refuse_foreign_code
from rairl_ray.engines.weights import CHUNK_BYTES, bounded
from rairl_ray.imports import uncompiled, without
from rairl_ray.keys import key_seed
from rairl_ray.types import Written

with without("mlflow"):  # which DeepSpeed loads for its autotuner alone
    import deepspeed
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
    from deepspeed.utils import logger as deepspeed_logger

    # its Muon, which ZeRO loads when it starts and nobody here uses; a DeepSpeed without it is as good
    with uncompiled(), suppress(ImportError):
        import deepspeed.runtime.zero.muon.original_muon

deepspeed_logger.setLevel(logging.WARNING)

STATE_TAG = "state"
"""Name of DeepSpeed's own subfolder in a saved engine folder."""

LEARNER_FILE = "learner.json"
"""Beside it: what must be known before DeepSpeed's files can be read."""


class _Snapshots(TorchCheckpointEngine):
    """What DeepSpeed hands over to be saved is copied and kept; the disk is not touched.

    `left_out` are names of weights that need no saving. DeepSpeed leaves out frozen ones under one name
    only, so that a tied output layer would be saved whole beside a small adapter.
    """

    def __init__(self, left_out: Sequence[str]) -> None:
        super().__init__()
        self._left_out = left_out
        self.taken: dict[str, Any] = {}
        """Path -> copied state."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made by the thread that writes."""

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        for name in self._left_out:
            state_dict.get("module", {}).pop(name, None)
        self.taken[path] = snapshot(state_dict)


def join_group(device: str, timeout_seconds: float) -> None:
    """Join the process group that the environment describes; a collective fails after the timeout."""
    # DeepSpeed would compile `deepspeed_shm_comm` when it first sees a group, also one that others made (36 s),
    # a kernel that only its inference all-reduce uses. It builds what this cached table of buildable
    # extensions names; our table names none.
    deepspeed.ops.__compatible_ops__ = {}
    if torch.distributed.is_initialized():
        return
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
        "gradient_clipping": settings.max_grad_norm if stage > 0 else 0.0,
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
        named.sort(key=lambda item: item[1].ndim <= 1)  # matrices first, as in the optimizer's groups
        bfloat16 = next(p.dtype for p in module.parameters()) == torch.bfloat16
        stage = _stage(learner, bfloat16)
        self._stage = stage
        self._sharded = stage == 3
        self._shapes = [{name: tuple(p.shape)} for name, p in named]
        self._saves_all = len(named) == sum(1 for _ in module.parameters())
        groups = [
            {"params": [p for _, p in named if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = RecordingAdamW(
            [group for group in groups if group["params"]],  # DeepSpeed drops empty ones, the schedule does not
            max_grad_norm=settings.max_grad_norm if stage == 0 else None,
            weight_clip=weight_clip,
            lr=settings.learning_rate,
            betas=settings.betas,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda update: learning_rate_factor(update, settings, total_updates)
        )
        vectors = [p.numel() for p in module.parameters() if p.ndim <= 1]
        self._optimizer = optimizer
        self._settings = settings
        self._decays = [group["weight_decay"] for group in optimizer.param_groups]
        self._engine, _, _, self._scheduler = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=_config(settings, learner, bfloat16=bfloat16, persistent_numel=max(vectors, default=0)),
        )
        _set_timeouts(timeout_seconds)
        every = module.named_parameters(remove_duplicate=False)
        self._snapshots = _Snapshots([] if self._saves_all else [n for n, p in every if not p.requires_grad])
        self._engine.checkpoint_engine = self._snapshots
        self._engine._copy_recovery_script = lambda _folder: None  # it writes at once, and we never need it
        self._writer = AsyncWriter()

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

    def trainable_state(self, **options: Any) -> Iterator[dict[str, Tensor]]:
        """Trained weights under Hugging Face (full) or PEFT (adapter) names; `outgoing` says how they come."""
        return self.outgoing(trained(self.module), **options)

    def outgoing(
        self, items: Sequence[Outgoing], *, chunk_bytes: int = CHUNK_BYTES, on_device: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """The items by name, made from what `chunk_bytes` hold at a time.

        All ranks must run through it together: under ZeRO-3 each chunk is gathered as it is asked for and let
        go before the next, so no rank ever holds more than one chunk (or one item that is larger) besides
        its share. Rank 0 gets copies on the CPU, the others empty chunks; `on_device` gives copies on the
        device to all ranks.
        """
        for group in bounded(((item, item.nbytes) for item in items), chunk_bytes):
            yield self._chunk(group, on_device)  # no name of ours keeps it while the next one is gathered

    def _chunk(self, group: Sequence[Outgoing], on_device: bool) -> dict[str, Tensor]:
        with self._gathered([parameter for item in group for parameter in item.parameters]):
            if self.rank != 0 and not on_device:
                return {}
            return {item.name: item.tensor(item.parameters[0].device if on_device else "cpu") for item in group}

    def _gathered(self, parameters: Sequence[Tensor]) -> Any:
        if not self._sharded:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=None)

    def save(self, folder: Path, client_state: dict[str, Any]) -> None:
        """Copy this rank's share of weights, optimizer and schedule, and begin to write it below `folder`.

        All ranks call it. It returns once the copy is made; `written` tells when it is on the disk, and the
        next `save` must wait for that. Frozen base weights of a LoRA model are left out: they come from the
        model's own path.

        Args:
            client_state: JSON values that `load` gives back.
        """
        self._engine.save_checkpoint(
            str(folder),
            tag=STATE_TAG,
            save_latest=False,
            exclude_frozen_parameters=not self._saves_all,
        )
        taken, self._snapshots.taken = self._snapshots.taken, {}
        files: dict[str, Any] = {Path(p).relative_to(folder).as_posix(): state for p, state in taken.items()}
        model = tuple(name for name in files if name.endswith("model_states.pt"))
        optimizer = tuple(name for name in files if name.endswith("optim_states.pt"))
        parts = {"weights": model + optimizer, "scheduler": model}
        parts["optimizer"] = optimizer if self._stage else model
        if self.rank == 0:
            facts = {"client": client_state, "ranks": self.world_size, "zero_stage": self._stage}
            facts["shapes"] = self._shapes
            files[LEARNER_FILE] = json.dumps(facts).encode()
            parts["learner"] = (LEARNER_FILE,)
        self._writer.start(folder, files, parts)

    def written(self, wait: bool) -> Written | None:
        """What this rank has written of the last `save`; None while it still writes and `wait` is false.

        A failed disk comes back as `Written.error`; whatever else went wrong is raised.
        """
        return self._writer.result(wait)

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore what `save` wrote and return its client state. All ranks call it.

        On as many ranks and at the ZeRO stage of `save` it is bit-exact in all that follows. On others the
        state is the same bits, cut anew; later updates then differ by rounding.

        Raises ResumeError for a file that would run foreign code.
        """
        refuse_foreign_code(folder)
        facts = json.loads((folder / LEARNER_FILE).read_bytes())
        if (facts["ranks"], facts["zero_stage"]) == (self.world_size, self._stage):
            strict = self._saves_all
            path, _ = self._engine.load_checkpoint(str(folder), tag=STATE_TAG, load_module_strict=strict)
            if path is None:
                raise FileNotFoundError(f"{folder}: no saved learner state for rank {self.rank}")
        else:
            shards = folder / STATE_TAG
            self._load_cut(zero_shards.read(shards, facts["ranks"], facts["zero_stage"], facts["shapes"]))
        self._apply_settings()
        return dict(facts["client"])

    def _apply_settings(self) -> None:
        """Rates, decay and clipping are the configuration's, where DeepSpeed restores a checkpoint's.

        Without a fork both are the same bits.
        """
        settings, schedule = self._settings, self._scheduler
        schedule.base_lrs = [settings.learning_rate] * len(schedule.base_lrs)
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
        for group, rate, decay in zip(self._optimizer.param_groups, rates, self._decays, strict=True):
            group |= {"lr": rate, "initial_lr": settings.learning_rate}
            group |= {"betas": settings.betas, "weight_decay": decay}
        if self._stage:
            self._engine.optimizer.clip_grad = settings.max_grad_norm

    def _load_cut(self, saved: zero_shards.Saved) -> None:
        """Give DeepSpeed's optimizer this rank's pieces in its own format, as if it had saved them."""
        optimizer, stage = self._engine.optimizer, self._stage
        if self._sharded:
            optimizer.checkpoint_event_prologue()
        own = optimizer.state_dict()
        base = own[zero_shards.BASE[stage]] if stage else own
        shapes = self._engine._get_zero_param_shapes() if stage else self._shapes
        if self._sharded:
            lengths = [vector.numel() for vector in own[zero_shards.MASTERS[stage]]]
        else:
            lengths = [vector.numel() for group in self._optimizer.param_groups for vector in group["params"]]
        masters, state = zero_shards.reshard(
            saved, shapes, lengths, base["param_groups"],
            stage=stage, rank=self.rank, ranks=self.world_size,
        )  # fmt: skip
        if stage == 0:
            self._load_plain(masters, state)
        else:
            own |= {zero_shards.BASE[stage]: state, zero_shards.MASTERS[stage]: masters}
            optimizer.load_state_dict([None] * self.rank + [own], load_from_fp32_weights=True)
            if self._sharded:
                optimizer.checkpoint_event_epilogue()
            else:
                optimizer.update_lp_params()
        self._scheduler.load_state_dict(saved.common["lr_scheduler"])
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, name, saved.common[name])

    def _load_plain(self, masters: list[Tensor], state: dict[str, Any]) -> None:
        """Stage 0: a torch optimizer, one state a parameter, in the parameter's shape."""
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for index, (parameter, master) in enumerate(zip(parameters, masters, strict=True)):
            parameter.data.copy_(master.view(parameter.shape))
            for moment in zero_shards.MOMENTS:
                state["state"][index][moment] = state["state"][index][moment].view(parameter.shape)
        self._optimizer.load_state_dict(state)

    def destroy(self) -> None:
        """Free the engine. The process stays in its group until it ends."""
        self._engine.destroy()
