"""The ranks of a DeepSpeed test, each a process of its own, started by `launch` (used by test_deepspeed.py).

A case is a dictionary: {"name", "kind", "stage", "sizes", ...}. All cases of one launch share the processes,
one engine after another, because joining costs more than training tiny models.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rairl_ray.algorithms.discriminator_losses import gradient_penalty, segment_sums
from rairl_ray.config.machine_schema import Learner
from rairl_ray.config.schema import Build, Lora, Model, Optimizer
from rairl_ray.data.batching import DiscriminatorTensors, discriminator_tensors
from rairl_ray.engines.environment import setup_environment
from rairl_ray.engines.heads import ImplicitModel, LogprobModel, ScalarModel
from rairl_ray.engines.models import load_causal_lm, load_token_classifier, resolve_model
from rairl_ray.engines.outgoing import merged, trained
from rairl_ray.engines.weights import Checksum, checksum, whole
from rairl_ray.keys import keyed_generator
from rairl_ray.types import DiscriminatorSample

BUILD = Build(hidden_size=64, layers=2, heads=2, intermediate_size=96, max_length=64)
SETTINGS = Optimizer(learning_rate=1e-3, max_grad_norm=0.5, weight_decay=0.1, warmup_ratio=0.25)
FORKED = Optimizer(learning_rate=4e-3, max_grad_norm=0.2, weight_decay=0.3, betas=(0.8, 0.9), warmup_ratio=0.25)
"""What a case with `forked` goes on with after its two first updates."""
DEVICE = os.environ.get("RAIRL_TEST_DEVICE", "cpu")
"""Where the ranks train; the processes of tests/engines/test_gpu.py find `cuda` here."""
ROWS = 8
TOTAL_UPDATES = 4
CHUNK = 40_000
"""Bytes; the largest tensor of the test models has 24576."""


def base_path(folder: Path) -> str:
    return resolve_model(Model(build=BUILD), role="policy", cache_dir=folder, seed=1)


def make_module(
    kind: str, path: str, *, dtype: str = "float32", checkpointing: bool = False, **extra: Any
) -> Any:
    """A module of heads.py; kind is policy|scalar|shaped|implicit, then `-lora` for an adapter.

    `extra`: other keys of the `model` section.
    """
    head, _, adapter = kind.partition("-")
    lora = Lora(rank=4) if adapter else Lora()
    model = Model.model_validate(
        {"lora": lora, "dtype": dtype, "gradient_checkpointing": checkpointing, **extra}
    )
    if head in ("scalar", "shaped"):
        module: Any = ScalarModel(
            load_token_classifier(path, model, outputs=2 if head == "shaped" else 1, device=DEVICE, seed=3)
        )
    elif head == "policy":
        module = LogprobModel(load_causal_lm(path, model, device=DEVICE, seed=3), with_reference=True)
    else:
        module = ImplicitModel(load_causal_lm(path, model, device=DEVICE, seed=3), 0.5)
    if adapter:  # B starts at 0, which leaves A without a gradient; a started adapter tests both
        generator = torch.Generator().manual_seed(5)
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.02
                parameter.data.copy_(drawn)
    return module


def make_samples(step: int) -> list[DiscriminatorSample]:
    """ROWS random traces of uneven lengths, two of each prompt, with units that leave out the first tokens."""
    random = keyed_generator("deepspeed test", step)
    samples: list[DiscriminatorSample] = []
    for row in range(ROWS):
        size, completion = int(random.integers(9, 16)), int(random.integers(5, 20))
        prompt = tuple(int(i) for i in random.integers(10, 90, size=size))
        ends = sorted({int(e) for e in random.integers(2, completion, size=3)} | {completion - 1})
        samples.append(
            DiscriminatorSample(
                prompt_ids=prompt if row < ROWS // 2 else samples[row - ROWS // 2].prompt_ids,
                completion_ids=tuple(int(i) for i in random.integers(10, 90, size=completion)),
                unit_tokens=torch.tensor(ends).numpy(),
                unit_starts=torch.tensor([1] + [e + 1 for e in ends[:-1]]).numpy(),
                positive=row % 2 == 0,
                pair_id=row // 2,
            )
        )
    return samples


def log_probs(forward: Callable[..., Any], batch: DiscriminatorTensors) -> Tensor:
    rows = (batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids)
    return forward(*rows, packing=batch.packing)


def loss_of(
    forward: Callable[..., Any],
    kind: str,
    samples: list[DiscriminatorSample],
    penalty: bool = False,
    packed: bool = False,
) -> Tensor:
    """A contribution that is a plain sum over samples, over global denominators that depend on no split."""
    batch = discriminator_tensors(samples, pad_id=0, packed=packed).to(DEVICE)
    head = kind.partition("-")[0]
    if head == "policy":
        logprobs = log_probs(forward, batch)
        weights = torch.sin(batch.target_positions.float()) * batch.completion_mask
        if penalty:  # as the policy's KL term: the reference pass falls between forward and backward
            reference = log_probs(getattr(forward, "module", forward).reference_logprobs, batch)
            logprobs = logprobs + (logprobs - reference).pow(2)
        return (weights * logprobs).sum() / (10.0 * ROWS)
    sign = 1.0 - 2.0 * batch.positive.float()[:, None]
    values, extra = unit_outputs(forward, kind, batch, penalty)
    return (torch.nn.functional.softplus(sign * values) * batch.unit_mask).sum() / (3.0 * ROWS) + extra


def unit_outputs(
    forward: Callable[..., Any], kind: str, batch: DiscriminatorTensors, penalty: bool = False
) -> tuple[Tensor, Any]:
    if kind.startswith("implicit"):
        ratios = log_probs(forward, batch)
        return segment_sums(ratios, batch.unit_start_index, batch.unit_end_index, batch.unit_mask), 0.0
    states = batch.prompt_lengths[:, None] + batch.unit_start_index - 1

    def cost(values: Tensor, embeddings: Tensor) -> Tensor:
        return gradient_penalty(values, embeddings, batch.unit_mask, batch.positive, positive_traces=ROWS // 2)

    values, shaping, extra = forward(
        batch.input_ids, batch.attention_mask, batch.unit_positions, states,
        penalty=cost if penalty else None, packing=batch.packing,
    )  # fmt: skip
    if shaping is not None:
        values = values + 0.9 * shaping
    return values, 0.0 if extra is None else extra


def launch(cases: list[dict[str, Any]], folder: Path, world: int, timeout: float = 400) -> dict[str, Any]:
    """Run the cases on `world` processes: case name -> what rank 0 recorded. Raises with a failure's output."""
    base_path(folder)
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    ranks = [forks().Process(target=one_rank, args=(cases, folder, rank, world, port)) for rank in range(world)]
    deadline = time.monotonic() + timeout
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(deadline - time.monotonic())
    finally:
        for process in ranks:
            process.kill()
            process.join()
    for rank, process in enumerate(ranks):
        if process.exitcode != 0:
            output = output_of(folder, rank).read_text()
            raise AssertionError(f"rank {rank} ended with {process.exitcode}:\n{output[-4000:]}")
    return torch.load(folder / "result.pt")


@functools.cache
def forks() -> Any:
    """Starts processes that have this file's imports: those take longer than most launches' training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "rairl_ray.engines.deepspeed_engine"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        patch.setenv("DS_ACCELERATOR", DEVICE)
        multiprocessing.forkserver.ensure_running()
    return context


def output_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def stale_locks(folder: Path) -> Path:
    """A cache of compiled kernels whose builders were killed: whoever wants one waits for its lock forever."""
    names = ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils", "async_io")
    for name in names:
        lock = folder / "extensions" / name / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
    return folder / "extensions"


def run_case(case: dict[str, Any], folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Train as the case says; what rank 0 returns is compared with a plain loop by the test."""
    from rairl_ray.engines.deepspeed_engine import DeepSpeedEngine

    kind, path = case["kind"], base_path(folder)

    def engine_for(settings: Optimizer = SETTINGS) -> Any:
        module = make_module(
            kind,
            path,
            dtype=case.get("dtype", "float32"),
            checkpointing=case.get("checkpointing", False),
            **case.get("model", {}),
        )
        if "chunk" in case:
            module.wrapped.get_output_embeddings().chunk_tokens = case["chunk"]
        return DeepSpeedEngine(
            module,
            settings,
            Learner(zero_stage=case["stage"], offload=case.get("offload", "none")),
            total_updates=TOTAL_UPDATES,
            device=DEVICE,
            timeout_seconds=case.get("timeout", 120),
            weight_clip=case.get("weight_clip"),
        )

    def train(engine: Any, steps: range) -> list[dict[str, float]]:
        return [step_once(engine, case, step, rank, world) for step in steps]

    engine = engine_for()
    if "steps_from" in case:
        return run_part(engine, case, folder, train)
    if case.get("resume"):
        train(engine, range(2))
        engine.save(folder / f"saved-{case['name']}", {"version": 2})
        train(engine, range(2, 4))  # while it is being written
        assert engine.written(wait=True).error is None
        straight = whole(engine.trainable_state())
        engine.destroy()
        engine = engine_for(FORKED if case.get("forked") else SETTINGS)
        client = engine.load(folder / f"saved-{case['name']}")
        reports = train(engine, range(2, 4))
        result = {"straight": straight, "client": client, "reports": reports}
    else:
        result = {"reports": train(engine, range(case.get("steps", 3)))}
    result["state"] = whole(engine.trainable_state())
    result["chunks"] = chunk_record(engine)
    if kind == "policy-lora":
        result["merged"] = whole(engine.outgoing(merged(engine.module), chunk_bytes=CHUNK))
    batch = discriminator_tensors(make_samples(99), pad_id=0, packed=case.get("packed", False)).to(DEVICE)
    if kind.startswith("policy"):
        result["scores"] = log_probs(engine.infer, batch).cpu()
        result["reference"] = log_probs(engine.module.reference_logprobs, batch).cpu()
    else:
        result["scores"] = unit_outputs(engine.infer, kind, batch)[0].cpu()
    engine.destroy()
    return result


def chunk_record(engine: Any) -> dict[str, Any]:
    """How the state comes in chunks of CHUNK: bytes gathered for each, what stays gathered, checksums."""
    gathered: list[int] = []
    gather = engine._gathered

    def watched(parameters: Any) -> Any:
        gathered.append(sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in parameters))
        return gather(parameters)

    engine._gathered = watched
    digest, left, sizes = Checksum(), [], []
    for chunk in engine.trainable_state(chunk_bytes=CHUNK):
        digest.update(chunk)
        sizes.append(sum(tensor.nbytes for tensor in chunk.values()))
        # matrices stay partitioned between their uses; vectors always stay whole (persistent)
        left.append([n for n, p in engine.module.named_parameters() if p.ndim > 1 and whole_here(p)])
    engine._gathered = gather
    on_device = list(engine.trainable_state(chunk_bytes=CHUNK, on_device=True))
    return {
        "gathered": gathered,
        "sizes": sizes,
        "left": left,
        "checksum": digest.hexdigest(),
        "on_device": checksum(whole(on_device)),
        "shapes": [(item.name, item.dtype, item.shape) for item in trained(engine.module)],
    }


def whole_here(parameter: Any) -> bool:
    """Whether ZeRO-3 has gathered this parameter and not let it go."""
    return getattr(parameter, "ds_status", None) is not None and parameter.ds_status.name == "AVAILABLE"


def run_part(engine: Any, case: dict[str, Any], folder: Path, train: Callable[..., Any]) -> dict[str, Any]:
    """Updates `steps_from` to `steps_to` of a longer run: load, look, then after each update look and save."""
    result: dict[str, Any] = {"after": {}, "reports": {}}
    if "load" in case:
        result["client"] = engine.load(folder / case["load"])
        result["loaded"] = full_state(engine)
    for step in range(case["steps_from"] + 1, case["steps_to"] + 1):
        (result["reports"][step],) = train(engine, range(step - 1, step))
        result["after"][step] = full_state(engine)
        if step in case.get("save", {}):
            engine.save(folder / case["save"][step], {"version": step})
    result["state"] = whole(engine.trainable_state())
    if "save" in case:
        assert engine.written(wait=True).error is None
    engine.destroy()
    return result


def full_state(engine: Any) -> dict[str, dict[str, Tensor]]:
    """Parameter -> float32 weights and Adam moments, put together by DeepSpeed's own functions."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    zero, found = engine._engine.optimizer, {}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):  # its functions look through links made once
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(zero, torch.optim.Optimizer):
            values = {"master": parameter, **zero.state[parameter]}
        else:
            values = {k: safe_get_full_optimizer_state(parameter, k) for k in ("exp_avg", "exp_avg_sq")}
            values["master"] = safe_get_full_fp32_param(parameter)
        kinds = ("master", "exp_avg", "exp_avg_sq")
        found[name] = {kind: values[kind].detach().clone().reshape(-1) for kind in kinds}
    return found


def step_once(engine: Any, case: dict[str, Any], step: int, rank: int, world: int) -> dict[str, float]:
    """This rank's share of the step, in `sizes[step]` micro-batches; an empty one runs with weight zero."""
    kind, penalty, packed = case["kind"], case.get("penalty", False), case.get("packed", False)
    mine = (
        make_samples(step)[rank::world] if not case.get("starve") else make_samples(step) if rank == 0 else []
    )
    count = case.get("sizes", [2, 1, 3, 5])[step]
    losses = []
    for part in (mine[i::count] for i in range(count)):
        if part:
            losses.append(lambda part=part: loss_of(engine, kind, part, penalty, packed))
        else:
            losses.append(lambda: 0.0 * loss_of(engine, kind, make_samples(0)[:1], penalty, packed))
    if kind.startswith("policy"):  # scoring between updates must not disturb them
        log_probs(
            engine.infer, discriminator_tensors(make_samples(step)[:2], pad_id=0, packed=packed).to(DEVICE)
        )
    return engine.update(losses)


def one_rank(cases: list[dict[str, Any]], folder: Path, rank: int, world: int, port: int) -> None:
    """What a process of `launch` does."""
    with open(output_of(folder, rank), "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(stale_locks(folder))
    if DEVICE == "cuda":
        # as Ray does for an actor: a rank sees its own device alone
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[rank] if visible != [""] else str(rank)
    setup_environment(rank, world, "127.0.0.1", port, DEVICE, 1)
    gc.freeze()  # as LearnerActor.open does
    results = {case["name"]: run_case(case, folder, rank, world) for case in cases}
    if rank == 0:
        torch.save(results, folder / "result.pt")
    torch.distributed.destroy_process_group()
