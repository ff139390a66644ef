"""A mirrored run against a real S3 server: what arrives, in which order, and whose copy it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rairl_ray.checkpoint import verify
from rairl_ray.storage import Store
from tests.remote_runs import NAME, Machine, contents, make_run
from tests.s3_server import Line
from tests.trainer.test_checkpoint import save

# --- what arrives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_a_run_arrives_whole_and_comes_back_on_another_machine(uri: str, scheme: str, tmp_path: Path) -> None:
    place = uri if scheme == "s3" else f"file://{tmp_path}/remote"
    here = Machine(place, tmp_path / "here")
    make_run(here.folder, (2, 4))
    here.mirror.sync()
    local = contents(here.folder)
    assert here.there().keys() == local.keys() | {".mirror"}
    config = here.store.read(f"{NAME}/config.yaml")
    assert config == f"output_dir: {place}\nname: {NAME}\n".encode()

    elsewhere = Machine(place, tmp_path / "elsewhere")
    assert elsewhere.mirror.resume(NAME) == elsewhere.folder
    # The newest checkpoint alone, and paths of that machine.
    expected = {name: data for name, data in local.items() if "step-000002" not in name}
    expected["config.yaml"] = f"output_dir: {tmp_path}/elsewhere\nname: {NAME}\n".encode()
    assert contents(elsewhere.folder) == expected
    assert verify(elsewhere.folder / "checkpoints" / "step-000004") is None


def recorded(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order in which `store` uploads and deletes ("-name") them from now on."""
    order: list[str] = []
    upload, delete = store.upload, store.delete
    monkeypatch.setattr(
        store, "upload", lambda source, name, moved: (upload(source, name, moved), order.append(name))
    )
    monkeypatch.setattr(store, "delete", lambda name: (delete(name), order.append(f"-{name}")))
    return order


def test_the_manifest_is_last_and_old_checkpoints_go_after_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(uri, tmp_path)
    saved = make_run(here.folder, (2,), keep=1)
    here.mirror.sync()
    save(saved, 4)
    order = recorded(here.store, monkeypatch)
    here.mirror.sync()
    new = [i for i, name in enumerate(order) if "step-000004" in name and name[0] != "-"]
    old = [i for i, name in enumerate(order) if name.startswith(f"-{NAME}/checkpoints/step-000002")]
    assert order[new[-1]].endswith("step-000004/manifest.json") and len(new) == len(old) == 5
    assert min(old) > max(new)
    assert order[old[0]].endswith("manifest.json")  # What is half removed looks unfinished.
    order.clear()
    here.mirror.sync()
    assert order == []  # Nothing changed.
    save(saved, 4)
    here.mirror.sync()
    assert order[0] == f"-{NAME}/checkpoints/step-000004/manifest.json"  # Made again: unfinished until whole.
    assert here.there().keys() == contents(here.folder).keys() | {".mirror"}


def test_a_checkpoint_that_is_pruned_while_it_is_uploaded_arrives_and_stays_until_the_next(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(uri, tmp_path)
    saved = make_run(here.folder, (2,), keep=1)
    upload = here.store.upload

    def prune_meanwhile(source: Path, name: str, moved: Callable[[int], None]) -> None:
        upload(source, name, moved)
        if "step-000002/policy" in name:
            save(saved, 4)

    monkeypatch.setattr(here.store, "upload", prune_meanwhile)
    here.mirror.sync()
    assert not (here.folder / "checkpoints" / "step-000002").exists()
    other = Machine(uri, tmp_path / "other")
    other.mirror.resume(NAME)
    assert verify(other.folder / "checkpoints" / "step-000002") is None
    here.mirror.sync()
    assert {name.split("/")[1] for name in here.there() if "step-" in name} == {"step-000004"}


def test_a_connection_lost_in_a_checkpoint_leaves_the_older_one_and_is_made_good(
    uri: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.uri)
    here = Machine(uri, tmp_path / "here")
    saved = make_run(here.folder, (2,))
    here.mirror.sync()
    save(saved, 4)
    upload = here.store.upload

    def cut_meanwhile(source: Path, name: str, moved: Callable[[int], None]) -> None:
        upload(source, name, moved)
        if "step-000004/policy" in name and not here.warnings:
            line.cut()

    monkeypatch.setattr(here.store, "upload", cut_meanwhile)
    here.mirror.start()
    deadline = time.monotonic() + 120
    while not here.warnings:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    other = Machine(uri, tmp_path / "other")
    other.mirror.resume(NAME)
    assert [path.name for path in (other.folder / "checkpoints").glob("step-*")] == ["step-000002"]
    assert any("step-000004" in name for name in other.there()), "nothing of it had been uploaded"
    line.mend()
    assert here.mirror.finish() is None
    assert here.there().keys() == contents(here.folder).keys() | {".mirror"}
    first, last = here.warnings  # One warning, however often it was tried.
    assert "work goes on, uploads are tried again" in first and "uploads go on" in last


def test_a_checkpoint_that_was_damaged_over_there_is_skipped(uri: str, tmp_path: Path) -> None:
    here = Machine(uri, tmp_path / "here")
    make_run(here.folder, (2, 4))
    here.mirror.sync()
    here.store.write(f"{NAME}/checkpoints/step-000004/policy/shard-0.bin", b"x" * 800)
    other = Machine(uri, tmp_path / "other")
    other.mirror.resume(NAME)
    assert [path.name for path in (other.folder / "checkpoints").glob("step-*")] == ["step-000002"]
    assert "step-000004: broken checkpoint is skipped" in other.warnings[0]


# --- whose copy it is -------------------------------------------------------------------------------


def test_a_run_that_went_on_elsewhere_comes_back_newer_and_the_older_process_stops(
    uri: str, tmp_path: Path
) -> None:
    first = Machine(uri, tmp_path / "first")
    make_run(first.folder, (2,))
    first.mirror.sync()
    second = Machine(uri, tmp_path / "second")
    second.mirror.resume(NAME)
    make_run(second.folder, (4,), keep=1)
    second.mirror.sync()
    (first.folder / "late").touch()
    first.mirror.sync()
    assert "another process writes there now" in first.warnings[0] and "late" not in first.there()
    first.mirror.start()
    assert "another process writes there now" in (first.mirror.finish() or "")
    again = Machine(uri, tmp_path / "first")
    again.mirror.resume(NAME)
    assert "continued elsewhere" in again.warnings[0]
    assert (tmp_path / "first" / f"{NAME}~1" / "checkpoints" / "step-000002").is_dir()
    assert (again.folder / "checkpoints" / "step-000004").is_dir()
    # The same machine once more: what is staged there is the newest, and is not fetched.
    (again.folder / "mine").touch()
    third = Machine(uri, tmp_path / "first")
    third.mirror.resume(NAME)
    assert (third.folder / "mine").is_file() and third.warnings == []


def test_two_processes_of_a_node_fetch_one_copy(uri: str, tmp_path: Path) -> None:
    owner = Machine(uri, tmp_path / "owner")
    make_run(owner.folder)
    owner.mirror.sync()
    users = [Machine(uri, tmp_path / "node") for _ in range(4)]
    with ThreadPoolExecutor(len(users)) as pool:
        folders = list(pool.map(lambda user: user.mirror.fetch(NAME), users))
    assert set(folders) == {tmp_path / "node" / NAME} and [user.warnings for user in users] == [[]] * 4
    assert [path.name for path in (tmp_path / "node" / "demo").iterdir() if path.is_dir()] == ["run"]


def test_a_warm_start_that_others_use_stays_theirs_unless_it_is_trained_anew(uri: str, tmp_path: Path) -> None:
    owner = Machine(uri, tmp_path / "owner")
    make_run(owner.folder)
    owner.mirror.sync()
    for _ in range(2):  # Also with the staging folder of the time before.
        user = Machine(uri, tmp_path / "user")
        user.mirror.borrow(NAME)
        assert (user.folder / "final" / "policy" / "config.json").is_file()
        (user.folder / "mine").touch()
        user.mirror.sync()
        (owner.folder / "more").touch()
        owner.mirror.sync()
        assert "mine" not in owner.there() and owner.warnings == []
    user.folder.rename(tmp_path / "aside")
    make_run(user.folder, ())
    user.mirror.sync()
    assert "mine" not in user.there() and "more" in user.store.names(f"{NAME}~1")


@pytest.mark.parametrize("machine", ["same", "other"])
def test_a_fresh_start_moves_the_earlier_run_aside_over_there(uri: str, machine: str, tmp_path: Path) -> None:
    first = Machine(uri, tmp_path / "same")
    make_run(first.folder, (2,))
    first.mirror.sync()
    before = contents(first.folder).keys()
    fresh = Machine(uri, tmp_path / machine)
    fresh.mirror.begin(NAME)
    fresh.mirror.sync()  # The old folder is still there, and is left alone.
    assert fresh.there().keys() == before | {".mirror"}
    if fresh.folder.exists():
        fresh.folder.rename(tmp_path / "aside")
    make_run(fresh.folder, ())
    fresh.mirror.sync()
    assert fresh.there().keys() == contents(fresh.folder).keys() | {".mirror"}
    assert fresh.store.names(f"{NAME}~1").keys() == before | {".mirror"}
    assert "an earlier run was moved to" in fresh.warnings[0]
