"""The pure parts of the rollout engines: options, arguments, environment, the inverse-distribution draw."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rairl_ray.actors.rollout import sampling_seed
from rairl_ray.config.schema import RunConfig
from rairl_ray.engines.environment import compute_environment
from rairl_ray.engines.hf_engine import draw
from rairl_ray.engines.rollout_engine import EngineOptions, SamplingSettings, check_adapter, engine_options
from rairl_ray.engines.vllm_engine import llm_arguments, vllm_environment
from rairl_ray.errors import ModelError
from rairl_ray.keys import occurrences
from tests.runs import ROOT

SAMPLING = SamplingSettings(max_tokens=1)


def test_rank_patterns_count() -> None:
    opened = EngineOptions(model_path="m", eos_id=1, max_prompt_tokens=1, max_completion_tokens=1, lora_rank=8)
    check_adapter({"r": 8, "rank_pattern": {}}, opened)
    with pytest.raises(ModelError, match="rank 32"):
        check_adapter({"r": 8, "rank_pattern": {"q_proj": 32}}, opened)


def test_options_come_from_the_configuration() -> None:
    config = RunConfig.model_validate(
        {
            "model": {
                "policy": {"path": "some/model", "revision": "abc", "dtype": "bfloat16", "lora": {"rank": 12}}
            },
            "data": {"max_prompt_tokens": 50},
            "rollout": {"max_completion_tokens": 70, "max_sequences": 9, "memory_share": 0.3, "sleep": True},
        }
    )
    merged = engine_options(config, model_path="some/model", eos_id=4, device="cuda")
    assert (merged.lora_rank, merged.partial_syncs, merged.weight_transport) == (None, True, "ipc")
    assert "enable_lora" not in llm_arguments(merged)
    served = config.rollout.model_copy(update={"adapter": "served"})
    config = config.model_copy(update={"rollout": served})
    opened = engine_options(config, model_path="some/model", eos_id=4, device="cuda")
    assert (opened.lora_rank, opened.partial_syncs, opened.weight_transport) == (12, False, "object_store")
    assert (opened.max_tokens, opened.max_sequences, opened.revision) == (120, 9, "abc")
    assert engine_options(config, model_path="/cache/folder", eos_id=4, device="cpu").revision is None
    arguments = llm_arguments(opened)
    assert arguments["gpu_memory_utilization"] == 0.3 and arguments["enable_sleep_mode"] is True
    assert arguments["max_lora_rank"] == 16 and "enforce_eager" not in arguments
    assert "distributed_executor_backend" not in arguments
    split = llm_arguments(dataclasses.replace(opened, tensor_parallel=2))
    assert (split["distributed_executor_backend"], split["tensor_parallel_size"]) == ("mp", 2)
    on_cpu = llm_arguments(dataclasses.replace(opened, device="cpu", lora_rank=None, max_prompt_tokens=9000))
    assert on_cpu["enable_chunked_prefill"] is False and on_cpu["max_num_batched_tokens"] == 9070
    assert "enable_lora" not in on_cpu
    assert on_cpu["weight_transfer_config"] == {"backend": "rairl_object_store"}
    with pytest.raises(ModelError, match=r"lora\.rank=600"):
        llm_arguments(dataclasses.replace(opened, lora_rank=600))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LD_PRELOAD", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    on_cpu = vllm_environment(device="cpu", threads=3)
    assert on_cpu["OMP_NUM_THREADS"] == "3" and on_cpu["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    on_gpu = vllm_environment(device="cuda", threads=3)
    assert not on_gpu.keys() & {"LD_PRELOAD", "OMP_NUM_THREADS", "KMP_BLOCKTIME"}


def test_threads_without_work_sleep_and_what_the_user_set_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("LD_PRELOAD", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    without = compute_environment("cpu", 2)
    assert without["OMP_WAIT_POLICY"] == "PASSIVE" and "LD_PRELOAD" not in without
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    intel = compute_environment("cpu", 2)
    assert (intel["LD_PRELOAD"], intel["KMP_BLOCKTIME"]) == (str(library), "1")
    monkeypatch.setenv("LD_PRELOAD", "/lib/theirs.so")
    monkeypatch.setenv("KMP_BLOCKTIME", "50")
    kept = compute_environment("cpu", 2)
    assert (kept["LD_PRELOAD"], kept["KMP_BLOCKTIME"]) == (f"{library}:/lib/theirs.so", "50")
    assert "LD_PRELOAD" not in compute_environment("cuda", 2)


AFTER_A_FORK = """
import os, subprocess, torch
matrix = torch.randn(500, 500)
matrix @ matrix
def look():  # a function before the program makes a fork, as Ray does for its node's processes
    pass
command = ["grep", "Cpus_allowed:", "/proc/self/status"]
said = subprocess.run(command, capture_output=True, preexec_fn=look).stdout
print(bin(int(said.split()[1].replace(b",", b""), 16)).count("1"), len(os.sched_getaffinity(0)))
"""


@pytest.mark.parametrize("who", ["driver", "actor"])
def test_processes_begun_beside_intels_openmp_keep_all_cores(who: str) -> None:
    """A driver under LD_PRELOAD, as vLLM's pages advise, once gave its whole cluster one core."""
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    if not library.exists() or len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs Intel's OpenMP and two cores")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("KMP_")}
    variables = compute_environment("cpu", 2) if who == "actor" else {"LD_PRELOAD": str(library)}
    code = AFTER_A_FORK if who == "actor" else f"import launch\n{AFTER_A_FORK}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=ROOT, env={**inherited, **variables}, capture_output=True, text=True, timeout=120
    )
    child, own = done.stdout.split()
    assert child == own, done.stderr


def test_draw_inverts_the_distribution() -> None:
    """Evenly spaced uniforms give each token its probability, to within one draw."""
    logits = torch.tensor([[2.0, -1.0, 0.5, -torch.inf, 1.0]])
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn, logprobs = draw(logits.expand(1000, -1), uniforms, SamplingSettings(max_tokens=1, temperature=2.0))
    shares = torch.bincount(drawn, minlength=5) / 1000
    expected = torch.softmax(logits[0] / 2.0, -1)
    assert (shares - expected).abs().max() <= 1e-3 + 1e-9
    torch.testing.assert_close(logprobs.exp(), expected[drawn])
    edges = draw(logits.expand(2, -1), torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), SAMPLING)[0]
    assert edges.tolist() == [0, 4]


def test_a_problem_that_is_drawn_twice_in_a_step_has_other_seeds_the_second_time() -> None:
    drawn = ["a", "b", "a", "c", "a"]
    firsts = [4 * place for place in occurrences(drawn)]
    assert firsts == [0, 0, 4, 0, 8]
    seeds = [
        sampling_seed(0, "train/1", p, first + i)
        for p, first in zip(drawn, firsts, strict=True)
        for i in range(4)
    ]
    assert len(set(seeds)) == 20
    assert seeds[:4] == [sampling_seed(0, "train/1", "a", i) for i in range(4)], (
        "the first time nothing changes"
    )
