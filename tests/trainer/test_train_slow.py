"""The long end-to-end cases: vLLM, a kill and a resume, SmolLM2 on GSM8K.

Every density and loss is trained by a case of test_exact_resume.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from peft import AutoPeftModelForCausalLM

from rairl_ray import metrics as names
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.runfolder import RunFolder, read_summary
from tests.runs import TINY, TINY_AIRL, launch, launch_background

pytestmark = pytest.mark.slow


def last_step(folder: Path) -> dict[str, float]:
    rows = [row for row in RunFolder(folder).read_metrics() if names.POLICY_LOSS in row]
    return rows[-1]


def test_vllm_and_a_warm_start(tmp_path: Path) -> None:
    """The demo's own path: SFT first, in the same command, then R-AIRL with vLLM; the policy starts from it."""
    arguments = [
        "train",
        "experiments/demo/airl.yaml",
        *TINY_AIRL,
        "rollout.engine=vllm",
        f"output_dir={tmp_path}",
    ]
    done = launch(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    row = last_step(tmp_path / "demo" / "airl")
    # What vLLM says of its samples and what the learner says of them must agree: weights arrived whole.
    assert row[names.POLICY_IMPORTANCE_WEIGHT] == pytest.approx(1.0, abs=0.02)
    assert row[names.ROLLOUT_LOGPROB_GAP] < 1e-4
    assert (tmp_path / "demo" / "sft" / "final" / "policy" / "model.safetensors").is_file()
    assert "trained first" in done.stdout


def test_a_killed_driver_resumes_without_losing_or_doubling_a_step(tmp_path: Path) -> None:
    arguments = [
        "train",
        "experiments/demo/grpo.yaml",
        *TINY,
        "warm_start=null",
        "trainer.steps=30",
        "trainer.checkpoint_every=5",
        f"output_dir={tmp_path}",
        "tracking.uri=none",
    ]
    folder = tmp_path / "demo" / "grpo"
    process = launch_background(*arguments)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if CheckpointStore(folder).latest_valid() is not None:
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
    done = launch(*arguments, "--resume", "demo/grpo")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [row["step"] for row in RunFolder(folder).read_metrics() if names.POLICY_LOSS in row]
    assert steps == list(range(1, 31))


@pytest.mark.timeout(1800)
def test_smollm2_on_gsm8k_with_vllm_and_two_policy_ranks(shared_data: Path, tmp_path: Path) -> None:
    done = launch(
        "train",
        "experiments/smollm2_gsm8k.yaml",
        f"data.path={shared_data / 'gsm8k'}",
        f"output_dir={tmp_path}",
        "trainer.steps=2",
        "trainer.checkpoint_every=2",
        "trainer.prompts_per_step=2",
        "rollout.samples_per_prompt=2",
        "rollout.max_completion_tokens=64",
        "eval.prompts=6",
        "eval.samples_per_prompt=2",
        "eval.k=[1,2]",
        "eval.localisation_traces=4",
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "smollm2_gsm8k"
    newest = CheckpointStore(folder).latest_valid()
    assert newest is not None and newest.name == "step-000002"
    assert CheckpointStore(folder).manifest(newest)["versions"]["policy"] == 2
    shards = list((newest / "policy").rglob("*optim_states.pt"))
    assert len(shards) == 2, shards
    rows = [json.loads(line) for line in (folder / "evaluations" / "final" / "rows.jsonl").open()]
    assert len({row["prompt_id"] for row in rows}) == 6
    assert names.EVAL_RERANK_AT_1 in read_summary(folder / "evaluations" / "final" / "summary.json")
    row = last_step(folder)
    assert row[names.POLICY_IMPORTANCE_WEIGHT] == pytest.approx(1.0, abs=0.05)
    policy = AutoPeftModelForCausalLM.from_pretrained(folder / "final" / "policy")
    assert policy.active_adapter == "default"
