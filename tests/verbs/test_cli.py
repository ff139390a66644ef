"""The command line as a user runs it: exit codes, one line for bad input, `plan` and `doctor` output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rairl_ray.doctor import cluster

ROOT = Path(__file__).resolve().parents[2]
QWEN = "experiments/gsm8k/qwen2.5-3b_airl.yaml"
VALID = """\
name: small
model: {policy: {build: {max_length: 128}}}
data: {max_prompt_tokens: 32}
rollout: {max_completion_tokens: 64, samples_per_prompt: 4}
trainer: {steps: 10, prompts_per_step: 8}
placement: {device: cpu}
"""


def rairl(*arguments: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `python launch.py ...`, or `code` with launch imported, from the project's root."""
    command = (
        [sys.executable, "launch.py", *arguments] if code is None else [sys.executable, "-c", code, *arguments]
    )
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


def refused(*arguments: str) -> str:
    """The one line on stderr of a call that must exit with 2."""
    result = rairl(*arguments)
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    assert lines[0].startswith("rairl: error: ")
    return lines[0].removeprefix("rairl: error: ")


# --- bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "train"])
@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("reward.densty=dense", "command line: unknown key reward.densty (value dense): the nearest key is r"),
        ("trainer.steps=soon", "command line: trainer.steps=soon: must be a whole number"),
        ("trainer.prompts_per_step=-1", "command line: trainer.prompts_per_step=-1: must be greater than 0"),
        ("discriminator.loss.type=mse", "command line: discriminator.loss.type=mse: must be 'bce'"),
        ("rollout.samples_per_prompt=1", "command line: rollout.samples_per_prompt=1: advantage.type=sequence"),
        ("learner.replicas=64", "command line: learner.replicas=64: trainer.prompts_per_step=8"),
        ("model.policy.lora.alpha=3", "command line: model.policy.lora.alpha=3.0: means nothing without"),
        ("data.task=arithmetics", "data.task=arithmetics: unknown task; did you mean arithmetic?"),
        ("warm_start=/nowhere/sft.yaml", "warm_start=/nowhere/sft.yaml: no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(file: Path, verb: str, override: str, start: str) -> None:
    assert refused(verb, str(file), override, f"output_dir={file.parent}/runs").startswith(start)
    assert not (file.parent / "runs").exists(), "nothing may have started"


def test_a_missing_file_and_a_malformed_one(tmp_path: Path) -> None:
    assert refused("train", "nope.yaml").startswith("nope.yaml: no such file")
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: a\nseed: [1\n")
    assert refused("plan", str(bad)).startswith(f"{bad}:3: malformed YAML")


def test_several_errors_are_still_one_line(file: Path) -> None:
    line = refused("plan", str(file), "seed=-1", "trainer.steps=0", "eval.prompts=0")
    assert line.endswith("must be greater than or equal to 0 (and 2 more)")


def test_train_misses_a_data_file_before_anything_heavy(file: Path) -> None:
    line = refused("train", str(file), "data.task=jsonl", "data.path=./nope.jsonl")
    assert line.startswith("data.path=./nope.jsonl: no such file or folder")


@pytest.mark.parametrize(
    "arguments", [["frobnicate"], ["plan"], ["train", "a.yaml", "--nope"], ["plan", "a", "--gpus", "x"]]
)
def test_usage_errors_are_one_line_too(arguments: list[str]) -> None:
    refused(*arguments)


def test_more_gpus_than_the_cluster_has() -> None:
    line = refused("plan", QWEN, "--gpus", "4")
    assert line.startswith("placement: the run needs 8 GPUs and the cluster has 4; lower rollout.replicas")
    assert refused("plan", QWEN, "--gpus", "8", "--cpus", "16").startswith("placement: the run needs 48 CPUs")


# --- plan -------------------------------------------------------------------------------------------


def test_plan_shows_what_the_run_is_and_takes(file: Path) -> None:
    result = rairl("plan", str(file), "reward.density=dense", "discriminator.warmup_steps=5")
    assert result.returncode == 0, result.stderr
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in result.stdout.splitlines()]
    assert "  density: {type: dense, every: 15}" in result.stdout.splitlines()
    assert ["samples", "32", "320"] in rows
    assert ["completion tokens", "2,048", "20,480"] in rows
    assert ["tokens read by the policy learner", "3,072", "30,720"] in rows
    assert ["policy optimizer steps", "1", "10"] in rows
    assert ["discriminator optimizer steps (warm-up included)", "1", "15"] in rows
    assert ["0", "CPU 1.5", "rollout 0 (CPU 0.5)"] in rows
    memory = {row[0]: row for row in rows if len(row) == 7}
    assert {"rollout", "policy", "discriminator"} <= set(memory)
    assert memory["policy"][3] == memory["policy"][4] != "unknown"


def test_the_printed_configuration_is_a_configuration(file: Path, tmp_path: Path) -> None:
    text = rairl("plan", str(file)).stdout
    saved = tmp_path / "again.yaml"
    saved.write_text(text[: text.index("config hash:")])
    again = rairl("plan", str(saved))
    assert again.returncode == 0, again.stderr
    assert again.stdout == text


def test_plan_accepts_eight_gpus_on_any_machine_and_nodes_of_two() -> None:
    result = rairl("plan", QWEN)
    assert result.returncode == 0, result.stderr
    assert "fits 1 node(s) of 8 GPUs; takes 8 GPUs" in result.stdout
    assert "3.09 B" in result.stdout
    two = rairl("plan", QWEN, "--gpus", "2", "--nodes", "4")
    assert "fits 4 node(s) of 2 GPUs" in two.stdout


def test_plan_takes_nothing(file: Path, tmp_path: Path) -> None:
    code = (
        "import sys, launch\n"
        "try: launch.main()\n"
        "except SystemExit as error: assert error.code == 0, error.code\n"
        "heavy = {'ray', 'torch', 'transformers', 'vllm', 'deepspeed', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    before = sorted(tmp_path.rglob("*"))
    result = rairl("plan", str(file), f"output_dir={tmp_path}/runs", code=code)
    assert result.returncode == 0, result.stderr
    assert sorted(tmp_path.rglob("*")) == before


# --- the rest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["plan", "train", "doctor"])
def test_the_help_of_every_verb_shows_an_example_that_works(verb: str) -> None:
    result = rairl(verb, "--help")
    assert result.returncode == 0
    examples = [line.strip() for line in result.stdout.splitlines() if line.strip().startswith(f"rairl {verb}")]
    assert examples
    for example in examples:
        words = example.split()[2:]
        if verb != "doctor":
            # `plan` takes what `train` takes, and starts nothing.
            assert rairl("plan", *words).returncode == 0, example


def test_without_a_verb_there_is_help() -> None:
    result = rairl()
    assert result.returncode == 0
    assert all(verb in result.stdout for verb in ("plan", "train", "report", "doctor"))


def test_ctrl_c_ends_with_130(file: Path) -> None:
    code = "import sys, launch\ndef stop(*_): raise KeyboardInterrupt\nlaunch.load_config = stop\nlaunch.main()"
    result = rairl("plan", str(file), code=code)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_our_own_faults_keep_their_traceback(file: Path) -> None:
    code = "import launch\ndef fault(*_): raise RuntimeError('ours')\nlaunch.load_config = fault\nlaunch.main()"
    result = rairl("plan", str(file), code=code)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_doctor_says_what_is_here_and_that_a_dead_cluster_is_dead() -> None:
    result = rairl("doctor")
    assert "python" in result.stdout and "rollout.engine=vllm" in result.stdout
    assert result.returncode == (1 if "essential and missing" in result.stdout else 0)
    (dead,) = cluster("127.0.0.1:1")
    assert (dead.what, dead.status) == ("cluster 127.0.0.1:1", "missing")
    assert "cluster/local.sh up" in dead.remedy
