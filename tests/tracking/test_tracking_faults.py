"""Tracking against a real MLflow server that is down, slow, cut off, silent, refusing or forgetful."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rairl_ray.tracking.tracker import Tracker
from tests.mlflow_server import Fault, Proxy, free_port, proxy, server
from tests.tracked import config, eventually, history, run_folder, runs, table


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with server(tmp_path_factory.mktemp("server"), free_port()) as uri:
        yield uri


@pytest.fixture
def line(backend: str) -> Iterator[Proxy]:
    """The proxy before the server."""
    with proxy(backend) as made:
        yield made


@pytest.mark.slow
def test_a_server_that_is_down_then_up_then_down(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    folder = run_folder(config(tmp_path, uri))
    warnings: list[str] = []

    # Down from start to end: everything waits in the run folder.
    first = Tracker(warn=warnings.append)
    first.start(config(tmp_path, uri, flush=3), folder)
    for step in range(1, 21):
        first.log({"a": float(step), "nan": math.nan, "inf": math.inf}, step)
    first.finish("FAILED")
    assert first.run_id is None and len(warnings) == 2
    assert "tracking_spool.jsonl" in warnings[0] and "--resume" in warnings[1]

    warnings.clear()
    second = Tracker(warn=warnings.append)
    with server(tmp_path, port):
        # Up at the next start: the history arrives, then the new steps.
        second.start(config(tmp_path, uri), folder)
        second.go_back_to(20)
        second.log({"a": 21.0}, 21)
        second.log_table([{"text": "a"}], "rollouts")
        client = MlflowClient(tracking_uri=uri)
        eventually(lambda: second.run_id and len(history(client, second.run_id, "a")) == 21)
        assert [step for step, _ in history(client, second.run_id, "a")] == list(range(1, 22))
    # Down in the middle of the run.
    second.log({"a": 22.0}, 22)
    eventually(lambda: warnings)
    second.log({"a": 23.0}, 23)
    with server(tmp_path, port):
        # Up again: the running process recovers by itself.
        second.finish("FINISHED")
        assert len(warnings) == 1
        assert [step for step, _ in history(client, second.run_id, "a")] == list(range(1, 24))
        assert all(math.isnan(value) for _, value in history(client, second.run_id, "nan"))
        assert len(history(client, second.run_id, "inf")) == 20
        assert runs(client) == {str(second.run_id): "FINISHED"}
        assert client.get_run(str(second.run_id)).data.params["seed"] == "0"
        assert list(table(client, second.run_id, "rollouts.json")["text"]) == ["a"]


def test_every_kind_of_request_is_cut_once_after_the_server_did_it(
    tmp_path: Path, line: Proxy, backend: str
) -> None:
    seen: set[str] = set()

    def cut_the_first(method: str, path: str) -> Fault:
        kind = f"{method} {path.split('?')[0]}"
        first = kind not in seen
        seen.add(kind)
        return "cut" if first else "pass"

    line.fault = cut_the_first
    run_config = config(tmp_path, line.uri, experiment="cut")
    folder = run_folder(run_config)
    tracker = Tracker(warn=lambda text: None)
    tracker.start(run_config, folder)
    for step in range(5):
        tracker.log({"a": float(step), "nan": math.nan, "inf": -math.inf}, step)
    tracker.log_table([{"text": "a"}], "rollouts")
    tracker.finish("FINISHED")
    client = MlflowClient(tracking_uri=backend)
    kinds = ("experiments/create", "runs/create", "runs/update", "log-batch", "set-tag", "mlflow-artifacts")
    assert [kind for kind in kinds if not any(kind in request for request in seen)] == []
    assert runs(client, "cut") == {str(tracker.run_id): "FINISHED"} and not runs(client, "cut", deleted=True)
    assert history(client, tracker.run_id, "a") == [(step, float(step)) for step in range(5)]
    assert [len(history(client, tracker.run_id, name)) for name in ("nan", "inf")] == [5, 5]
    assert list(table(client, tracker.run_id, "rollouts.json")["text"]) == ["a"]


@pytest.mark.slow
def test_every_second_batch_is_cut_and_every_row_is_there_once(
    tmp_path: Path, line: Proxy, backend: str
) -> None:
    line.fault = lambda method, path: "cut" if "log-batch" in path and line.count("log-batch") % 2 else "pass"
    run_config = config(tmp_path, line.uri, experiment="cut often")
    tracker = Tracker(warn=lambda text: None)
    tracker.start(run_config, run_folder(run_config))
    for step in range(300):
        tracker.log({f"m{i}": step + i / 100 for i in range(20)}, step)
    tracker.finish("FINISHED")
    client = MlflowClient(tracking_uri=backend)
    for i in (0, 7, 19):
        assert history(client, tracker.run_id, f"m{i}") == [(step, step + i / 100) for step in range(300)]


def test_a_run_that_the_server_makes_too_late_is_not_a_second_one(
    tmp_path: Path, line: Proxy, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its making is given up after a second, tried again, and then done twice."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    released = threading.Event()

    def hold_the_first(method: str, path: str) -> Fault:
        if "runs/create" in path and line.count("runs/create") == 1:
            released.wait(60)
        return "pass"

    line.fault = hold_the_first
    run_config = config(tmp_path, line.uri, experiment="late")
    tracker = Tracker(warn=lambda text: None)
    tracker.start(run_config, run_folder(run_config))
    eventually(lambda: tracker.run_id)
    released.set()
    client = MlflowClient(tracking_uri=backend)
    eventually(lambda: len(runs(client, "late")) == 2)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    tracker.finish("FINISHED")
    assert runs(client, "late") == {str(tracker.run_id): "FINISHED"}
    assert list(runs(client, "late", deleted=True).values()) == ["KILLED"]


@pytest.mark.slow
def test_a_server_slow_by_seconds_gets_everything_in_few_requests(
    tmp_path: Path, line: Proxy, backend: str
) -> None:
    line.delay_seconds = 2.0
    run_config = config(tmp_path, line.uri, experiment="slow")
    tracker = Tracker(warn=pytest.fail)
    tracker.start(run_config, run_folder(run_config))
    for step in range(60):
        tracker.log({"a": float(step)}, step)
    tracker.finish("FINISHED")
    client = MlflowClient(tracking_uri=backend)
    assert [step for step, _ in history(client, tracker.run_id, "a")] == list(range(60))
    assert runs(client, "slow") == {str(tracker.run_id): "FINISHED"}
    assert line.count("log-batch") < 10


def test_a_server_that_never_answers_costs_the_end_of_the_run_no_more_than_allowed(
    tmp_path: Path, line: Proxy, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    line.fault = lambda method, path: "hang"
    run_config = config(tmp_path, line.uri, flush=4, experiment="silent")
    folder = run_folder(run_config)
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    begin = time.monotonic()
    tracker.start(run_config, folder)
    for step in range(50):
        tracker.log({"a": float(step)}, step)
    tracker.finish("FINISHED")
    # Start imports MLflow, the end waits the 4 seconds it was given; 52 calls wait for no answer of 2 s each.
    assert time.monotonic() - begin < 50
    assert "--resume" in warnings[-1] and tracker.run_id is None
    line.fault = lambda method, path: "pass"
    again = Tracker(warn=pytest.fail)
    again.start(run_config.model_copy(update={"tracking": config(tmp_path, line.uri).tracking}), folder)
    again.finish("FINISHED")
    client = MlflowClient(tracking_uri=backend)
    assert [step for step, _ in history(client, again.run_id, "a")] == list(range(50))


@pytest.mark.slow
def test_rows_that_a_broken_server_refuses_do_not_leave_the_run_running(
    tmp_path: Path, line: Proxy, backend: str
) -> None:
    """And they are not lost: the next run in this output folder sends them."""
    line.fault = lambda method, path: "error" if "log-batch" in path else "pass"
    run_config = config(tmp_path, line.uri, flush=8, experiment="broken")
    tracker = Tracker(warn=lambda text: None)
    tracker.start(run_config, run_folder(run_config))
    tracker.log({"a": 1.0}, 1)
    tracker.finish("FAILED")
    client = MlflowClient(tracking_uri=backend)
    assert runs(client, "broken") == {str(tracker.run_id): "FAILED"}
    assert history(client, tracker.run_id, "a") == []
    line.fault = lambda method, path: "pass"
    next_config = config(tmp_path, line.uri, name="next", experiment="broken")
    following = Tracker(warn=pytest.fail)
    following.start(next_config, run_folder(next_config))
    eventually(lambda: history(client, tracker.run_id, "a") == [(1, 1.0)])
    eventually(lambda: runs(client, "broken")[str(tracker.run_id)] == "FAILED")
    following.finish("FINISHED")
    assert set(runs(client, "broken").values()) == {"FAILED", "FINISHED"}


@pytest.mark.slow
def test_a_slow_upload_does_not_leave_the_run_running(tmp_path: Path, line: Proxy, backend: str) -> None:
    line.fault = lambda method, path: "hang" if "mlflow-artifacts" in path else "pass"
    run_config = config(tmp_path, line.uri, flush=10, experiment="upload")
    folder = run_folder(run_config)
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(run_config, folder)
    tracker.log({"a": 1.0}, 1)
    tracker.finish("FINISHED")
    client = MlflowClient(tracking_uri=backend)
    assert runs(client, "upload") == {str(tracker.run_id): "FINISHED"}
    assert history(client, tracker.run_id, "a") == [(1, 1.0)]
    assert "--resume" in warnings[-1]


@pytest.mark.slow
def test_a_server_that_lost_its_database_gets_the_whole_history(tmp_path: Path) -> None:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    run_config = config(tmp_path, uri)
    tracker = Tracker(warn=lambda text: None)
    client = MlflowClient(tracking_uri=uri)
    with server(tmp_path, port):
        tracker.start(run_config, run_folder(run_config))
        tracker.log({"a": 1.0}, 1)
        eventually(lambda: tracker.run_id and history(client, tracker.run_id, "a"))
    (tmp_path / "server.db").unlink()
    with server(tmp_path, port):
        tracker.log({"a": 2.0}, 2)
        tracker.finish("FINISHED")
        assert runs(client) == {str(tracker.run_id): "FINISHED"}
        assert history(client, tracker.run_id, "a") == [(1, 1.0), (2, 2.0)]
