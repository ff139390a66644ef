"""Tracking on MLflow's sqlite store: what arrives, once, as it was measured first."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

from rairl_ray.metrics import legal_name
from rairl_ray.provenance import git_state
from rairl_ray.tracking.spool import CURSOR, SPOOL
from rairl_ray.tracking.tracker import DIFFERS_TAG, Tracker
from rairl_ray.tracking.uploader import KINDS
from tests.mlflow_server import free_port
from tests.tracked import config, empty_database, eventually, history, run_folder, runs, sqlite, table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mlflow.db").write_bytes(empty_database())
    return run_folder(config(tmp_path))


def test_a_whole_run(tmp_path: Path, folder: Path) -> None:
    tracker = Tracker(warn=pytest.fail)
    run_config = config(tmp_path, data={"system_prompt": "x" * 7000})
    tracker.start(run_config, folder, tags={"data_hash": "d1", "config_hash": "c1"})
    for step in range(3):
        tracker.log(
            {"policy/loss": step / 2, "policy/kl": math.nan, "reward/mean": -math.inf, "eval/pass@1": 1}, step
        )
    tracker.log_table([{"text": "a", "reward": 0.5}, {"text": "ü"}], "rollouts/step-000002")
    (folder / "report" / "deep").mkdir(parents=True)
    (folder / "report" / "table.md").write_text("| a |")
    (folder / "report" / "deep" / "x.md").write_text("x")
    tracker.log_artifacts(folder / "report")
    tracker.finish("FINISHED")

    client = sqlite(tmp_path)
    run_id = tracker.run_id
    run = client.get_run(str(run_id))
    assert run.info.status == "FINISHED" and run.info.run_name == "t"
    assert run.info.artifact_uri.startswith((tmp_path / "mlartifacts").as_uri())
    assert run.data.params["policy.learning_rate"] == "1e-05" and run.data.params["eval.k"] == "[1]"
    assert run.data.params["data.system_prompt"] == "x" * 6000
    assert len(run.data.params) > 100
    assert (run.data.tags["data_hash"], run.data.tags["config_hash"]) == ("d1", "c1")
    assert {k: run.data.tags[k] for k in git_state()}
    assert history(client, run_id, "policy/loss") == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert len(history(client, run_id, "eval/pass_1")) == 3
    assert history(client, run_id, "reward/mean") == [(step, -sys.float_info.max) for step in range(3)]
    assert all(math.isnan(value) for _, value in history(client, run_id, "policy/kl"))
    assert list(table(client, run_id, "rollouts/step-000002.json")["text"]) == ["a", "ü"]
    places = (None, "report", "report/deep")
    paths = {file.path for place in places for file in client.list_artifacts(str(run_id), place)}
    assert {"config.yaml", "report/table.md", "report/deep/x.md"} <= paths


def test_rows_that_wait_go_in_few_requests(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    real = SqlAlchemyStore.log_batch

    def counted(self: SqlAlchemyStore, run_id: str, metrics: Any, params: Any, tags: Any) -> Any:
        batches.append(len(metrics))
        assert len(params) <= 100 and len(metrics) <= 1000
        return real(self, run_id, metrics=metrics, params=params, tags=tags)

    monkeypatch.setattr(SqlAlchemyStore, "log_batch", counted)
    first = Tracker(warn=lambda text: None)
    first.start(config(tmp_path, "sqlite:////proc/nowhere/mlflow.db", flush=0), folder)
    for step in range(40):
        first.log({f"m{i}": float(step) for i in range(60)}, step)
    first.finish("FAILED")
    tracker = Tracker(warn=pytest.fail)
    tracker.start(config(tmp_path), folder)
    tracker.finish("FINISHED")
    sizes = [size for size in batches if size]
    assert sum(sizes) == 40 * 60 and len(sizes) == 3
    assert [step for step, _ in history(sqlite(tmp_path), tracker.run_id, "m59")] == list(range(40))


def test_a_resume_goes_on_in_the_same_run_where_nothing_is_made_again(tmp_path: Path, folder: Path) -> None:
    first = Tracker(warn=pytest.fail)
    first.start(config(tmp_path), folder)
    for step in range(1, 6):
        first.log({"a": float(step)}, step)
    first.finish("KILLED")

    second = Tracker(warn=pytest.fail)
    second.start(config(tmp_path, trainer={"steps": 200}), folder, resume_run_id=first.run_id)
    second.go_back_to(5)
    client = sqlite(tmp_path)
    eventually(lambda: client.get_run(str(first.run_id)).info.status == "RUNNING")
    second.log({"a": 5.0, "eval": 1.0}, 5)  # the same value at the same step: an evaluation made again
    second.log({"a": 6.0}, 6)
    second.finish("FINISHED")
    assert second.run_id == first.run_id
    assert runs(client) == {str(first.run_id): "FINISHED"} and not runs(client, deleted=True)
    assert history(client, first.run_id, "a") == [(step, float(step)) for step in range(1, 7)]
    assert history(client, first.run_id, "eval") == [(5, 1.0)]


def test_steps_made_again_stay_in_the_same_run_as_measured_first(tmp_path: Path, folder: Path) -> None:
    ids = []
    for back, last in ((None, 5), (2, 7), (3, 4), (1, 8)):  # ten resumes would be no different
        tracker = Tracker(warn=pytest.fail)
        tracker.start(config(tmp_path), folder)
        if back is not None:
            tracker.go_back_to(back)
        for step in range((back or 0) + 1, last + 1):
            tracker.log({"a": step + 1e-8 * last, "time/step": float(last)}, step)
        if back == 2:
            tracker.log({"eval": 0.5}, 7)  # what a kill had prevented
        tracker.finish("KILLED" if last < 8 else "FINISHED")
        ids.append(str(tracker.run_id))
    client = sqlite(tmp_path)
    assert runs(client) == {ids[0]: "FINISHED"} and len(set(ids)) == 1 and not runs(client, deleted=True)
    assert [step for step, _ in history(client, ids[0], "a")] == list(range(1, 9))
    assert [value for _, value in history(client, ids[0], "time/step")] == [5.0] * 5 + [7.0] * 2 + [8.0]
    assert history(client, ids[0], "eval") == [(7, 0.5)]
    assert DIFFERS_TAG not in client.get_run(ids[0]).data.tags, "rounding and clocks differ"


def test_a_value_that_is_measured_otherwise_again_is_said(tmp_path: Path, folder: Path) -> None:
    tracker = Tracker(warn=pytest.fail)
    tracker.start(config(tmp_path), folder)
    for step in range(1, 5):
        tracker.log({"a": float(step), "nan": math.nan}, step)
    for back in (2, 1):  # two failures within the process, the second one earlier than the first
        tracker.go_back_to(back)
        for step in range(back + 1, 5):
            tracker.log({"a": step + 100.0 * back, "nan": math.nan}, step)
    tracker.log({"a": 5.0}, 5)
    tracker.finish("FINISHED")
    client = sqlite(tmp_path)
    assert history(client, tracker.run_id, "a") == [(step, float(step)) for step in range(1, 6)]
    assert list(runs(client).values()) == ["FINISHED"] and not runs(client, deleted=True)
    assert client.get_run(str(tracker.run_id)).data.tags[DIFFERS_TAG] == "a at step 3: 3, made again: 203"


@pytest.mark.parametrize("lost", ["cursor", "offsets", "offsets and id"])
def test_carrying_everything_twice_has_the_effect_of_once(tmp_path: Path, folder: Path, lost: str) -> None:
    """What a kill between MLflow's answer and the cursor's file leaves behind, for every record at once."""
    first = Tracker(warn=pytest.fail)
    first.start(config(tmp_path), folder)
    first.log({"a": 1.0, "nan": math.nan, "inf": math.inf}, 1)
    first.log_table([{"text": "a"}], "rollouts")
    first.finish("FINISHED")
    cursor = json.loads((folder / CURSOR).read_text())
    if lost == "cursor":
        (folder / CURSOR).unlink()
    else:
        cursor |= {"status_offset": 0, "rows_offset": 0, "files_offset": 0}
        cursor |= {"run_id": None} if lost == "offsets and id" else {}
        (folder / CURSOR).write_text(json.dumps(cursor))
    second = Tracker(warn=pytest.fail)
    second.start(config(tmp_path), folder, resume_run_id=first.run_id)
    second.go_back_to(1)
    second.log({"a": 2.0}, 2)
    second.finish("FINISHED")
    client = sqlite(tmp_path)
    assert runs(client) == {str(first.run_id): "FINISHED"} and second.run_id == first.run_id
    assert history(client, first.run_id, "a") == [(1, 1.0), (2, 2.0)]
    assert [len(history(client, first.run_id, name)) for name in ("nan", "inf")] == [1, 1]
    assert list(table(client, first.run_id, "rollouts.json")["text"]) == ["a"]


def test_the_end_of_an_earlier_driver_does_not_close_the_run_and_idle_queues_rest(
    tmp_path: Path, folder: Path
) -> None:
    """Whoever closes a dead driver's run may write that down just after a resume began."""
    tracker = Tracker(warn=pytest.fail)
    tracker.start(config(tmp_path), folder)
    tracker._put({"kind": "finish", "status": "KILLED", "session": "of an earlier driver"})
    assert tracker._uploader is not None
    spool = tracker._uploader.spool
    eventually(lambda: all(spool.cursor[f"{queue}_offset"] == spool.size() for queue in KINDS))
    time.sleep(0.2)
    changes = spool.changes
    time.sleep(0.5)
    assert spool.changes == changes
    assert runs(sqlite(tmp_path)) == {str(tracker.run_id): "RUNNING"}
    tracker.finish("FINISHED")


def test_none_switches_tracking_off(tmp_path: Path) -> None:
    tracker = Tracker(warn=pytest.fail)
    tracker.start(config(tmp_path, "none"), tmp_path)
    tracker.log({"a": 1.0}, 1)
    tracker.go_back_to(0)
    tracker.log_table([], "x")
    tracker.log_artifacts(tmp_path)
    tracker.finish("FINISHED")
    assert list(tmp_path.iterdir()) == [] and tracker.run_id is None


def test_nothing_raises_into_training(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path, "sqlite:////proc/nowhere/mlflow.db", flush=3), folder)
    tracker.log({"a": 1.0}, 1)
    tracker.log({"a": "not a number"}, 2)  # type: ignore[dict-item]
    tracker.log_table([{"a": object()}], "not json")
    tracker.log_artifacts(tmp_path)  # not below the run folder
    tracker.finish("FINISHED")
    found = [text.split(":")[0] for text in warnings]
    assert len(found) == 5 and all("\n" not in text for text in warnings)
    assert "tracking drops a record (log)" in found and "tracking drops a record (log_table)" in found
    assert "resume" in warnings[-1] and str(folder / SPOOL) in warnings[-1]
    other = Tracker(warn=warnings.append)
    other.start(config(tmp_path), tmp_path / "missing" / "folder")
    other.log({"a": 1.0}, 1)
    other.finish("FAILED")
    assert len(warnings) == 6 and warnings[-1].startswith("tracking is off")


def test_refused_names_are_left_out_one_by_one_and_named_once(tmp_path: Path, folder: Path) -> None:
    """Names are made legal before they are sent; these come from another version of the code, or of MLflow."""
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path), folder)
    for step in (1, 2):
        row = {f"m{i}": float(i) for i in range(30)} | {"bad@name": 1.0, "a/../b": 1.0}
        tracker._put({"kind": "metrics", "step": step, "metrics": row})
    tracker._put({"kind": "params", "params": {"p@q": "1", "fine": "2"}, "tags": {}})
    tracker.finish("FINISHED")
    client = sqlite(tmp_path)
    for i in range(30):
        assert [step for step, _ in history(client, tracker.run_id, f"m{i}")] == [1, 2]
    run = client.get_run(str(tracker.run_id))
    assert run.info.status == "FINISHED" and run.data.params["fine"] == "2"
    assert [name for name in ("bad@name", "a/../b", "p@q") if sum(name in w for w in warnings) != 1] == []
    assert len(warnings) == 3 and all("refuses" in text for text in warnings)


def test_files_that_cannot_be_sent_hold_up_nothing(tmp_path: Path, folder: Path) -> None:
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path), folder)
    (folder / "final").mkdir()
    (folder / "final" / "a.bin").write_text("a")
    (folder / "final" / "b.bin").write_text("b")
    # The artifact store is broken: a file lies where its folder should be.
    (tmp_path / "mlartifacts").write_text("in the way")
    tracker.log_artifacts(folder / "final")
    tracker.log({"a": 1.0}, 1)
    (folder / "final" / "b.bin").unlink()
    tracker.finish("FINISHED")
    client = sqlite(tmp_path)
    assert runs(client) == {str(tracker.run_id): "FINISHED"}
    assert history(client, tracker.run_id, "a") == [(1, 1.0)]
    named = [name for name in ("config.yaml", "a.bin", "b.bin") if any(name in text for text in warnings)]
    assert named == ["config.yaml", "a.bin", "b.bin"]


def test_a_folder_that_was_moved_still_finds_its_artifacts(tmp_path: Path, folder: Path) -> None:
    """A fresh start of the same name moves the earlier run aside and makes files of the same names."""
    (folder / "final").mkdir()
    (folder / "final" / "model").write_text("old")
    first = Tracker(warn=lambda text: None)
    first.start(config(tmp_path, "sqlite:////proc/nowhere/mlflow.db", flush=0), folder)
    first.log_artifacts(folder / "final")
    first.finish("FINISHED")
    folder.rename(tmp_path / "t~1")
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "model").write_text("new")
    again = Tracker(warn=pytest.fail)
    again.start(config(tmp_path), tmp_path / "t~1")
    again.finish("FINISHED")
    client = sqlite(tmp_path)
    assert Path(client.download_artifacts(str(again.run_id), "final/model")).read_text() == "old"


def test_no_password_reaches_the_run_folder(tmp_path: Path, folder: Path) -> None:
    (folder / "config.yaml").unlink()
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config(tmp_path, f"http://user:s3cret@127.0.0.1:{free_port()}", flush=3), folder)
    tracker.finish("FINISHED")
    text = "".join(path.read_text() for path in folder.iterdir()) + str(warnings)
    assert "***@127.0.0.1" in text and "s3cret" not in text


def test_names_and_git() -> None:
    assert legal_name("eval/pass@1") == "eval/pass_1" and legal_name("a b.c-d:e/f") == "a b.c-d:e/f"
    assert legal_name("/../a//b/") == "a/b" and legal_name("..") == "_" and len(legal_name("é" * 300)) == 250
    assert set(git_state()) == {"git.commit", "git.dirty"}


QUIET_RUN = """
import sys
import time
from pathlib import Path
from rairl_ray.config.schema import RunConfig
from rairl_ray.tracking.tracker import Tracker
folder = Path(sys.argv[1]) / sys.argv[2]
folder.mkdir()
tracker = Tracker()
tracker.start(RunConfig(output_dir=sys.argv[1], name=sys.argv[2], tracking={"flush_seconds": 120}), folder)
tracker.log({"a": 1.0}, 1)
tracker.finish("FINISHED")
"""


def test_a_kill_while_the_database_is_made_leaves_no_broken_one(tmp_path: Path) -> None:
    run = [sys.executable, "-c", QUIET_RUN, str(tmp_path), "killed"]
    process = subprocess.Popen(run, stderr=subprocess.DEVNULL)
    half = tmp_path / ".mlflow.db.new"
    eventually(lambda: half.exists() and half.stat().st_size > 0)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    following = Tracker(warn=pytest.fail)
    following.start(config(tmp_path), run_folder(config(tmp_path)))
    following.finish("FINISHED")
    assert runs(sqlite(tmp_path))[str(following.run_id)] == "FINISHED" and not half.exists()


def test_two_processes_make_the_database_at_once_and_mlflow_prints_nothing(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", QUIET_RUN, str(tmp_path), name],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={name: value for name, value in os.environ.items() if not name.startswith("MLFLOW")},
        )
        for name in ("t1", "t2")
    ]
    for process in processes:
        output, _ = process.communicate(timeout=240)
        assert (process.returncode, output) == (0, "")
    assert list(runs(sqlite(tmp_path)).values()) == ["FINISHED", "FINISHED"]
