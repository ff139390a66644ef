"""Learners and whole runs on GPUs: `make gpu-test`. Not one of these has run yet (docs/gpu.md).

Numbers are compared with the float32 loop on the CPU of tests/engines/test_deepspeed.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rairl_ray import metrics as names
from rairl_ray.config.schema import Model
from rairl_ray.engines.heads import LogprobModel
from rairl_ray.engines.models import load_causal_lm
from rairl_ray.engines.weights import exported_name
from rairl_ray.runfolder import RunFolder
from tests import deepspeed_rank, gpu_needs
from tests.deepspeed_rank import base_path, make_module, make_samples
from tests.engines.test_deepspeed import case, plain_loop
from tests.runs import TINY, TINY_AIRL, launch

pytestmark = [pytest.mark.gpu, gpu_needs.gpus(1)]

FLOAT32 = [
    *[case("policy", stage, "fp32") for stage in (0, 1, 2, 3)],
    case("scalar", 0, "penalty", penalty=True),
    case("shaped-lora", 3, "fp32"),
    case("implicit-lora", 1, "fp32", packed=True),
    case("policy", 3, "packed", checkpointing=True, packed=True),
    case("policy", 3, "chunked", chunk=7, checkpointing=True),
    case("policy", 2, "offload", offload="cpu"),
]
BFLOAT16 = [
    *[case("policy", stage, "bf16", dtype="bfloat16") for stage in (1, 2, 3)],
    case("policy-lora", 2, "bf16 checkpointing", dtype="bfloat16", checkpointing=True),
    case("scalar", 0, "bf16", dtype="bfloat16", packed=True),
    case("implicit-lora", 1, "bf16", dtype="bfloat16"),
    case("policy", 1, "bf16 offload", dtype="bfloat16", offload="cpu"),
]
RESUMED = case("policy-lora", 2, "resume", dtype="bfloat16", resume=True, sizes=[2, 1, 2, 1])
NF4 = [
    case(kind, stage, "nf4", dtype="bfloat16", checkpointing=True, model={"quantization": "nf4"})
    for kind, stage in (("policy-lora", 1), ("scalar-lora", 2), ("implicit-lora", 2))
]


def launch_on_gpus(
    cases: list[dict[str, Any]], folder: Path, world: int, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """`deepspeed_rank.launch` with rank i on device i, over NCCL."""
    monkeypatch.setenv("RAIRL_TEST_DEVICE", "cuda")
    return deepspeed_rank.launch(cases, folder, world)


def moved(found: dict[str, Any], kind: str, path: str, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """All weights' steps, [P] each: on the GPU, and by the plain float32 loop on the CPU."""
    module, _, _ = plain_loop(kind, path, **options)
    start = {exported_name(n): p.detach() for n, p in make_module(kind, path).named_parameters()}
    end = {exported_name(n): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    assert set(found["state"]) == set(end)
    ours = torch.cat([(found["state"][n].float() - start[n]).flatten() for n in end])
    return ours, torch.cat([(end[n] - start[n]).flatten() for n in end])


def compare(plan: dict[str, Any], found: dict[str, Any], path: str, cosine: float, norm: float) -> None:
    """Steps in one direction, and gradient norms within the relative tolerance `norm`."""
    options = {"penalty": plan.get("penalty", False)}
    ours, wanted = moved(found, plan["kind"], path, **options)
    assert torch.nn.functional.cosine_similarity(ours, wanted, dim=0) > cosine, plan["name"]
    _, norms, _ = plain_loop(plan["kind"], path, **options)
    assert [report["grad_norm"] for report in found["reports"]] == pytest.approx(norms, rel=norm), plan["name"]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=gpu_needs.gpus(2))])
def test_learners_step_as_on_a_cpu(world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every ZeRO stage, adapters, heads, gradient checkpointing, offload; two ranks form an NCCL group."""
    results = launch_on_gpus([*FLOAT32, *BFLOAT16, RESUMED], tmp_path, world, monkeypatch)
    path = base_path(tmp_path)
    for plan in FLOAT32:
        compare(plan, results[plan["name"]], path, cosine=0.999, norm=1e-3)
    for plan in BFLOAT16:
        compare(plan, results[plan["name"]], path, cosine=0.8, norm=0.1)
    found = results[RESUMED["name"]]
    for name, tensor in found["straight"].items():
        assert torch.equal(found["state"][name], tensor), name


@gpu_needs.bitsandbytes
def test_a_4_bit_base_trains_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Close to the adapter of the float32 base: the rest is quantisation error."""
    results = launch_on_gpus(NF4, tmp_path, 1, monkeypatch)
    for plan in NF4:
        compare(plan, results[plan["name"]], base_path(tmp_path), cosine=0.7, norm=0.25)


@gpu_needs.flash_attention
def test_flash_attention_agrees_with_sdpa(tmp_path: Path) -> None:
    """Over padded rows, values and gradients."""
    path, found = base_path(tmp_path), {}
    for attention in ("sdpa", "flash_attention_2"):
        model = Model.model_validate({"dtype": "bfloat16", "attention": attention})
        module = LogprobModel(load_causal_lm(path, model, device="cuda", seed=3))
        batch = deepspeed_rank.discriminator_tensors(make_samples(0), pad_id=0).to("cuda")
        logprobs = module(batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids)
        logprobs.sum().backward()
        gradient = torch.cat([p.grad.float().flatten() for p in module.parameters()])
        found[attention] = (logprobs.detach(), gradient)
    ours, plain = found["flash_attention_2"], found["sdpa"]
    assert (ours[0] - plain[0]).abs().mean() < 0.02
    assert torch.nn.functional.cosine_similarity(ours[1], plain[1], dim=0) > 0.99


# --- whole runs, in bfloat16 with vLLM ---------------------------------------------------------------------

ON_GPU = [
    "warm_start=null",
    "placement.device=gpu",
    "rollout.engine=vllm",
    "model.policy.dtype=bfloat16",
    "model.discriminator.dtype=bfloat16",
    "tracking.uri=none",
]
SCALAR = ["discriminator.head=scalar", "discriminator.loss.level=unit"]
SLEEPING = ["rollout.sleep=true", "rollout.memory_share=0.6"]
OWN_GPUS = ["placement.type=disaggregated"]


def trained(experiment: str, output: Path, *arguments: str) -> Path:
    """The folder of a finished run whose two steps each used the newest policy."""
    tiny = TINY_AIRL if experiment == "airl" else TINY
    done = launch(
        "train", f"experiments/demo/{experiment}.yaml", *tiny, *ON_GPU, *arguments, f"output_dir={output}",
        timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = output / "demo" / experiment
    if experiment != "sft":
        rows = [row for row in RunFolder(folder).read_metrics() if names.POLICY_LOSS in row]
        assert [row[names.POLICY_VERSION] for row in rows] == [1, 2]
        assert all(row[names.ROLLOUT_STALENESS] == 0 for row in rows)
    assert (folder / "final" / "policy" / "config.json").exists() or "lora.rank" in " ".join(arguments)
    return folder


@gpu_needs.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("weights", ["full", "merged", "served"])
def test_airl_on_one_gpu_shared_by_fractions_with_a_sleeping_engine(weights: str, tmp_path: Path) -> None:
    adapter = [f"rollout.adapter={weights}", "model.policy.lora.rank=8", "model.discriminator.lora.rank=8"]
    lora = [] if weights == "full" else adapter
    folder = trained("airl", tmp_path, *SCALAR, *SLEEPING, *lora)
    assert (folder / "final" / "reward_model" / "reward.json").is_file()


@gpu_needs.vllm
@pytest.mark.timeout(1800)
def test_airl_on_one_gpu_with_everybody_awake(tmp_path: Path) -> None:
    trained("airl", tmp_path, "rollout.memory_share=0.4", "placement.rollout_gpu_fraction=0.4")


@gpu_needs.vllm
@gpu_needs.bitsandbytes
@pytest.mark.timeout(1800)
def test_airl_with_4_bit_bases(tmp_path: Path) -> None:
    quantised = [
        f"model.{role}.{key}"
        for role in ("policy", "discriminator")
        for key in ("quantization=nf4", "lora.rank=8")
    ]
    trained("airl", tmp_path, *SCALAR, *SLEEPING, *quantised)


@gpu_needs.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=gpu_needs.gpus(2))])
def test_sft_by_ray_train(ranks: int, tmp_path: Path) -> None:
    trained("sft", tmp_path, f"learner.replicas={ranks}", *SLEEPING)


@gpu_needs.vllm
@gpu_needs.gpus(2)
@pytest.mark.timeout(1800)
def test_colocated_learners_of_two_ranks(tmp_path: Path) -> None:
    trained(
        "airl", tmp_path, *SCALAR, *SLEEPING, "rollout.replicas=2", "learner.replicas=2", "learner.zero_stage=3"
    )


@gpu_needs.vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("experiment", "arguments"),
    [
        pytest.param("grpo", [], marks=gpu_needs.gpus(2), id="grpo on 2"),
        pytest.param("airl", SCALAR, marks=gpu_needs.gpus(3), id="airl on 3"),
        pytest.param("grpo", ["rollout.tensor_parallel=2"], marks=gpu_needs.gpus(3), id="tensor-parallel on 3"),
    ],
)
def test_disaggregated(experiment: str, arguments: list[str], tmp_path: Path) -> None:
    trained(experiment, tmp_path, *OWN_GPUS, *arguments)
