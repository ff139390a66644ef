"""Checkpoints: whatever happens while one is written, the last good one stays good."""

from __future__ import annotations

import builtins
import hashlib
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

from rairl_ray.checkpoint import CheckpointStore, Identity, verify
from rairl_ray.errors import ResumeError
from rairl_ray.types import Written

ROOT = Path(__file__).resolve().parents[2]
IDENTITY = Identity("abc", "def", "run", {"policy": {"path": "model", "content": "sha256:0"}})


def write_shard(folder: Path, content: bytes) -> Written:
    """What a learner rank does in its thread, in the foreground."""
    folder.mkdir()
    with open(folder / "shard-0.bin", "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    facts = {"shard-0.bin": {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    return Written(facts, {"weights": ("shard-0.bin",), "optimizer": ("shard-0.bin",)}, 0.5)


def save(store: CheckpointStore, step: int, identity: Identity = IDENTITY) -> Path:
    draft = store.begin(step, {"progress": {"step": step}, "replay": {"traces": [1.5, None, "ä"]}})
    try:
        written = {
            role: write_shard(draft.folder / role, f"{role} {step}".encode() * 100)
            for role in ("policy", "discriminator")
        }
    except OSError:
        store.abort(draft)
        raise
    return store.commit(draft, written, {"policy": step, "discriminator": step + 5}, identity)


def step_of(store: CheckpointStore, path: Path) -> int:
    return int(store.read(path)["progress"]["step"])


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
    path = save(store, 20)
    assert path == tmp_path / "checkpoints" / "step-000020" == store.latest_valid()
    assert store.read(path) == {"progress": {"step": 20}, "replay": {"traces": [1.5, None, "ä"]}}
    manifest = store.manifest(path)
    assert manifest["step"] == 20 and manifest["versions"] == {"policy": 20, "discriminator": 25}
    assert {key: manifest[key] for key in vars(IDENTITY)} == vars(IDENTITY)
    assert os.readlink(store.folder / "latest") == "step-000020"


def test_the_manifest_names_every_part_with_the_checksum_of_its_files(store: CheckpointStore) -> None:
    path = save(store, 20)
    manifest = store.manifest(path)
    assert set(manifest["parts"]) == {
        "policy/weights", "policy/optimizer", "discriminator/weights", "discriminator/optimizer",
        "trainer/progress", "trainer/replay",
    }  # fmt: skip
    on_disk = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    named = {name for files in manifest["parts"].values() for name in files}
    assert named == set(manifest["files"]) == on_disk - {"manifest.json"}
    for files in manifest["parts"].values():
        for name, checksum in files.items():
            assert checksum == hashlib.sha256((path / name).read_bytes()).hexdigest()


def test_what_the_ranks_have_hashed_is_not_read_again(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizers are large; only sizes are looked at when a checkpoint is committed."""
    draft = store.begin(10, {"progress": {}})
    written = {"policy": write_shard(draft.folder / "policy", b"x" * 1000)}
    (draft.folder / "policy" / "shard-0.bin").chmod(0)
    opened: list[str] = []
    real_open = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: (opened.append(str(a[0])), real_open(*a, **k))[1])
    store.commit(draft, written, {}, IDENTITY)
    assert opened and not [name for name in opened if name.endswith("shard-0.bin")]


@pytest.mark.parametrize(
    "spoil", [lambda p: p.unlink(), lambda p: p.write_bytes(b"short")], ids=["lost", "cut"]
)
def test_a_shard_that_is_not_whole_is_never_committed(
    store: CheckpointStore, spoil: Callable[[Path], Any]
) -> None:
    save(store, 10)
    draft = store.begin(20, {"progress": {"step": 20}})
    written = {"policy": write_shard(draft.folder / "policy", b"x" * 1000)}
    spoil(draft.folder / "policy" / "shard-0.bin")
    with pytest.raises(OSError, match=r"shard-0\.bin"):
        store.commit(draft, written, {}, IDENTITY)
    assert names(store) == ["latest", "step-000010"]


def test_a_checkpoint_that_was_just_verified_is_not_read_again(store: CheckpointStore) -> None:
    path = save(store, 10)
    (path / "policy/shard-0.bin").write_bytes(b"spoilt")
    assert store.latest_valid(verified=path) == path
    assert store.latest_valid() is None


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


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "policy/shard-0.bin").write_bytes(b"x" * 900), "checksum"),
        (lambda path: (path / "policy/shard-0.bin").write_bytes(b"x"), "bytes"),
        (lambda path: (path / "discriminator/shard-0.bin").unlink(), "missing"),
        (lambda path: flip_a_bit(path / "discriminator/shard-0.bin"), "checksum"),
        (lambda path: os.truncate(path / "policy/shard-0.bin", 899), "bytes"),
        (lambda path: (path / "trainer/replay.json").write_text("{}"), "replay.json"),
        (lambda path: (path / "manifest.json").unlink(), "manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": {"a'), "manifest"),
        (lambda path: (path / "manifest.json").write_text('{"files": {}}'), "state of the trainer"),
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
    one, other = store.begin(20, {}), store.begin(20, {})
    assert one.folder != other.folder, "a rank of an earlier attempt may still write into its folder"
    reader = CheckpointStore(tmp_path)
    assert reader.latest_valid() == store.folder / "step-000010"
    assert one.folder.name in names(store)
    with pytest.raises(ValueError, match="read only"):
        reader.begin(30, {})
    assert store.latest_valid() == store.folder / "step-000010"
    assert names(store) == ["latest", "step-000010"]


def test_state_that_json_would_change_is_refused(store: CheckpointStore) -> None:
    save(store, 10)
    for bad in ({"a": {1: "x"}}, {"a": object()}):
        with pytest.raises(TypeError):
            store.begin(20, bad)
    assert store.latest_valid() == store.folder / "step-000010"
    assert names(store) == ["latest", "step-000010"]


def test_unreadable_state_is_a_clear_error(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match=r"manifest\.json"):
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
        assert step_of(store, latest) == (step if saved else 10) or latest.name == f"step-{step:06d}"
        assert save(store, 30) == store.latest_valid()
        if not disk.hit:
            break
    else:
        pytest.fail("the disk was full to the end")
    assert failures > 10


WRITER = """
import sys
from rairl_ray.checkpoint import CheckpointStore
from tests.trainer.test_checkpoint import IDENTITY, step_of, write_shard
store = CheckpointStore(sys.argv[1], keep=2, warn=lambda text: print("broken", text, flush=True))
latest = store.latest_valid()
step = step_of(store, latest) if latest else 0
print("resumed", step, flush=True)
while True:
    step += 1
    for _ in range(2):  # the second one replaces the first
        draft = store.begin(step, {"progress": {"step": step}})
        roles = ("policy", "discriminator")
        written = {role: write_shard(draft.folder / role, b"%d" % step * 50_000) for role in roles}
        store.commit(draft, written, {}, IDENTITY)
        print("saved", step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_the_last_one(tmp_path: Path) -> None:
    moments = random.Random(0)
    last_saved = 0
    for _ in range(15):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
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
    assert latest is not None and step_of(reader, latest) >= last_saved
    assert (latest / "policy/shard-0.bin").read_bytes() == str(step_of(reader, latest)).encode() * 50_000
    assert json.loads((latest / "manifest.json").read_text())["step"] == step_of(reader, latest)
