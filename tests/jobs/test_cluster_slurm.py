"""`cluster/slurm.sbatch` under a real Slurm of three nodes: time limit, requeue, resume, scancel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.runs import ROOT, TINY_AIRL
from tests.slurm_here import Slurm, missing, slurm

SCRIPT = ROOT / "cluster" / "slurm.sbatch"
CONFIG = "experiments/demo/airl.yaml"


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if missing():
        pytest.skip(f"Slurm is not here ({', '.join(missing())}); Debian: apt install slurm-wlm munge")
    with slurm(tmp_path_factory.mktemp("slurm") / "s") as running:
        yield running


def submit(here: Slurm, output: Path, nodes: int, *overrides: str) -> str:
    """The job's number. The run is tiny, without a warm start, and writes below `output`."""
    command = ["sbatch", "--parsable", f"--nodes={nodes}", f"--output={output}/job.log", "--time=20"]
    run = [CONFIG, *TINY_AIRL, "warm_start=null", "name=run", f"output_dir={output}", *overrides]
    return here.call(*command, str(SCRIPT), *run, cwd=ROOT).strip()


def until(what: Callable[[], bool], log: Path, seconds: float = 200) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, log.read_text()[-3000:] if log.exists() else "no log"
        time.sleep(0.5)


def steps(output: Path) -> list[int]:
    """Steps of the run so far, warm-up included; the row of the final evaluation is none."""
    rows = output / "run" / "metrics.jsonl"
    lines = rows.read_text().splitlines() if rows.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "eval/pass_at_1" not in row]


def processes_of(job: str) -> list[str]:
    """Processes that bear the job's folder in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAIRL_STATE", "").endswith(f"/runs/.slurm/{job}"):
                found.append(" ".join(process.cmdline())[:100])
        except psutil.Error:
            continue
    return found


def nothing_left(job: str) -> None:
    deadline = time.monotonic() + 60
    while left := processes_of(job):
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
    assert not Path(f"/tmp/rairl-{job}").exists()
    assert not (ROOT / "runs" / ".slurm" / job / "token").exists()
    shutil.rmtree(ROOT / "runs" / ".slurm" / job)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_run_saves_before_its_time_limit_queues_again_and_goes_on(here: Slurm, tmp_path: Path) -> None:
    job = submit(here, tmp_path, 3, "trainer.steps=6")
    log = tmp_path / "job.log"
    until(lambda: 1 in steps(tmp_path), log)
    token = (ROOT / "runs" / ".slurm" / job / "token").read_text()
    # What Slurm itself sends ahead of the limit (--signal=B:USR1@...): to the batch script alone.
    here.call("scancel", "--batch", "--signal=USR1", job)
    until(lambda: here.job(job).get("Restarts") == "1", log)
    before = steps(tmp_path)
    assert before and max(before) < 6
    assert "3 nodes, 6.0 CPUs" in log.read_text() and "exit code 130" in log.read_text()
    done = here.wait(job, {"COMPLETED", "FAILED", "CANCELLED"}, 300)
    text = log.read_text()
    assert done["JobState"] == "COMPLETED" and done["ExitCode"] == "0:0", text[-3000:]
    assert f"--resume {tmp_path}/run" in text and "attempt 2" in text and token not in text
    policy_steps = [step for step in steps(tmp_path) if step > 0]
    assert policy_steps == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "final" / "policy" / "config.json").is_file()
    assert not (tmp_path / "run~1").exists()
    nothing_left(job)


@pytest.mark.slow
@pytest.mark.cluster
def test_scancel_leaves_nothing(here: Slurm, tmp_path: Path) -> None:
    job = submit(here, tmp_path, 2, "trainer.steps=500")
    until(lambda: bool(steps(tmp_path)), tmp_path / "job.log")
    assert processes_of(job)
    here.call("scancel", job)
    here.wait(job, {"CANCELLED"}, 60)
    nothing_left(job)


IN_A_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}


@pytest.mark.parametrize(
    ("job", "arguments", "named"),
    [
        ({}, [CONFIG], "runs inside a Slurm job"),
        (IN_A_JOB, [], "CONFIG is missing"),
        (IN_A_JOB, ["no.yaml"], "no.yaml"),
        (
            {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"},
            [CONFIG, "cluster.address=auto"],
            "cluster.address",
        ),
    ],
)
def test_bad_input_is_one_line(job: dict[str, str], arguments: list[str], named: str) -> None:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    result = subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**kept, **job, "RAIRL_HOME": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2 and named in result.stderr and result.stderr.count("\n") == 1, result.stderr
