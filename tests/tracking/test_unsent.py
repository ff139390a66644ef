"""The pointers to unfinished runs: who has one, who looks at what, and what a crash or a move leaves."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rairl_ray.provenance import process_identity
from rairl_ray.tracking import unsent
from rairl_ray.tracking.spool import CURSOR, SPOOL, unfinished
from rairl_ray.tracking.tracker import Tracker
from rairl_ray.tracking.unsent import UnsentRuns, find, pointers, settle
from tests.tracked import config, empty_database, run_folder, runs, sqlite

DEAD = {"host": process_identity()["host"], "born": "another boot 1", "pid": 1}
"""What a `start` record says of a driver that is no more."""


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(unsent, "EVERY_SECONDS", 1.0)  # SQLite may be locked for a moment
    made = tmp_path / "runs"
    made.mkdir()
    (made / "mlflow.db").write_bytes(empty_database())
    return made


def finished(output: Path, name: str = "t", **options: Any) -> Tracker:
    """A run from start to end, which has also looked at what others left."""
    run_config = config(output, name=name, **options)
    tracker = Tracker(warn=lambda text: None)
    tracker.start(run_config, run_folder(run_config))
    tracker.log({"a": 1.0}, 1)
    wait(tracker)
    tracker.finish("FINISHED")
    return tracker


def wait(tracker: Tracker) -> None:
    assert tracker._unsent_runs is not None
    tracker._unsent_runs.thread.join(60)
    assert not tracker._unsent_runs.thread.is_alive()


def dead(output: Path, name: str = "dead", pointer: bool = True) -> Path:
    """A run folder as a driver leaves it that was killed before it reached MLflow."""
    folder = run_folder(config(output, name=name))
    session = f"session-of-{folder.name}"
    write(folder, {"kind": "start", "session": session}, {"kind": "metrics", "step": 1, "metrics": {"a": 1.0}})
    if pointer:
        settle(output, folder)
        assert find(output, output / f".unsent-{os.getuid()}" / session) == folder
    return folder


def write(folder: Path, *rows: dict[str, Any]) -> None:
    """Append records to a spool."""
    rest = {"experiment": "rairl", "run_name": folder.name, "time_ms": 1_700_000_000_000, **DEAD}
    with open(folder / SPOOL, "a") as file:
        file.writelines(json.dumps(row | rest) + "\n" for row in rows)


def settled(output: Path, count: int) -> None:
    """Folders of runs that MLflow has."""
    cursor = {"closed": True, "status_offset": 1 << 20, "rows_offset": 1 << 20, "files_offset": 1 << 20}
    for i in range(count):
        folder = dead(output, f"sweep/trials/{i:03d}", pointer=False)
        (folder / CURSOR).write_text(json.dumps(cursor))


def statuses(output: Path) -> list[str]:
    return sorted(runs(sqlite(output)).values())


def test_a_run_has_a_pointer_until_it_is_sent_and_closed(output: Path) -> None:
    run_config = config(output, name="sub/t")
    folder = run_folder(run_config)
    tracker = Tracker(warn=pytest.fail)
    tracker.start(run_config, folder)
    [pointer] = pointers(output)
    assert pointer.read_text() == "sub/t" and find(output, pointer) == folder
    tracker.finish("FINISHED")
    assert pointers(output) == [] and not unfinished(folder)
    again = Tracker(warn=pytest.fail)
    again.start(run_config, folder)
    assert pointers(output) == [pointer]
    again.go_back_to(0)
    again.finish("FINISHED")
    assert pointers(output) == []


def test_what_could_not_be_sent_keeps_its_pointer_and_the_next_run_sends_it(output: Path) -> None:
    (output / "down").write_text("in the way")
    first = finished(output, "first", uri=f"sqlite:///{output / 'down' / 'mlflow.db'}", flush=0)
    assert first.run_id is None and len(pointers(output)) == 1
    (output / "down").unlink()
    (output / "down").mkdir()
    (output / "down" / "mlflow.db").write_bytes(empty_database())
    finished(output, "second")
    assert pointers(output) == []
    assert statuses(output) == statuses(output / "down") == ["FINISHED"]


def test_a_start_touches_none_of_300_settled_folders_and_closes_the_unfinished_run(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled(output, 300)
    folder = dead(output, "sweep/trials/dead")
    touched: set[Path] = set()
    watching = True
    real = {name: getattr(os, name) for name in ("stat", "lstat")}

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.listdir", "os.scandir", "os.stat", "os.lstat"):
            touched.add(
                Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | Path) else Path()
            )

    for name, call in real.items():  # of which no audit hook hears

        def noted(path: Any, *rest: Any, name: str = name, call: Any = call, **options: Any) -> Any:
            note(f"os.{name}", (path,))
            return call(path, *rest, **options)

        monkeypatch.setattr(os, name, noted)
    sys.addaudithook(note)  # for ever, hence `watching`
    finished(output)
    watching = False
    assert statuses(output) == ["FINISHED", "KILLED"] and pointers(output) == []
    trials = folder.parent
    assert folder / SPOOL in touched and folder in touched, "what is opened and asked for is seen"
    below = {path.relative_to(trials).parts[0] for path in touched if trials in path.parents}
    assert below == {"dead"} and not touched & {output / "sweep", trials}


def test_a_crash_before_the_pointer_or_after_the_end_does_no_harm(output: Path) -> None:
    without = dead(output, "without", pointer=False)  # nobody was told of this run: its --resume sends it
    empty = run_folder(config(output, name="empty"))
    (empty / SPOOL).write_text('{"kind": "start", "sess')
    settle(output, empty)
    settle(output, output / "nothing")
    assert pointers(output) == []
    after = dead(output, "after")
    cursor = {"closed": True, **{f"{name}_offset": 1 << 20 for name in ("status", "rows", "files")}}
    (after / CURSOR).write_text(json.dumps(cursor))
    before = (after / SPOOL).read_bytes()
    finished(output)
    assert pointers(output) == [] and (after / SPOOL).read_bytes() == before
    assert statuses(output) == ["FINISHED"] and unfinished(without)
    resumed = Tracker(warn=pytest.fail)
    resumed.start(config(output, name="without"), without)
    resumed.go_back_to(1)
    resumed.finish("FINISHED")
    assert statuses(output) == ["FINISHED", "FINISHED"]


def test_a_resume_that_begins_while_the_pointer_goes_keeps_it(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = dead(output)
    [pointer] = pointers(output)
    answers = iter([False, True])
    monkeypatch.setattr(unsent, "unfinished", lambda folder: next(answers))
    settle(output, folder)
    assert pointers(output) == [pointer] and find(output, pointer) == folder


def test_the_pointer_of_a_folder_that_is_gone_goes_and_that_of_one_that_cannot_be_seen_stays(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(dead(output, "gone"))
    shutil.rmtree(dead(output, "deep/er/away").parents[1])
    hidden = dead(output, "hidden")
    [kept] = [pointer for pointer in pointers(output) if pointer.read_text() == "hidden"]
    real = unsent.first_session

    def refused(folder: Path) -> str | None:
        if folder == hidden:
            raise PermissionError(13, "no")
        return real(folder)

    monkeypatch.setattr(unsent, "first_session", refused)
    others = UnsentRuns(output, output / "own")
    assert [others.finish(pointer) for pointer in pointers(output)] == [True, True, False]
    assert pointers(output) == [kept]
    monkeypatch.setattr(unsent, "first_session", real)
    finished(output)
    assert statuses(output) == ["FINISHED", "KILLED"] and pointers(output) == []


def test_a_run_that_a_fresh_start_moved_aside_is_told_from_the_one_in_its_place(output: Path) -> None:
    folder = dead(output, "t")
    folder.rename(output / "t~1")
    shutil.copytree(output / "t~1", output / "t~10")
    (output / "t~10" / SPOOL).write_text((folder.parent / "t~1" / SPOOL).read_text().replace("of-t", "of-u"))
    tracker = finished(output, "t")
    assert runs(sqlite(output))[str(tracker.run_id)] == "FINISHED"
    assert statuses(output) == ["FINISHED", "KILLED"] and pointers(output) == []
    assert not unfinished(output / "t~1") and unfinished(output / "t~10")


def test_a_moved_output_folder_has_its_pointers_and_its_runs_in_mlflow(output: Path, tmp_path: Path) -> None:
    run_config = config(output, name="cut")
    cut = Tracker(warn=pytest.fail)
    cut.start(run_config, run_folder(run_config))
    assert cut.id_within(60)
    finished(output, "other")
    assert cut._uploader is not None
    cut._uploader.spool.close()
    spool, born = output / "cut" / SPOOL, str(process_identity()["born"])
    spool.write_text(spool.read_text().replace(born, "x" * len(born)))  # its process is dead
    moved = tmp_path / "elsewhere" / "runs"
    moved.parent.mkdir()
    output.rename(moved)
    third = finished(moved, "third")
    assert runs(sqlite(moved))[str(cut.run_id)] == "KILLED", "the same run, not a second one"
    assert len(runs(sqlite(moved))) == 3 and pointers(moved) == []
    again = Tracker(warn=lambda text: None)
    again.start(config(moved, name="third"), moved / "third")
    again.go_back_to(1)
    again.finish("FINISHED")
    assert again.run_id == third.run_id


def test_a_pointer_that_cannot_be_written_costs_nothing_but_itself(output: Path) -> None:
    (output / f".unsent-{os.getuid()}").write_text("in the way")
    tracker = finished(output)
    assert statuses(output) == ["FINISHED"] and not unfinished(output / "t")
    assert tracker._unsent_runs is not None and pointers(output) == []


def test_a_driver_that_ended_after_the_next_one_began_does_not_speak_for_it(output: Path) -> None:
    """Whoever closes a dead driver's run may write that down just after a resume began."""
    folder = dead(output)
    write(folder, {"kind": "start", "session": "second"})
    write(folder, {"kind": "finish", "session": "session-of-dead", "status": "KILLED"})
    finished(output)
    assert statuses(output) == ["FINISHED", "KILLED"] and pointers(output) == []


def test_a_folder_of_another_user_is_left_alone(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    folder = dead(output)
    before = (folder / SPOOL).read_bytes()
    finished(output)
    assert statuses(output) == ["FINISHED"] and (folder / SPOOL).read_bytes() == before
    assert [pointer.read_text() for pointer in pointers(output)] == ["dead"]


def test_a_run_that_was_sent_to_another_server_is_left_to_its_resume(output: Path) -> None:
    folder = dead(output)
    cursor = {
        "server": "another",
        "closed": False,
        **{f"{name}_offset": 0 for name in ("status", "rows", "files")},
    }
    (folder / CURSOR).write_text(json.dumps(cursor))
    before = (folder / SPOOL).read_bytes()
    finished(output)
    assert statuses(output) == ["FINISHED"] and (folder / SPOOL).read_bytes() == before
    assert [pointer.read_text() for pointer in pointers(output)] == ["dead"]
    assert json.loads((folder / CURSOR).read_text()) == cursor
