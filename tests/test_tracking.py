"""Tracking against real MLflow: sqlite, and a real server process that comes and goes."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from rairl_ray import tracking
from rairl_ray.config.schema import RunConfig
from rairl_ray.tracking import Tracker, git_state, metric_name

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def config(tmp_path: Path, uri: str | None = None, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {"name": "t", "output_dir": str(tmp_path), "tracking": {"uri": uri}, **changes}
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "t"
    folder.mkdir()
    return folder


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def table(client: MlflowClient, run_id: str, name: str) -> pd.DataFrame:
    listed = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert [entry["type"] for entry in listed if entry["path"] == name] == ["table"]
    return pd.read_json(client.download_artifacts(run_id, name), orient="split")


def sqlite(tmp_path: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def test_a_whole_run_on_sqlite(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    run_config = config(tmp_path, data={"system_prompt": "x" * 7000})
    run_id = tracker.start(run_config, folder, tags={"data_hash": "d1", "config_hash": "c1"})
    assert run_id is not None and tracker.run_id == run_id
    for step in range(3):
        tracker.log(
            {"policy/loss": step / 2, "policy/kl": math.nan, "reward/mean": -math.inf, "eval/pass@1": 1}, step
        )
    tracker.log_table([{"text": "a", "reward": 0.5}, {"text": "ü"}], "rollouts/step-000002")
    (folder / "report").mkdir()
    (folder / "report" / "table.md").write_text("| a |")
    tracker.log_artifacts(folder / "report")
    tracker.finish("FINISHED")
    assert warnings == []

    client = sqlite(tmp_path)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "t"
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert run.data.params["policy.learning_rate"] == "1e-05" and run.data.params["eval.k"] == "[1]"
    assert run.data.params["data.system_prompt"] == "x" * 6000
    assert len(run.data.params) > 100
    assert {k: run.data.tags[k] for k in ("data_hash", "config_hash")} == {
        "data_hash": "d1",
        "config_hash": "c1",
    }
    assert {k: run.data.tags[k] for k in git_state()}
    assert history(client, run_id, "policy/loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert len(history(client, run_id, "eval/pass_1")) == 3
    assert [step for step, _ in history(client, run_id, "reward/mean")] == [0, 1, 2]
    assert all(math.isnan(value) for _, value in history(client, run_id, "policy/kl"))
    assert list(table(client, run_id, "rollouts/step-000002.json")["text"]) == ["a", "ü"]
    paths = {file.path for folder in (None, "report") for file in client.list_artifacts(run_id, folder)}
    assert {"config.yaml", "report/table.md"} <= paths


def test_metrics_of_a_step_go_in_one_batch(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = MlflowClient.log_batch

    def counted(self: MlflowClient, run_id: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any:
        batches.append(len(metrics))
        assert len(params) <= 100
        return real(self, run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    tracker = Tracker()
    tracker.start(config(tmp_path), folder)
    tracker.log({f"m{i}": float(i) for i in range(60)}, 1)
    tracker.finish("FINISHED")
    assert [size for size in batches if size] == [60]


def test_resume_goes_on_in_the_same_run_without_doubling(tmp_path: Path, folder: Path) -> None:
    first = Tracker()
    run_id = first.start(config(tmp_path), folder)
    for step in range(1, 6):
        first.log({"a": float(step)}, step)
    first.log({"b": 4.0}, 4)
    first.finish("KILLED")

    second = Tracker(warn=pytest.fail)
    longer = config(tmp_path, trainer={"steps": 200})
    assert second.start(longer, folder, resume_run_id=run_id, resume_from_step=2) == run_id
    deadline = time.monotonic() + 60
    while sqlite(tmp_path).get_run(run_id).info.status != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for step in range(1, 8):
        second.log({"a": float(step), "b": float(step), "new": 0.0}, step)
    second.finish("FINISHED")
    client = sqlite(tmp_path)
    assert [step for step, _ in history(client, run_id, "a")] == [1, 2, 3, 4, 5, 6, 7]
    assert [step for step, _ in history(client, run_id, "b")] == [4, 5, 6, 7]
    assert [step for step, _ in history(client, run_id, "new")] == [3, 4, 5, 6, 7]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs([client.get_run(run_id).info.experiment_id])) == 1


def test_a_run_folder_that_lost_its_cursor_resumes_by_id(tmp_path: Path, folder: Path) -> None:
    first = Tracker()
    run_id = first.start(config(tmp_path), folder)
    first.log({"a": 1.0}, 1)
    first.finish("FAILED")
    (folder / tracking.CURSOR).unlink()
    second = Tracker(warn=pytest.fail)
    assert second.start(config(tmp_path), folder, resume_run_id=run_id) == run_id
    second.log({"a": 2.0}, 2)
    second.finish("FINISHED")
    # The whole history was carried again, and MLflow kept one of each.
    assert history(sqlite(tmp_path), str(run_id), "a") == [(1, 1.0), (2, 2.0)]


@pytest.mark.parametrize("kept_id", [True, False])
def test_carrying_a_record_twice_has_the_effect_of_once(tmp_path: Path, folder: Path, kept_id: bool) -> None:
    """What a kill between MLflow's answer and the cursor's file leaves behind, for every record at once."""
    first = Tracker()
    run_id = first.start(config(tmp_path), folder)
    first.log({"a": 1.0, "nan": math.nan, "inf": math.inf}, 1)
    first.log_table([{"text": "a"}], "rollouts")
    first.finish("FINISHED")
    cursor = json.loads((folder / tracking.CURSOR).read_text())
    cursor = {**cursor, "offset": 0, "run_id": run_id if kept_id else None}
    (folder / tracking.CURSOR).write_text(json.dumps(cursor))
    second = Tracker(warn=pytest.fail)
    assert second.start(config(tmp_path), folder) == run_id
    second.finish("FINISHED")
    client = sqlite(tmp_path)
    experiment = client.get_run(str(run_id)).info.experiment_id
    assert len(client.search_runs([experiment])) == 1
    assert [len(history(client, str(run_id), name)) for name in ("a", "nan", "inf")] == [1, 1, 1]
    assert list(table(client, str(run_id), "rollouts.json")["text"]) == ["a"]


def test_none_switches_tracking_off(tmp_path: Path, folder: Path) -> None:
    tracker = Tracker(warn=pytest.fail)
    assert tracker.start(config(tmp_path, "none"), folder) is None
    tracker.log({"a": 1.0}, 1)
    tracker.log_table([], "x")
    tracker.finish("FINISHED")
    assert list(folder.iterdir()) == [] and not (tmp_path / "mlflow.db").exists()


def test_nothing_raises_into_training(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path, "sqlite:////proc/nowhere/mlflow.db"), folder)
    tracker.log({"a": 1.0}, 1)
    tracker.log_table([{"a": object()}], "not json")
    tracker.finish("FINISHED", timeout_seconds=5)
    assert len(warnings) == 1 and "\n" not in warnings[0]
    other = Tracker(warn=warnings.append)
    assert other.start(config(tmp_path), tmp_path / "missing" / "folder") is None
    other.log({"a": 1.0}, 1)
    other.finish("FAILED")
    assert len(warnings) == 2


def test_a_record_that_mlflow_refuses_does_not_block_the_rest(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    run_id = tracker.start(config(tmp_path), folder)
    tracker._put({"kind": "metrics", "step": 1, "metrics": {"bad@name": 1.0}})
    tracker.log({"a": 1.0}, 1)
    tracker.finish("FINISHED")
    assert history(sqlite(tmp_path), str(run_id), "a") == [(1, 1.0)]
    assert len(warnings) == 1 and "refuses" in warnings[0]


def test_no_password_reaches_the_run_folder(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path, f"http://user:s3cret@127.0.0.1:{free_port()}"), folder)
    tracker.finish("FINISHED", timeout_seconds=10)
    text = "".join(path.read_text() for path in folder.iterdir()) + str(warnings)
    assert "***@127.0.0.1" in text and "s3cret" not in text


def test_names_and_git() -> None:
    assert metric_name("eval/pass@1") == "eval/pass_1" and metric_name("a b.c-d:e/f") == "a b.c-d:e/f"
    assert metric_name("/../a//b/") == "a/b" and metric_name("..") == "_" and len(metric_name("é" * 300)) == 250
    assert set(git_state()) == {"git.commit", "git.dirty"}


QUIET_RUN = """
import sys
from pathlib import Path
from rairl_ray.config.schema import RunConfig
from rairl_ray.tracking import Tracker
folder = Path(sys.argv[1]) / "t"
folder.mkdir()
tracker = Tracker()
tracker.start(RunConfig(output_dir=sys.argv[1]), folder)
tracker.log({"a": 1.0}, 1)
tracker.finish("FINISHED")
"""


def test_mlflow_prints_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", QUIET_RUN, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- a real server -----------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def server(folder: Path, port: int) -> Iterator[str]:
    """`mlflow server` on loopback, its whole process group ended afterwards."""
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    stores = [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    process = subprocess.Popen(
        command + stores,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )
    try:
        deadline = time.monotonic() + 240
        while not answers(port):
            assert process.poll() is None and time.monotonic() < deadline, "mlflow server did not start"
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_is_down_then_up_then_down(tmp_path: Path, folder: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    warnings: list[str] = []

    # Down from start to end: training is not held up, everything waits in the run folder.
    first = Tracker(warn=warnings.append)
    begin = time.monotonic()
    assert first.start(config(tmp_path, uri), folder) is None
    assert time.monotonic() - begin < 6.0
    for step in range(1, 21):
        begin = time.monotonic()
        first.log({"a": float(step), "nan": math.nan, "inf": math.inf}, step)
        assert time.monotonic() - begin < 0.5
    begin = time.monotonic()
    first.finish("FAILED")
    assert time.monotonic() - begin < 20.0
    assert len(warnings) == 1 and "tracking_spool.jsonl" in warnings[0]

    second = Tracker(warn=warnings.append)
    with server(tmp_path, port):
        # Up at the next start: the history arrives, then the new steps.
        run_id = second.start(config(tmp_path, uri), folder)
        second.log({"a": 21.0}, 21)
        second.log_table([{"text": "a"}], "rollouts")
        client = MlflowClient(tracking_uri=uri)
        for _ in range(1800):
            run_id = second.run_id
            if run_id and len(history(client, run_id, "a")) == 21:
                break
            time.sleep(0.1)
        assert run_id is not None
        assert [step for step, _ in history(client, run_id, "a")] == list(range(1, 22))
    # Down in the middle of the run.
    second.log({"a": 22.0}, 22)
    time.sleep(1.5)
    second.log({"a": 23.0}, 23)
    with server(tmp_path, port):
        # Up again: the running process recovers by itself.
        second.finish("FINISHED", timeout_seconds=240)
        client = MlflowClient(tracking_uri=uri)
        assert [step for step, _ in history(client, run_id, "a")] == list(range(1, 24))
        assert all(math.isnan(value) for _, value in history(client, run_id, "nan"))
        assert len(history(client, run_id, "inf")) == 20
        run = client.get_run(run_id)
        assert run.info.status == "FINISHED" and run.data.params["seed"] == "0"
        assert list(table(client, run_id, "rollouts.json")["text"]) == ["a"]
        assert len(client.search_runs([run.info.experiment_id])) == 1
        # A resume on the live server.
        third = Tracker(warn=pytest.fail)
        assert third.start(config(tmp_path, uri), folder) == run_id
        third.log({"a": 24.0}, 24)
        third.finish("FINISHED", timeout_seconds=240)
        assert [step for step, _ in history(client, run_id, "a")] == list(range(1, 25))
