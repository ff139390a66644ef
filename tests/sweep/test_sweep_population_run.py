"""A real population: forks of real checkpoints, killed with -9 and resumed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rairl_ray.config.load import load_config, read_saved
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.lineage import lineage, newest_exploits, planned_exploits
from rairl_ray.sweep.points import newest_folder, sweep_folder, trial_folder, trials
from tests.runs import ROOT, TINY_AIRL
from tests.sweeps import table, written
from tests.tracked import runs as mlflow_runs
from tests.tracked import sqlite

RATE, STEPS = "policy.learning_rate", 6


def small_population(folder: Path) -> str:
    more = ["eval.prompts=4", "eval.every=1", "discriminator.warmup_max_steps=2", f"trainer.steps={STEPS}"]
    tiny = dict(text.split("=", 1) for text in [*TINY_AIRL, *more])
    overrides = {key: yaml.safe_load(value) for key, value in tiny.items()}
    overrides |= {"warm_start": None, "placement.cpus_per_actor": 0.1}
    return written(
        folder, overrides=overrides, seeds=[0], trials=3, search={"type": "random"}, scheduler={"type": "pbt"},
        space={RATE: {"loguniform": [1e-4, 1e-2]}}, metric="eval/completion_tokens",
        failures={"max_per_trial": 3},
    )  # fmt: skip


def killed_after_a_fork(text: str, file: SweepFile) -> None:
    command = [sys.executable, "launch.py", "sweep", text]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 300
    while not any(RunFolder(newest_folder(file, row.member)).holder for row in lineage(file)):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while any(RunFolder(newest_folder(file, item.id)).holder for item in trials(file)):
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_real_population_is_killed_and_goes_on_from_its_forks(tmp_path: Path) -> None:
    text = small_population(tmp_path)
    file = load_sweep(text)
    killed_after_a_fork(text, file)
    before = lineage(file)
    command = [sys.executable, "launch.py", "sweep", text, "--resume"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = lineage(file)
    assert before and rows[: len(before)] == before
    print(done.stdout[-3000:], *planned_exploits(file), sep="\n")
    now = newest_exploits(file)
    for item in trials(file):
        folder = RunFolder(newest_folder(file, item.id))
        steps = [row["step"] for row in folder.read_metrics() if "policy/loss" in row]
        assert steps == [*range(1, STEPS + 1)], "a step is lost, or there twice"
        rate = read_saved(folder.config).policy.learning_rate
        assert rate == (now[item.id].values if item.id in now else item.values)[RATE]
    first = rows[0]
    fork, donor = (RunFolder(trial_folder(file, name)) for name in (first.member, first.donor))
    inherited = RunFolder(fork.root / "forks" / "1").read_metrics()
    assert [row for row in inherited if row["step"] <= first.from_step] == [
        row for row in donor.read_metrics() if row["step"] <= first.from_step
    ], "up to the checkpoint it is the donor's"
    assert [row["state"] for row in table(sweep_folder(file))] == ["finished"] * 3
    best = load_config(sweep_folder(file) / "best.yaml")
    assert best.policy.learning_rate in [float(row[RATE]) for row in table(sweep_folder(file))]
    client = sqlite(tmp_path / "runs")
    states = sorted(mlflow_runs(client).values())
    assert "RUNNING" not in states and states.count("FINISHED") == 4, "three members and the sweep"
    tags = [client.get_run(key).data.tags for key in mlflow_runs(client)]
    assert {tag.get("rairl.trial") for tag in tags} == {None, *(item.id for item in trials(file))}
