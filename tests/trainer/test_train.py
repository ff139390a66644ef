"""Runs end to end through the command line: real Ray, real DeepSpeed, the hf engine; vLLM under `slow`."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from rairl_ray import metrics as names
from rairl_ray.checkpoint import CheckpointStore, verify
from rairl_ray.runfolder import RunFolder, read_summary
from rairl_ray.tracking.spool import saved_cursor
from tests.runs import TINY, TINY_AIRL, descendants, launch, launch_background

SCALAR_AIRL = [
    *TINY_AIRL,
    "warm_start=null",
    "discriminator.head=scalar",
    "discriminator.loss.level=unit",
    "eval.at_start=true",
]


def metric_rows(folder: Path) -> list[dict[str, float]]:
    return RunFolder(folder).read_metrics()


@pytest.fixture(scope="module")
def airl_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tiny R-AIRL run (scalar head) that several tests look at."""
    output = tmp_path_factory.mktemp("airl")
    done = launch(
        "train",
        "experiments/demo/airl.yaml",
        *SCALAR_AIRL,
        f"output_dir={output}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return output / "demo" / "airl"


def test_the_run_folder_is_complete(airl_run: Path) -> None:
    assert (airl_run / "config.yaml").is_file()
    assert {"start", "final"} <= {path.name for path in (airl_run / "evaluations").iterdir()}
    assert [path.name for path in sorted((airl_run / "rollouts").iterdir())] == [
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]
    newest = CheckpointStore(airl_run).latest_valid()
    assert newest is not None and newest.name == "step-000002" and verify(newest) is None
    assert (airl_run / "checkpoints" / "latest").resolve() == newest
    manifest = CheckpointStore(airl_run).manifest(newest)
    assert manifest["versions"] == {"policy": 2, "discriminator": 4}
    told = saved_cursor(airl_run)["run_id"]
    assert told and manifest["mlflow_run_id"] in (told, None), "None: MLflow's answer came after the checkpoint"


def test_times_of_a_step_add_up_and_versions_are_stamped(airl_run: Path) -> None:
    steps = [row for row in metric_rows(airl_run) if names.TIME_STEP in row and row["step"] >= 1]
    assert [row["step"] for row in steps] == [1, 2]
    for row in steps:
        phases = [value for name, value in row.items() if name.startswith("time/") and name != names.TIME_STEP]
        assert sum(phases) == pytest.approx(row[names.TIME_STEP], rel=0.02)
        assert row[names.ROLLOUT_STALENESS] == 0
        assert row[names.ROLLOUT_LOGPROB_GAP] < 1e-5
        assert row[names.POLICY_VERSION] == row["step"]
        assert row[names.DISCRIMINATOR_VERSION] == 2 + row["step"]  # two warm-up updates, then one a step
    rollouts = [json.loads(line) for line in (airl_run / "rollouts" / "step-000002.jsonl").open()]
    assert {row["policy_version"] for row in rollouts} == {1}
    updates = {row["discriminator_version"] for row in rollouts}
    assert len(updates) == 1 and updates.pop() == steps[-1][names.DISCRIMINATOR_VERSION]
    rewards = [row["token_rewards"] for row in rollouts]
    assert all(row and None not in row for row in rewards)
    mean = sum(sum(row) / len(row) for row in rewards) / len(rewards)
    assert mean == pytest.approx(steps[-1][names.REWARD_MEAN], rel=1e-4)


def test_mlflow_has_the_run_finished_with_its_metrics(airl_run: Path) -> None:
    database = sqlite3.connect(airl_run.parents[1] / "mlflow.db")
    (status,) = database.execute("select status from runs").fetchone()
    assert status == "FINISHED"
    logged = {row[0] for row in database.execute("select distinct key from metrics")}
    assert {names.EVAL_PASS_AT_1, names.POLICY_LOSS, names.DISCRIMINATOR_LOSS, names.TIME_STEP} <= logged
    doubled = "select count(*) c from metrics group by key, step having c > 1 limit 1"
    assert database.execute(doubled).fetchone() in (None, (2,))  # step 2 also carries the final evaluation
    artifacts = airl_run.parents[1] / "mlartifacts"
    assert list(artifacts.glob("**/rollouts/step-000002.json"))
    assert list(artifacts.glob("**/config.yaml"))


def test_the_final_artifacts_load_elsewhere(airl_run: Path) -> None:
    policy = AutoModelForCausalLM.from_pretrained(airl_run / "final" / "policy")
    tokenizer = AutoTokenizer.from_pretrained(airl_run / "final" / "policy")
    ids = torch.tensor([tokenizer("1+2=3", add_special_tokens=False)["input_ids"]])
    assert torch.isfinite(policy(ids).logits).all()
    reward = AutoModelForTokenClassification.from_pretrained(airl_run / "final" / "reward_model")
    assert reward.config.num_labels == 1
    assert torch.isfinite(reward(ids).logits).all()


def test_the_final_evaluation_has_reranking_auroc_and_localisation(airl_run: Path) -> None:
    summary = read_summary(airl_run / "evaluations" / "final" / "summary.json")
    for name in (names.EVAL_PASS_AT_1, names.EVAL_RERANK_AT_1, names.CALIBRATION_AUROC):
        assert name in summary
    assert summary[names.DISCRIMINATOR_AUROC] == summary[names.CALIBRATION_AUROC]
    assert summary[names.LOCALISATION_CHANCE]["value"] == pytest.approx(1 / 3)
    rows = [json.loads(line) for line in (airl_run / "evaluations" / "final" / "rows.jsonl").open()]
    assert len(rows) == 8 * 4
    assert all(math.isfinite(row["reward_model_score"]) for row in rows)


def test_an_earlier_run_of_the_name_is_moved_aside_and_resume_refuses_another_config(airl_run: Path) -> None:
    output = airl_run.parents[1]
    arguments = [
        "train",
        "experiments/demo/airl.yaml",
        *SCALAR_AIRL,
        f"output_dir={output}",
        "--resume",
        "demo/airl",
    ]
    refused = launch(*arguments, "policy.learning_rate=0.123")
    assert refused.returncode == 2
    assert refused.stderr.strip().count("\n") == 0
    assert "policy.learning_rate" in refused.stderr and "0.123" in refused.stderr
    missing = launch(*arguments[:-1], "no/such/run")
    assert missing.returncode == 2 and "no/such/run" in missing.stderr


def test_two_ranks_and_lora_with_an_implicit_head(tmp_path: Path) -> None:
    done = launch(
        "train",
        "experiments/demo/airl.yaml",
        *TINY_AIRL,
        "warm_start=null",
        "learner.replicas=2",
        "learner.discriminator_replicas=1",
        "placement.cpus_per_actor=0.25",
        "learner.zero_stage=2",
        "model.policy.lora.rank=4",
        "model.discriminator.lora.rank=4",
        "policy.kl_coefficient=0.1",
        "policy.minibatches_per_step=2",
        "advantage.expert=single",
        "trainer.steps=1",
        f"output_dir={tmp_path}",
        "tracking.uri=none",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "demo" / "airl"
    assert (folder / "final" / "policy" / "adapter_model.safetensors").is_file()
    assert (folder / "final" / "reward_model" / "reward.json").is_file()
    row = next(row for row in metric_rows(folder) if row["step"] == 1)
    assert math.isfinite(row[names.POLICY_KL])


def test_engines_that_disagree_with_the_learner_end_the_run_in_one_paragraph(tmp_path: Path) -> None:
    """Two engines of the same weights differ by rounding; a bound below it makes that a disagreement."""
    done = launch(
        "train",
        "experiments/demo/grpo.yaml",
        *TINY,
        "warm_start=null",
        "rollout.max_sync_logprob_gap=1e-12",
        "trainer.max_restarts_per_role=0",
        f"output_dir={tmp_path}",
        "tracking.uri=none",
    )
    assert done.returncode not in (0, 2, 130)
    last = done.stderr.strip().splitlines()[-1]
    assert "rollout rank 0" in last and "phase sync" in last and "rollout.max_sync_logprob_gap" in last
    assert not [row for row in metric_rows(tmp_path / "demo" / "grpo") if row["step"] >= 1]


def test_grpo_is_the_same_step_without_a_discriminator(tmp_path: Path) -> None:
    done = launch(
        "train",
        "experiments/demo/grpo.yaml",
        *TINY,
        "warm_start=null",
        f"output_dir={tmp_path}",
        "tracking.uri=none",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = [row for row in metric_rows(tmp_path / "demo" / "grpo") if names.POLICY_LOSS in row]
    assert [row["step"] for row in steps] == [1, 2]
    assert not any(name.startswith("discriminator/") for name in steps[0])
    assert not (tmp_path / "demo" / "grpo" / "final" / "reward_model").exists()


def test_ctrl_c_saves_and_leaves_nothing_behind_then_resume_finishes(tmp_path: Path) -> None:
    arguments = [
        "train",
        "experiments/demo/grpo.yaml",
        *TINY,
        "warm_start=null",
        "trainer.steps=400",
        "trainer.checkpoint_every=0",
        f"output_dir={tmp_path}",
    ]
    process = launch_background(*arguments)
    folder = tmp_path / "demo" / "grpo"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and any(row["step"] >= 2 for row in metric_rows(folder)):
            break
        time.sleep(0.2)
    children = descendants(process.pid)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output
    stopped = max(row["step"] for row in metric_rows(folder))
    newest = CheckpointStore(folder).latest_valid()
    assert newest is not None and newest.name == f"step-{int(stopped):06d}"
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [pid for pid in children if psutil.pid_exists(pid)]
    database = sqlite3.connect(tmp_path / "mlflow.db")
    assert database.execute("select status from runs").fetchall() == [("KILLED",)]

    more = [*arguments]
    process = launch_background(*more, "--resume", "demo/grpo")
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] > stopped for row in metric_rows(folder)):
            break
        time.sleep(0.2)
    # As `timeout` ends a program: a signal to its whole process group.
    [head] = [child for child in map(psutil.Process, descendants(process.pid)) if child.name() == "gcs_server"]
    assert os.getpgid(head.pid) != os.getpgid(head.ppid()), "the head would end before the run has saved"
    os.killpg(os.getpgid(head.ppid()), signal.SIGTERM)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 130, output
    steps = [row["step"] for row in metric_rows(folder) if names.POLICY_LOSS in row]
    assert steps == list(range(1, int(steps[-1]) + 1)) and steps[-1] > stopped, output
    assert database.execute("select count(*) from runs").fetchone() == (1,)
