"""An MLflow that lost the run: it gets the whole history in a new one, and only one."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from rairl_ray.tracking.mlflow_run import MlflowRun
from rairl_ray.tracking.spool import Spool
from rairl_ray.tracking.tracker import Tracker
from rairl_ray.tracking.uploader import Uploader
from tests.tracked import config, empty_database, eventually, history, run_folder, runs, sqlite, table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes(empty_database())
    return run_folder(config(tmp_path))


def lose_runs(output: Path) -> None:
    with sqlite3.connect(output / "mlflow.db", timeout=60) as database:
        for name in ("metrics", "latest_metrics", "params", "tags", "runs"):
            database.execute(f"DELETE FROM {name}")


def test_a_database_that_lost_the_run_gets_the_whole_history(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path), folder)
    tracker.log({"a": 1.0}, 1)
    tracker.log_table([{"text": "a"}], "rollouts")
    client = sqlite(tmp_path)
    first = eventually(lambda: tracker.run_id)
    eventually(lambda: history(client, first, "a"))
    lose_runs(tmp_path)
    tracker.log({"a": 2.0}, 2)
    tracker.finish("FINISHED")
    assert tracker.run_id != first and runs(client) == {str(tracker.run_id): "FINISHED"}
    assert history(client, tracker.run_id, "a") == [(1, 1.0), (2, 2.0)]
    assert list(table(client, tracker.run_id, "rollouts.json")["text"]) == ["a"]
    assert warnings == ["MLflow has lost the run; its history is sent again"]


def test_two_queues_that_both_see_a_lost_run_begin_one_new_run(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploader = Uploader(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path, folder, lambda topic, text: None)
    spool = uploader.spool
    assert spool.own()
    spool.put({"kind": "start", "experiment": "rairl", "run_name": "t", "session": "s"})
    assert uploader.once()
    lose_runs(tmp_path)
    spool.put({"kind": "metrics", "step": 1, "metrics": {"a": 1.0}})
    is_gone, keys = MlflowRun._is_gone, []

    def another_queue_was_first(run: MlflowRun) -> bool:
        gone = is_gone(run)
        spool.restart(spool.cursor["key"])
        keys.append(spool.cursor["key"])
        return gone

    monkeypatch.setattr(MlflowRun, "_is_gone", another_queue_was_first)
    with pytest.raises(MlflowException, match="not found"):
        uploader.once()
    assert keys == [spool.cursor["key"]]


def test_whoever_still_sends_to_a_lost_run_does_not_move_the_cursor(tmp_path: Path) -> None:
    spool = Spool(tmp_path, ["server"])
    assert spool.own()
    old = spool.cursor["key"]
    assert spool.advance(old, {"run_id": "lost", "rows_offset": 5})
    spool.restart(old)
    assert not spool.advance(old, {"rows_offset": 7})
    assert (spool.cursor["run_id"], spool.cursor["rows_offset"]) == (None, 0)
    assert spool.advance(spool.cursor["key"], {"rows_offset": 3})
