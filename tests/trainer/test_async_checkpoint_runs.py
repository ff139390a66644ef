"""Whole runs: a disk that refuses while a run is on, and a resume on other ranks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rairl_ray import metrics as names
from rairl_ray.checkpoint import CheckpointStore, verify
from rairl_ray.runfolder import RunFolder
from tests.runs import TINY, TINY_AIRL, descendants, launch, launch_background

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.1)


def newest(folder: Path) -> int:
    found = CheckpointStore(folder).latest_valid()
    return int(found.name.removeprefix("step-")) if found else -1


def limit_files(pid: int, size: int) -> None:
    """The kernel refuses every write of the process beyond `size` bytes in a file."""
    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def test_a_run_goes_on_beside_a_disk_that_refuses_and_fails_only_where_it_must_save(tmp_path: Path) -> None:
    arguments = ["train", "experiments/demo/grpo.yaml", *TINY, "warm_start=null", "trainer.steps=4000",
                 "trainer.keep_checkpoints=1", f"output_dir={tmp_path}", "tracking.uri=none"]  # fmt: skip
    folder = tmp_path / "demo" / "grpo"
    events = folder / "events.log"
    process = launch_background(*arguments)
    try:
        wait_for(lambda: folder.is_dir() and newest(folder) >= 1, process)
        pids = [pid for pid in descendants(process.pid) if "PolicyActor" in psutil.Process(pid).cmdline()[0]]
        assert len(pids) == 1
        limit_files(pids[0], 50_000)
        wait_for(lambda: events.exists() and "could not be written" in events.read_text(), process)
        good = newest(folder)
        steps = RunFolder(folder).read_metrics()[-1]["step"]
        wait_for(lambda: RunFolder(folder).read_metrics()[-1]["step"] >= steps + 2, process)
        assert newest(folder) == good and "File too large" in events.read_text()

        limit_files(pids[0], resource.RLIM_INFINITY)
        wait_for(lambda: newest(folder) > good, process)
        limit_files(pids[0], 50_000)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1, output
    error = [line for line in output.splitlines() if line.startswith("rairl: error:")]
    assert len(error) == 1 and "could not be written" in error[0] and "File too large" in error[0]
    latest = CheckpointStore(folder).latest_valid()
    assert latest is not None and verify(latest) is None
    steps_logged = [row["step"] for row in RunFolder(folder).read_metrics() if names.POLICY_LOSS in row]
    assert steps_logged == list(range(1, len(steps_logged) + 1))


def stop_after(arguments: list[str], folder: Path, step: int) -> None:
    """Start (or resume) the run, and Ctrl-C once it has logged the step."""
    process = launch_background(*arguments)
    rows = RunFolder(folder)
    try:
        wait_for(lambda: any(row["step"] >= step for row in rows.read_metrics()), process)
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, output


def learner_of(folder: Path, role: str) -> tuple[int, int]:
    """(ranks, ZeRO stage) that wrote the newest checkpoint."""
    path = CheckpointStore(folder).latest_valid()
    assert path is not None
    facts = json.loads((path / role / "learner.json").read_text())
    return facts["ranks"], facts["zero_stage"]


@pytest.mark.parametrize("adapter", ["null", "4"], ids=["full", "adapter"])
def test_ranks_and_stage_may_change_when_a_run_is_resumed(adapter: str, tmp_path: Path) -> None:
    """Two ranks, one, two: the numbers are those of the run that was never stopped."""
    arguments = ["train", "experiments/demo/airl.yaml", *TINY_AIRL, "warm_start=null", "trainer.steps=6",
                 "discriminator.replay.capacity=16", "discriminator.replay.share=0.25", "tracking.uri=none",
                 f"model.policy.lora.rank={adapter}", f"model.discriminator.lora.rank={adapter}",
                 "trainer.checkpoint_every=0", "eval.at_end=false",
                 "placement.cpus_per_actor=0.25"]  # fmt: skip
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    two = ["learner.replicas=2", "learner.discriminator_replicas=1", "learner.zero_stage=2"]
    done = launch(*arguments, *two, f"output_dir={straight}", timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = stopped / "demo" / "airl"
    here = [*arguments, f"output_dir={stopped}"]
    resume = ["--resume", "demo/airl"]
    stop_after([*here, *two], folder, 1)
    assert learner_of(folder, "policy") == (2, 2) and learner_of(folder, "discriminator") == (1, 2)
    one = ["learner.replicas=1", "learner.discriminator_replicas=2", "learner.zero_stage=3"]
    stop_after([*here, *one, *resume], folder, 3)
    assert learner_of(folder, "policy") == (1, 3) and learner_of(folder, "discriminator") == (2, 3)
    done = launch(*here, *two, *resume, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [
        {
            row["step"]: row
            for row in RunFolder(path / "demo" / "airl").read_metrics()
            if names.POLICY_LOSS in row
        }
        for path in (straight, stopped)
    ]
    assert list(rows[1]) == list(rows[0]) == [1, 2, 3, 4, 5, 6]
    for name in (names.POLICY_LOSS, names.REWARD_MEAN, names.DISCRIMINATOR_LOSS, names.ROLLOUT_TOKENS):
        values = [[row[name] for row in run.values()] for run in rows]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), name
    learning_rates = [[row[names.POLICY_LEARNING_RATE] for row in run.values()] for run in rows]
    assert learning_rates[0] == learning_rates[1]


def test_sft_resumes_on_other_ranks(tmp_path: Path) -> None:
    arguments = ["train", "experiments/demo/sft.yaml", *TINY, "trainer.steps=400", "trainer.checkpoint_every=2",
                 f"output_dir={tmp_path}", "tracking.uri=none", "eval.at_start=false",
                 "eval.at_end=false"]  # fmt: skip
    folder = tmp_path / "demo" / "sft"
    two = ["learner.replicas=2", "learner.zero_stage=1", "placement.cpus_per_actor=0.25"]
    stop_after([*arguments, *two], folder, 3)
    assert learner_of(folder, "policy") == (2, 1)
    stopped = newest(folder)
    stop_after([*arguments, "--resume", "demo/sft"], folder, stopped + 3)
    assert learner_of(folder, "policy")[0] == 1
    rows = RunFolder(folder).read_metrics()
    steps = [row["step"] for row in rows if names.POLICY_LOSS in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped + 3
