"""Tracking across `kill -9` of the driver: resumed, or never resumed and closed by the next run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rairl_ray.provenance import may_be_alive, process_identity
from rairl_ray.tracking.spool import CURSOR, SPOOL, saved_cursor
from rairl_ray.tracking.tracker import Tracker
from rairl_ray.tracking.uploader import Uploader
from tests.mlflow_server import free_port, proxy, server
from tests.tracked import config, empty_database, eventually, history, run_folder, runs, sqlite

DRIVER = """
import sys, time
from pathlib import Path
from rairl_ray.config.load import read_saved
from rairl_ray.tracking.tracker import Tracker
folder = Path(sys.argv[1])
tracker = Tracker()
tracker.start(read_saved(folder / "config.yaml"), folder)
for step in range(1, 100000):
    tracker.log({"a": float(step), "b": float(step)}, step)
    print(step, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def database(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(empty_database())


def driver(folder: Path, pause: float = 0.05) -> subprocess.Popen[str]:
    """A process that logs one step after the other until it is killed."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), str(pause)], stdout=subprocess.PIPE, text=True
    )


def kill(process: subprocess.Popen[str]) -> int:
    """SIGKILL; the last step that was logged."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    lines = process.stdout.read().split()
    return int(lines[-1])


def arrived(client: MlflowClient, count: int = 1) -> dict[str, str]:
    """The runs once the first of them has so many rows of `a`."""

    def ready() -> dict[str, str]:
        found = runs(client)
        return found if found and len(history(client, next(iter(found)), "a")) >= count else {}

    return eventually(ready)


def test_a_killed_run_is_closed_by_the_next_one_with_every_row(tmp_path: Path) -> None:
    folder = run_folder(config(tmp_path))
    process = driver(folder)
    client = sqlite(tmp_path)
    [(run_id, status)] = arrived(client, 3).items()
    assert status == "RUNNING"
    last = kill(process)
    assert runs(client) == {run_id: "RUNNING"}
    # A killed driver leaves a torn line behind, too.
    with open(folder / SPOOL, "a") as file:
        file.write('{"kind": "metrics", "step": 9')
    following = Tracker(warn=pytest.fail)
    other = config(tmp_path, name="sub/other")
    following.start(other, run_folder(other))
    eventually(lambda: runs(client).get(run_id) == "KILLED")
    eventually(lambda: len(history(client, run_id, "a")) >= last)
    following.finish("FINISHED")
    steps = [step for step, _ in history(client, run_id, "a")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) - last in (0, 1)
    assert runs(client) == {run_id: "KILLED", str(following.run_id): "FINISHED"}


def test_the_runs_of_the_living_and_of_others_are_left_alone(tmp_path: Path) -> None:
    living = driver(run_folder(config(tmp_path, name="living")))
    client = sqlite(tmp_path)
    [(living_id, _)] = arrived(client).items()
    dead = driver(run_folder(config(tmp_path, name="dead")))
    eventually(lambda: len(runs(client)) == 2 and all(history(client, run, "a") for run in runs(client)))
    [dead_id] = runs(client).keys() - {living_id}
    kill(dead)
    # Started on another host: nobody here can know whether it lives.
    spool = tmp_path / "dead" / SPOOL
    text = spool.read_text()
    spool.write_text(text.replace('"host": "', '"host": "not-'))

    def another(name: str) -> None:
        tracker = Tracker(warn=pytest.fail)
        tracker.start(config(tmp_path, name=name), run_folder(config(tmp_path, name=name)))
        assert tracker._unsent_runs is not None
        tracker._unsent_runs.thread.join(60)
        assert not tracker._unsent_runs.thread.is_alive()
        tracker.finish("FINISHED")

    try:
        another("third")
        assert (runs(client)[living_id], runs(client)[dead_id]) == ("RUNNING", "RUNNING")
        spool.write_text(text)
        another("fourth")
        assert (runs(client)[living_id], runs(client)[dead_id]) == ("RUNNING", "KILLED")
    finally:
        kill(living)


def test_who_is_alive() -> None:
    me = process_identity()
    assert may_be_alive(me)
    assert may_be_alive({**me, "host": "elsewhere", "pid": 1 << 30})
    assert not may_be_alive({**me, "pid": 1 << 30})
    assert not may_be_alive({**me, "born": "another boot 1"})  # a later process with our number
    assert not may_be_alive({**me, "pid": 1 << 30, "born": None}) and may_be_alive({**me, "born": None})


def test_a_folder_that_is_moved_while_its_rest_is_sent_does_not_reach_the_one_in_its_place(
    tmp_path: Path,
) -> None:
    """A fresh start of the same name moves an earlier run aside, whoever still sends for that one."""
    run_config = config(tmp_path)
    folder = run_folder(run_config)
    old = Uploader(
        f"sqlite:///{tmp_path / 'mlflow.db'}",
        tmp_path,
        folder,
        warn=lambda topic, text: None,
    )
    assert old.spool.own()
    old.spool.put({"kind": "start", "experiment": "rairl", "run_name": "old", **process_identity()})
    assert old.once()
    folder.rename(tmp_path / "t~1")
    tracker = Tracker(warn=pytest.fail)
    tracker.start(run_config, run_folder(run_config))
    cursor = eventually(lambda: (saved := saved_cursor(folder)).get("run_id") and saved)
    tracker.log({"a": 1.0}, 1)
    assert not old.once()
    assert not old.spool.advance(old.spool.cursor["key"], {"closed": True})
    old.spool.close()
    tracker.finish("FINISHED")
    assert cursor["run_id"] == tracker.run_id == json.loads((folder / CURSOR).read_text())["run_id"]
    client = sqlite(tmp_path)
    assert history(client, old.spool.cursor["run_id"], "a") == []
    assert not client.get_run(old.spool.cursor["run_id"]).data.params
    assert runs(client)[str(tracker.run_id)] == "FINISHED"


def test_a_resume_waits_for_whoever_still_sends_and_takes_over(tmp_path: Path) -> None:
    """Two processes never carry one spool at once; neither does the second one block its trainer."""
    folder = run_folder(config(tmp_path))
    process = driver(folder, pause=1000)
    client = sqlite(tmp_path)
    [first_id] = arrived(client)
    second = Tracker(warn=pytest.fail)
    second.start(config(tmp_path), folder)
    second.go_back_to(0)
    second.log({"a": -1.0}, 1)
    time.sleep(1.5)
    assert second._uploader is not None and not second._uploader.spool.owned
    assert history(client, first_id, "a") == [(1, 1.0)]
    kill(process)
    second.finish("FINISHED")
    assert history(client, second.run_id, "a") == [(1, 1.0)]
    assert runs(client) == {first_id: "FINISHED"} and second.run_id == first_id


@pytest.mark.slow
def test_killed_in_the_middle_of_a_flush_and_resumed_from_an_earlier_step(tmp_path: Path) -> None:
    port = free_port()
    with server(tmp_path, port) as backend, proxy(backend) as line:
        client = MlflowClient(tracking_uri=backend)
        folder = run_folder(config(tmp_path, line.uri))
        # The server has done what it was asked, or not yet, and its answer is on the way.
        line.delay_seconds = 0.5
        process = driver(folder)
        arrived(client, 3)
        sent = line.count("log-batch")
        eventually(lambda: line.count("log-batch") > sent)
        last = kill(process)
        back = last // 2
        line.delay_seconds = 0.0
        second = Tracker(warn=pytest.fail)
        second.start(config(tmp_path, line.uri), folder)
        second.go_back_to(back)
        for step in range(back + 1, last + 1):
            second.log({"a": step + 1000.0, "b": float(step)}, step)
        second.finish("FINISHED")
        for name in ("a", "b"):
            assert history(client, second.run_id, name) == [(step, float(step)) for step in range(1, last + 1)]
        assert runs(client) == {str(second.run_id): "FINISHED"}
        cursor = json.loads((folder / CURSOR).read_text())
        assert cursor["closed"] and cursor["run_id"] == second.run_id
