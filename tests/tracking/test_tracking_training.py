"""Training with MLflow healthy, slow and silent: the same numbers, and no wait on the way."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rairl_ray import metrics as names
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.runfolder import RunFolder
from tests.inprocess import differing, rows_in
from tests.mlflow_server import free_port, proxy, server
from tests.runs import ROOT, TINY, kill_hard, launch, launch_background
from tests.tracked import eventually, history, runs, sqlite

pytestmark = pytest.mark.slow

DELAY_SECONDS = 1.5
"""Between a request to the slow server and its answer."""
WATCHED = """
import json, sys, threading, time
report, port, arguments = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
here = threading.main_thread()
touched, threads, calls = [], set(), {}

def hook(event, values):
    # Every connection that Python opens, whatever library asked for it.
    if threading.current_thread() is here and (
        (event == "socket.connect" and isinstance(values[1], tuple) and values[1][1] == port)
        or (event == "sqlite3.connect" and "mlflow" in str(values[0]))
    ):
        touched.append(event)

sys.addaudithook(hook)
import launch
from mlflow import MlflowClient
from rairl_ray.tracking.tracker import Tracker

attribute = MlflowClient.__getattribute__
def watched(self, name):
    threads.add(threading.current_thread().name)
    return attribute(self, name)
MlflowClient.__getattribute__ = watched

def timed(name, method):
    def call(*values, **named):
        begin = time.perf_counter()
        try:
            return method(*values, **named)
        finally:
            calls.setdefault(name, []).append(time.perf_counter() - begin)
    return call
for name in ("start", "log", "log_table", "log_artifacts", "go_back_to", "finish"):
    setattr(Tracker, name, timed(name, getattr(Tracker, name)))

sys.argv = ["rairl", *arguments]
try:
    launch.main()
finally:
    with open(report, "w") as file:
        json.dump({"touched": touched, "threads": sorted(threads), "calls": calls}, file)
"""


@dataclass
class Watched:
    """What a run left, and what its training thread did for tracking."""

    folder: RunFolder
    output: str
    touched: list[str]
    threads: list[str]
    calls: dict[str, list[float]]

    def rows(self) -> list[dict[str, float]]:
        """Its metrics but for what measures the machine."""
        return rows_in(self.folder)


def train(output: Path, uri: str, flush: float, port: int = 0) -> Watched:
    report = output / "report.json"
    output.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(report), str(port), "train", "experiments/demo/grpo.yaml", *TINY,
         "warm_start=null", "trainer.steps=3", "eval.at_start=false", "eval.at_end=false",
         f"output_dir={output}", f"tracking.uri={uri}", f"tracking.flush_seconds={flush}"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    folder = RunFolder(output / "demo" / "grpo")
    return Watched(folder, done.stdout, **json.loads(report.read_text()))


def agrees(client: MlflowClient, run_id: str, folder: RunFolder) -> bool:
    """Whether MLflow has exactly the rows of metrics.jsonl, its clocks included."""
    rows = folder.read_metrics()
    logged = {name: history(client, run_id, name) for row in rows for name in row.keys() - {"step"}}
    expected = {name: [(int(row["step"]), row[name]) for row in rows if name in row] for name in logged}
    return repr(logged) == repr(expected)


def test_mlflow_changes_neither_the_numbers_nor_the_wait(tmp_path: Path) -> None:
    without = train(tmp_path / "without", "none", 0)
    assert len(without.rows()) == 3 and all(math.isfinite(row[names.POLICY_LOSS]) for row in without.rows())

    healthy = train(tmp_path / "healthy", "null", 300)
    client = sqlite(tmp_path / "healthy")
    [(run_id, status)] = runs(client).items()
    assert status == "FINISHED"
    assert agrees(client, run_id, healthy.folder)

    port = free_port()
    with server(tmp_path, port) as backend, proxy(backend) as line:
        line.delay_seconds = DELAY_SECONDS
        slow = train(tmp_path / "slow", line.uri, 300, int(line.uri.rpartition(":")[2]))
        assert line.requests
        client = MlflowClient(tracking_uri=backend)
        [(run_id, status)] = runs(client).items()
        assert status == "FINISHED"
        assert agrees(client, run_id, slow.folder)

        line.fault = lambda method, path: "hang"
        silent = train(tmp_path / "silent", line.uri, 3, int(line.uri.rpartition(":")[2]))
        assert "--resume" in silent.output

    for run in (healthy, slow, silent):
        assert not differing(run.rows(), without.rows())
        assert run.touched == [] and run.threads
        assert all(thread.startswith("tracking-") for thread in run.threads)
        # The longest a trainer ever waited for its tracker while it trained, against the time of one answer.
        during = [run.calls[name] for name in ("log", "log_table", "log_artifacts")]
        assert max(seconds for call in during for seconds in call) < DELAY_SECONDS
    spent = {
        name: {call: round(sum(seconds), 4) for call, seconds in run.calls.items()}
        for name, run in (("without", without), ("healthy", healthy), ("slow", slow), ("silent", silent))
    }
    print(json.dumps(spent))


def test_a_killed_training_that_is_resumed_has_each_step_once_in_mlflow(tmp_path: Path) -> None:
    arguments = [
        "train", "experiments/demo/grpo.yaml", *TINY, "warm_start=null", "trainer.steps=40",
        "trainer.checkpoint_every=5", "eval.at_start=false", "tracking.flush_seconds=120",
        f"output_dir={tmp_path}",
    ]  # fmt: skip
    process = launch_background(*arguments)
    folder = RunFolder(tmp_path / "demo" / "grpo")
    try:
        database = tmp_path / "mlflow.db"
        client = eventually(lambda: database.exists() and sqlite(tmp_path), 300)
        [first] = eventually(lambda: runs(client), 300)
        eventually(lambda: len(history(client, first, names.POLICY_LOSS)) >= 7, 300)
    finally:
        kill_hard(process)
    assert runs(client) == {first: "RUNNING"}
    assert CheckpointStore(folder.root).latest_valid() is not None
    done = launch(*arguments, "--resume", "demo/grpo")
    assert done.returncode == 0, done.stdout + done.stderr
    [(run_id, status)] = runs(client).items()
    assert status == "FINISHED" and run_id == first and not runs(client, deleted=True)
    logged = {name: history(client, first, name) for row in rows_in(folder) for name in row if name != "step"}
    assert logged == {
        name: [(int(row["step"]), row[name]) for row in rows_in(folder) if name in row] for name in logged
    }
    assert [step for step, _ in history(client, run_id, names.POLICY_LOSS)] == list(range(1, 41))
