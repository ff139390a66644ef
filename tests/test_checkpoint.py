"""Checkpoints: whatever happens while one is written, the last good one stays good."""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rairl_ray.checkpoint import CheckpointStore, verify
from rairl_ray.errors import ResumeError


def save(store: CheckpointStore, step: int, **facts: Any) -> Path:
    folder = store.begin(step)
    for part in ("policy", "discriminator"):
        (folder / part / "shard-0.bin").write_bytes(f"{part} {step}".encode() * 100)
    return store.commit(step, {"step": step, "buffer": [1.5, None, "ä"]}, **facts)


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, warnings: list[str]) -> CheckpointStore:
    return CheckpointStore(tmp_path, keep=2, warn=warnings.append)


def test_round_trip_and_manifest(store: CheckpointStore, tmp_path: Path) -> None:
    assert store.latest_valid() is None
    facts = {
        "versions": {"policy": 20, "discriminator": 25},
        "config_hash": "abc",
        "code_version": "def",
        "mlflow_run_id": "run",
    }
    path = save(store, 20, **facts)
    assert path == tmp_path / "checkpoints" / "step-000020" == store.latest_valid()
    assert store.read(path) == {"step": 20, "buffer": [1.5, None, "ä"]}
    manifest = store.manifest(path)
    assert {key: manifest[key] for key in facts} == facts and manifest["step"] == 20
    assert set(manifest["files"]) == {"policy/shard-0.bin", "discriminator/shard-0.bin", "trainer/state.json"}
    assert os.readlink(store.folder / "latest") == "step-000020"


def test_keeps_the_last_ones(store: CheckpointStore) -> None:
    for step in (5, 10, 15, 100):
        save(store, step)
    assert names(store) == ["latest", "step-000015", "step-000100"]
    assert (store.folder / "latest").resolve() == store.folder / "step-000100"


def test_replaces_one_of_the_same_step_and_drops_an_abandoned_future(store: CheckpointStore) -> None:
    for step in (10, 20):
        save(store, step)
    save(store, 20)
    assert names(store) == ["latest", "step-000010", "step-000020"]
    save(store, 15)  # the run was resumed from 10
    assert names(store) == ["latest", "step-000010", "step-000015"]
    assert store.latest_valid() == store.folder / "step-000015"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "policy/shard-0.bin").write_bytes(b"x" * 900), "checksum"),
        (lambda path: (path / "policy/shard-0.bin").write_bytes(b"x"), "bytes"),
        (lambda path: (path / "discriminator/shard-0.bin").unlink(), "missing"),
        (lambda path: (path / "trainer/state.json").write_text("{}"), "state.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"a'), "manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": {}}'), "state.json"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest"),
    ],
)
def test_a_broken_one_is_skipped_with_a_warning(
    store: CheckpointStore, warnings: list[str], spoil: Callable[[Path], object], reason: str
) -> None:
    save(store, 10)
    save(store, 20)
    assert len((store.folder / "step-000020/policy/shard-0.bin").read_bytes()) == 900
    spoil(store.folder / "step-000020")
    assert store.latest_valid() == store.folder / "step-000010"
    assert len(warnings) == 1 and "step-000020" in warnings[0] and reason in warnings[0]


def test_temporary_folders_are_ignored_and_only_a_writer_cleans_them(
    store: CheckpointStore, tmp_path: Path
) -> None:
    save(store, 10)
    store.begin(20)
    reader = CheckpointStore(tmp_path)
    assert reader.latest_valid() == store.folder / "step-000010"
    assert ".tmp-step-000020" in names(store)
    with pytest.raises(ValueError, match="read only"):
        reader.begin(30)
    assert store.latest_valid() == store.folder / "step-000010"
    assert names(store) == ["latest", "step-000010"]


def test_state_that_json_would_change_is_refused(store: CheckpointStore) -> None:
    save(store, 10)
    for bad in ({"a": {1: "x"}}, {"a": object()}):
        store.begin(20)
        with pytest.raises(TypeError):
            store.commit(20, bad)
    assert store.latest_valid() == store.folder / "step-000010"
    assert names(store) == ["latest", "step-000010"]


def test_unreadable_state_is_a_clear_error(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"state\.json"):
        store.read(tmp_path / "nowhere")


class FullDisk:
    """Lets the first `calls` writing calls through, then the disk is full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        self.hit = False
        for module, name in [
            (os, "fsync"),
            (os, "rename"),
            (os, "replace"),
            (os, "symlink"),
            (os, "mkdir"),
        ]:
            monkeypatch.setattr(module, name, self.limited(getattr(module, name)))
        real_open = builtins.open
        opened = self.limited(real_open)
        monkeypatch.setattr(
            builtins,
            "open",
            lambda *a, **k: (opened if "w" in (a[1] if len(a) > 1 else "r") else real_open)(*a, **k),
        )

    def limited(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                self.hit = True
                raise OSError(28, "No space left on device")
            self.left -= 1
            return real(*arguments, **options)

        return call


@pytest.mark.parametrize("step", [20, 10], ids=["new", "same step again"])
def test_a_full_disk_at_any_point_leaves_a_good_one(tmp_path: Path, step: int) -> None:
    failures = 0
    for calls in range(100):
        store = CheckpointStore(tmp_path / f"{step}-{calls}", keep=2, warn=lambda text: None)
        save(store, 10)
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, calls)
            try:
                save(store, step)
                saved = True
            except OSError:
                saved = False
                failures += 1
        # The space is given back at once, and the next attempt works.
        assert not [name for name in names(store) if name.startswith(".tmp-step")]
        latest = store.latest_valid()
        assert latest is not None and verify(latest) is None
        assert store.read(latest)["step"] == (step if saved else 10) or latest.name == f"step-{step:06d}"
        assert save(store, 30) == store.latest_valid()
        if not disk.hit:
            break
    else:
        pytest.fail("the disk was full to the end")
    assert failures > 10


WRITER = """
import sys
from pathlib import Path
from rairl_ray.checkpoint import CheckpointStore
store = CheckpointStore(sys.argv[1], keep=2, warn=lambda text: print("broken", text, flush=True))
latest = store.latest_valid()
step = store.read(latest)["step"] if latest else 0
print("resumed", step, flush=True)
while True:
    step += 1
    for _ in range(2):  # the second one replaces the first
        folder = store.begin(step)
        for part in ("policy", "discriminator"):
            (folder / part / "shard.bin").write_bytes(b"%d" % step * 50_000)
        store.commit(step, {"step": step})
        print("saved", step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_the_last_one(tmp_path: Path) -> None:
    moments = random.Random(0)
    last_saved = 0
    for _ in range(15):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        line = writer.stdout.readline()
        assert line.startswith("resumed"), line
        assert int(line.split()[1]) >= last_saved
        time.sleep(moments.uniform(0.0, 0.15))
        writer.send_signal(signal.SIGKILL)
        for line in writer.communicate()[0].splitlines():
            assert not line.startswith("broken"), line
            if line.startswith("saved ") and line.endswith(tuple("0123456789")):
                last_saved = max(last_saved, int(line.split()[1]))
    assert last_saved > 5
    reader = CheckpointStore(tmp_path, warn=pytest.fail)
    latest = CheckpointStore(tmp_path, keep=2, warn=pytest.fail).latest_valid()
    assert latest is not None and reader.read(latest)["step"] >= last_saved
    assert (latest / "policy/shard.bin").read_bytes() == str(reader.read(latest)["step"]).encode() * 50_000
    assert json.loads((latest / "manifest.json").read_text())["step"] == reader.read(latest)["step"]
