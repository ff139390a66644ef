"""DeepSpeedEngine against a plain single-process PyTorch loop over the whole batch: real ranks over gloo."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rairl_ray.config.schema import Optimizer
from rairl_ray.engines.weights import checksum, exported_name
from tests.deepspeed_rank import (
    CHUNK,
    FORKED,
    SETTINGS,
    TOTAL_UPDATES,
    base_path,
    launch,
    loss_of,
    make_module,
    make_samples,
    unit_outputs,
)

KINDS = ("policy", "policy-lora", "scalar", "scalar-lora", "shaped", "shaped-lora", "implicit", "implicit-lora")


def case(kind: str, stage: int, name: str = "", **options: Any) -> dict[str, Any]:
    return {"name": f"{kind}/{stage}/{name}", "kind": kind, "stage": stage, **options}


# What two ranks do; one launch for all of them keeps this file fast. The slow tests do the rest.
PLAIN = [
    *[case("policy", stage) for stage in (0, 1, 2, 3)],
    case("scalar", 2),
    # each prompt once for all its traces (the plain loop that they equal reads a row a trace)
    case("shaped-lora", 3, "packed", packed=True),
    case("implicit", 3, "packed", packed=True),
    case("implicit-lora", 1, "packed", packed=True),
    case("scalar", 0, "penalty", penalty=True),
    case("policy-lora", 3, "reference", penalty=True, packed=True),
    # several chunks of the output layer, a different number on each rank, recomputed in the backward pass
    case("policy", 3, "chunked", chunk=7, checkpointing=True, packed=True),
    # rank 1 has no samples at all and runs passes of weight zero
    case("policy", 3, "starved", starve=True, packed=True),
]
SLOW = [
    case("scalar-lora", 2, "penalty", penalty=True),
    case("policy", 3, "reference", penalty=True),
    case("policy-lora", 2, "reference", penalty=True),
    case("policy-lora", 3, "chunked", chunk=7, checkpointing=True),
    case("scalar", 1, "starved", starve=True),
]
OTHERS = [
    case("policy", 1, "resume", resume=True, sizes=[2, 1, 2, 1]),
    case("shaped-lora", 3, "resume", resume=True, sizes=[1, 1, 1, 1]),
    case("policy-lora", 2, "bf16", resume=True, dtype="bfloat16"),
    case("scalar", 0, "bf16", resume=True, dtype="bfloat16"),
    case("scalar", 3, "clamped", weight_clip=0.01),
]
FORKS = [case("policy", stage, "forked", resume=True, forked=True) for stage in (0, 2, 3)]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, launch([*PLAIN, *OTHERS, *FORKS], folder, world=2)


def plain_loop(
    kind: str, path: str, *, penalty: bool = False, steps: int = 3, forked: bool = False
) -> tuple[Any, list[float], list[float]]:
    """The independent reference: (module, gradient norms, losses) of AdamW steps on the undivided batch.

    `forked`: from the third update on with the settings FORKED.
    """
    module = make_module(kind, path)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": SETTINGS.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=SETTINGS.learning_rate,
        betas=SETTINGS.betas,
    )
    # warm-up over the first quarter of 4 updates, then half a cosine over the other 3
    factors = [0.5, 1.0, 0.5 * (1 + math.cos(math.pi / 3)), 0.5 * (1 + math.cos(2 * math.pi / 3))]
    norms, losses = [], []
    for step in range(steps):
        settings = FORKED if forked and step >= 2 else SETTINGS
        decays = (settings.weight_decay, 0.0)
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            rate = settings.learning_rate * factors[step]
            group |= {"lr": rate, "betas": settings.betas, "weight_decay": decay}
        optimizer.zero_grad()
        loss = loss_of(module, kind, make_samples(step), penalty)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm)))
        losses.append(loss.item())
        optimizer.step()
    return module, norms, losses


def compare(found: dict[str, Any], kind: str, path: str, **options: Any) -> None:
    module, norms, _ = plain_loop(kind, path, **options)
    expected = {exported_name(n): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    assert set(found["state"]) == set(expected)
    for name, tensor in expected.items():
        # AdamW moves a weight by the learning rate however small its gradient: rounding shows in a few.
        off = (found["state"][name] - tensor).abs()
        assert off.max() < 2e-5 and off.mean() < 2e-7, (name, off.max(), off.mean())
    torch.testing.assert_close([r["grad_norm"] for r in found["reports"]], norms, rtol=1e-5, atol=1e-6)
    assert min(norms) > 0
    batch = _batch(make_samples(99))
    with torch.no_grad():
        if kind.startswith("policy"):
            arguments = (batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids)
            scores = module(*arguments)
            untrained = make_module(kind.partition("-")[0], path)
            torch.testing.assert_close(found["reference"], untrained(*arguments), rtol=0, atol=1e-5)
        else:
            scores = unit_outputs(module, kind, batch)[0]
    torch.testing.assert_close(found["scores"], scores, rtol=0, atol=1e-4)


def _batch(samples: list[Any]) -> Any:
    from rairl_ray.data.batching import discriminator_tensors

    return discriminator_tensors(samples, pad_id=0)


@pytest.mark.parametrize("plan", PLAIN, ids=[plan["name"] for plan in PLAIN])
def test_two_ranks_equal_a_plain_loop(plan: dict[str, Any], two_ranks: tuple[Path, dict[str, Any]]) -> None:
    folder, results = two_ranks
    compare(results[plan["name"]], plan["kind"], base_path(folder), penalty=plan.get("penalty", False))


@pytest.mark.parametrize("plan", [*PLAIN, *OTHERS], ids=[plan["name"] for plan in [*PLAIN, *OTHERS]])
def test_no_rank_holds_more_than_a_chunk_of_the_model(
    plan: dict[str, Any], two_ranks: tuple[Path, dict[str, Any]]
) -> None:
    found = two_ranks[1][plan["name"]]
    chunks, state = found["chunks"], found["state"]
    assert max(chunks["gathered"]) <= CHUNK and max(chunks["sizes"]) <= CHUNK
    assert chunks["sizes"] == chunks["gathered"]
    assert sum(chunks["sizes"]) == sum(tensor.nbytes for tensor in state.values())
    assert chunks["left"] == [[] for _ in chunks["sizes"]]
    assert chunks["checksum"] == chunks["on_device"] == checksum(state)
    assert chunks["shapes"] == [(name, t.dtype, tuple(t.shape)) for name, t in state.items()]
    if not plan["kind"].endswith("-lora"):
        assert len(chunks["sizes"]) > 3, "the model must be larger than a few chunks for this to show anything"


@pytest.mark.parametrize("plan", [p for p in [*PLAIN, *OTHERS] if p["kind"] == "policy-lora"], ids=str)
def test_a_merged_adapter_is_gathered_and_added_at_every_stage(
    plan: dict[str, Any], two_ranks: tuple[Path, dict[str, Any]]
) -> None:
    folder, results = two_ranks
    state, found = results[plan["name"]]["state"], results[plan["name"]]["merged"]
    dtype = next(iter(state.values())).dtype
    base = make_module("policy", base_path(folder), dtype=plan.get("dtype", "float32")).wrapped.state_dict()
    assert set(found) == {f"{name}.weight" for name in adapted(state)}
    for name in adapted(state):
        down, up = (state[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
        expected = base[f"{name}.weight"].float() + 2 * (up @ down)
        tensor = found[f"{name}.weight"]
        assert tensor.dtype == dtype and not torch.equal(tensor, base[f"{name}.weight"])
        bound = 1e-6 if dtype == torch.float32 else 2**-8 * float(expected.abs().max())
        torch.testing.assert_close(tensor.float(), expected, rtol=0, atol=bound)


def adapted(state: dict[str, torch.Tensor]) -> set[str]:
    return {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in state}


def test_resume_is_bit_exact(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    for plan in OTHERS:
        if not plan.get("resume"):
            continue
        found = two_ranks[1][plan["name"]]
        assert found["client"] == {"version": 2}
        assert found["state"].keys() == found["straight"].keys()
        for name, tensor in found["straight"].items():
            assert torch.equal(found["state"][name], tensor), (plan["name"], name)
        # the schedule goes on where it stopped: the third and fourth of four updates
        assert [r["learning_rate"] / SETTINGS.learning_rate for r in found["reports"]] == pytest.approx(
            [0.75, 0.25]
        )


def test_stale_locks_of_compiled_kernels_are_never_waited_for(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    """All ranks of this file run beside locks that a killed process left: torch's own wait has no end."""
    found = {path.relative_to(two_ranks[0] / "extensions") for path in (two_ranks[0] / "extensions").rglob("*")}
    assert len(found) == 10, "a kernel was compiled"


def test_resume_differs_from_a_fresh_start(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    """The comparison above would also pass if nothing were trained."""
    folder, results = two_ranks
    fresh = dict(make_module("policy", base_path(folder)).named_parameters())
    state = results["policy/1/resume"]["state"]
    moved = [(state[exported_name(name)] - p.detach()).abs().max() for name, p in fresh.items()]
    assert max(moved) > 1e-4


def test_frozen_weights_stay_out_of_saved_state(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = two_ranks
    full = folder / "saved-policy" / "1" / "resume"
    adapter = folder / "saved-policy-lora" / "2" / "bf16"
    sizes = [sum(f.stat().st_size for f in place.rglob("mp_rank*")) for place in (full, adapter)]
    assert sizes[1] < 0.2 * sizes[0]
    (file,) = adapter.rglob("mp_rank*")
    assert all("lora" in name for name in torch.load(file, weights_only=False)["module"])


def test_bfloat16_trains_close_to_float32(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    folder, results = two_ranks
    found = results["scalar/0/bf16"]
    assert all(tensor.dtype == torch.bfloat16 for tensor in found["state"].values())
    module, _, _ = plain_loop("scalar", base_path(folder), steps=4)
    expected = {exported_name(n): p.detach() for n, p in module.named_parameters()}
    start = {
        exported_name(n): p.detach() for n, p in make_module("scalar", base_path(folder)).named_parameters()
    }
    name = "model.layers.1.mlp.down_proj.weight"
    moved, wanted = found["state"][name].float() - start[name], expected[name] - start[name]
    assert torch.nn.functional.cosine_similarity(moved.flatten(), wanted.flatten(), dim=0) > 0.8


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_fork_goes_on_with_its_own_rates(stage: int, two_ranks: tuple[Path, dict[str, Any]]) -> None:
    folder, results = two_ranks
    found = results[f"policy/{stage}/forked"]
    module, norms, _ = plain_loop("policy", base_path(folder), steps=4, forked=True)
    expected = {exported_name(n): p.detach() for n, p in module.named_parameters()}
    for name, tensor in expected.items():
        off = (found["state"][name] - tensor).abs()
        assert off.max() < 1e-4 and off.mean() < 1e-6, (name, off.max(), off.mean())
    torch.testing.assert_close([r["grad_norm"] for r in found["reports"]], norms[2:], rtol=1e-4, atol=1e-6)
    other = max((found["straight"][name] - tensor).abs().max() for name, tensor in expected.items())
    assert other > 1e-3, "with the rates of the checkpoint it would have gone elsewhere"


def test_weight_clip_clamps_every_trained_weight(two_ranks: tuple[Path, dict[str, Any]]) -> None:
    state = two_ranks[1]["scalar/3/clamped"]["state"]
    assert max(tensor.abs().max().item() for tensor in state.values()) == pytest.approx(0.01, abs=1e-7)


def test_one_rank_equals_a_plain_loop(tmp_path: Path) -> None:
    plans = [case("policy-lora", 2), case("scalar", 0)]
    results = launch(plans, tmp_path, world=1)
    for plan in plans:
        compare(results[plan["name"]], plan["kind"], base_path(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_module_at_every_stage(world: int, tmp_path: Path) -> None:
    plans = [*[case(kind, stage) for kind in KINDS for stage in (0, 1, 2, 3)], *SLOW]
    results = launch(plans, tmp_path, world=world, timeout=800)
    for plan in plans:
        compare(results[plan["name"]], plan["kind"], base_path(tmp_path), penalty=plan.get("penalty", False))


SILENT_RANK = """
import sys, time
from rairl_ray.engines.environment import setup_environment
rank = int(sys.argv[1])
setup_environment(rank, 2, "127.0.0.1", int(sys.argv[2]), "cpu", 1)
import torch
from rairl_ray.config.machine_schema import Learner
from rairl_ray.config.schema import Optimizer
from rairl_ray.engines.deepspeed_engine import DeepSpeedEngine
torch.manual_seed(0)
engine = DeepSpeedEngine(torch.nn.Linear(4, 1), Optimizer(), Learner(zero_stage=1),
                         total_updates=1, device="cpu", timeout_seconds=20)
engine.update([lambda: engine(torch.ones(2, 4)).sum()])
print("joined", flush=True)
if rank == 1:
    time.sleep(300)
engine.update([lambda: engine(torch.ones(2, 4)).sum()])
"""


@pytest.mark.slow
def test_a_silent_rank_ends_the_collective_at_the_deadline() -> None:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    root = Path(__file__).resolve().parents[2]
    options: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "cwd": root,
    }
    ranks = [subprocess.Popen([sys.executable, "-c", SILENT_RANK, str(r), port], **options) for r in (0, 1)]
    try:
        start = time.monotonic()
        output = ranks[0].communicate(timeout=200)[0]
        assert ranks[0].returncode != 0
        assert "joined" in output
        assert "imed out" in output, output[-2000:]
        assert time.monotonic() - start < 150
    finally:
        for rank in ranks:
            rank.kill()


def test_learning_rate_schedules() -> None:
    code = """
import json
from rairl_ray.engines.environment import setup_environment
setup_environment(0, 1, "127.0.0.1", 1, "cpu", 1)
from rairl_ray.config.schema import Optimizer
from rairl_ray.engines.optimizer import learning_rate_factor
rows = {s: [learning_rate_factor(u, Optimizer(schedule=s, warmup_ratio=0.2), 10) for u in range(11)]
        for s in ("constant", "linear", "cosine")}
print(json.dumps(rows))
"""
    import json

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    warmup = [1 / 3, 2 / 3]
    assert rows["constant"] == pytest.approx(warmup + [1.0] * 9)
    assert rows["linear"] == pytest.approx(warmup + [1 - i / 8 for i in range(9)])
    assert rows["cosine"] == pytest.approx(warmup + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)])


def test_defaults_are_the_papers() -> None:
    settings = Optimizer()
    assert (settings.betas, settings.weight_decay, settings.max_grad_norm) == ((0.9, 0.99), 0.1, 1.0)
    assert TOTAL_UPDATES == 4
