"""Whole runs: a disk that refuses while a run is on, and a resume on other ranks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from rairl_ray.checkpoint import CheckpointStore, verify
from rairl_ray.config.schema import RunConfig
from rairl_ray.metrics import (
    DISCRIMINATOR_LOSS,
    POLICY_LEARNING_RATE,
    POLICY_LOSS,
    REWARD_MEAN,
    ROLLOUT_TOKENS,
)
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.run import run
from rairl_ray.trainer.run_context import StopRequest
from tests.inprocess import config_of, killed_after, rows_of
from tests.runs import TINY, descendants, launch_background

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


def title(pid: int) -> str:
    """What a process calls itself; empty where it has just ended."""
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


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
        pids = [pid for pid in descendants(process.pid) if "ray::PolicyActor" in title(pid)]
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
    steps_logged = [row["step"] for row in RunFolder(folder).read_metrics() if POLICY_LOSS in row]
    assert steps_logged == list(range(1, len(steps_logged) + 1))


def resumed(config: RunConfig, updates: dict[str, Any], until: int | None = None) -> None:
    """Go on with the run on other ranks, to its end or until the step is logged."""
    stop = StopRequest()

    def look(step: int, _: dict[str, float]) -> None:
        if step == until:
            stop.ask()

    changed = config.model_copy(update={"learner": config.learner.model_copy(update=updates)})
    ended = run(changed, resume=config.name, stop=stop, sinks=[look])
    assert ended.status == ("finished" if until is None else "stopped")


def learner_of(folder: Path, role: str, step: int) -> tuple[int, int]:
    """(ranks, ZeRO stage) that wrote a checkpoint."""
    facts = json.loads((CheckpointStore(folder).path(step) / role / "learner.json").read_text())
    return facts["ranks"], facts["zero_stage"]


def close(whole: RunConfig, stopped: RunConfig, names: Sequence[str]) -> None:
    """The same steps, with the same values up to the order of sums."""
    rows = [{row["step"]: row for row in rows_of(c) if POLICY_LOSS in row} for c in (whole, stopped)]
    assert list(rows[1]) == list(rows[0])
    for name in names:
        values = [[row[name] for row in run.values()] for run in rows]
        assert values[1] == pytest.approx(values[0], rel=1e-3, abs=1e-5), name


@pytest.mark.usefixtures("one_cluster")
@pytest.mark.parametrize("rank", ["null", "4"], ids=["full", "adapter"])
def test_ranks_and_stage_may_change_when_a_run_is_resumed(rank: str, tmp_path: Path) -> None:
    """Two ranks, one, two: the numbers are those of the run that was never stopped."""
    two = {"replicas": 2, "discriminator_replicas": 1, "zero_stage": 2}
    one = {"replicas": 1, "discriminator_replicas": 2, "zero_stage": 3}
    whole = config_of(
        "airl", tmp_path / "whole", "trainer.steps=4", "trainer.keep_checkpoints=9", "eval.at_end=false",
        "eval.at_start=false", "discriminator.replay.capacity=16", "discriminator.replay.share=0.25",
        f"model.policy.lora.rank={rank}", f"model.discriminator.lora.rank={rank}",
        *(f"learner.{key}={value}" for key, value in two.items()),
    )  # fmt: skip
    run(whole)
    stopped = killed_after(whole, 1, tmp_path / "stopped")
    folder = tmp_path / "stopped" / whole.name
    resumed(stopped, one, until=2)
    resumed(stopped, two)
    ranks = [[learner_of(folder, role, step) for role in ("policy", "discriminator")] for step in (1, 2, 3)]
    assert ranks == [[(2, 2), (1, 2)], [(1, 3), (2, 3)], [(2, 2), (1, 2)]]
    close(whole, stopped, (POLICY_LOSS, REWARD_MEAN, DISCRIMINATOR_LOSS, ROLLOUT_TOKENS))
    rates = [[row[POLICY_LEARNING_RATE] for row in rows_of(c) if POLICY_LOSS in row] for c in (whole, stopped)]
    assert rates[0] == rates[1] and len(rates[0]) == 4


@pytest.mark.usefixtures("one_cluster")
def test_sft_resumes_on_other_ranks(tmp_path: Path) -> None:
    whole = config_of(
        "sft", tmp_path / "whole", "trainer.steps=4", "trainer.keep_checkpoints=9", "eval.at_end=false",
        "eval.at_start=false", "learner.replicas=2", "learner.zero_stage=1",
    )  # fmt: skip
    run(whole)
    stopped = killed_after(whole, 2, tmp_path / "stopped")
    resumed(stopped, {"replicas": 1, "zero_stage": 2})
    folder = tmp_path / "stopped" / whole.name
    assert [learner_of(folder, "policy", step) for step in (2, 3, 4)] == [(2, 1), (1, 2), (1, 2)]
    close(whole, stopped, (POLICY_LOSS, POLICY_LEARNING_RATE))
