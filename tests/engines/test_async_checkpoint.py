"""Checkpoints that are written beside training: true copies, one at a time, and disks that fail for real."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from rairl_ray import metrics as names
from rairl_ray.actors.learner import merged
from rairl_ray.checkpoint import CheckpointStore, Identity, verify
from rairl_ray.engines.async_writer import AsyncWriter, snapshot
from rairl_ray.errors import RunFailure
from rairl_ray.trainer.async_checkpointer import AsyncCheckpointer
from rairl_ray.types import Written

ROOT = Path(__file__).resolve().parents[2]


# --- the copy --------------------------------------------------------------------------------------


def test_a_snapshot_does_not_change_with_what_it_was_taken_from() -> None:
    weight = torch.ones(3, requires_grad=True)
    state = {
        "module": OrderedDict(w=weight),
        "steps": [torch.zeros(2)],
        "pair": (torch.zeros(1), 5),
        "lr": {"a": [1]},
    }
    copied = snapshot(state)
    with torch.no_grad():
        weight.add_(1)
    state["steps"][0].add_(1)
    state["pair"][0].add_(1)
    state["lr"]["a"].append(2)
    assert copied["module"]["w"].tolist() == [1, 1, 1] and not copied["module"]["w"].requires_grad
    assert (
        copied["steps"][0].tolist() == [0, 0]
        and copied["pair"][0].tolist() == [0]
        and copied["lr"] == {"a": [1]}
    )
    assert type(copied["module"]) is OrderedDict


def test_a_snapshot_keeps_tied_weights_one_and_copies_no_more_than_a_view(tmp_path: Path) -> None:
    flat = torch.arange(1000.0)
    copied = snapshot({"embed": flat[:10], "head": flat[:10], "other": flat[10:20], "empty": torch.empty(0)})
    assert copied["embed"] is copied["head"] and copied["other"].tolist() == list(range(10, 20))
    assert copied["embed"].untyped_storage().nbytes() == 40
    assert copied["empty"].numel() == 0


# --- the write -------------------------------------------------------------------------------------


def test_a_write_reports_what_it_meant_to_write(tmp_path: Path) -> None:
    writer = AsyncWriter()
    writer.start(
        tmp_path / "policy", {"state/a.pt": {"w": torch.arange(5)}, "b.json": b"{}"}, {"weights": ("a",)}
    )
    written = writer.result(wait=True)
    assert written is not None and written.error is None and written.parts == {"weights": ("a",)}
    for name, facts in written.files.items():
        content = (tmp_path / "policy" / name).read_bytes()
        assert facts == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert torch.load(tmp_path / "policy" / "state" / "a.pt")["w"].tolist() == [0, 1, 2, 3, 4]


class Held:
    """Something that cannot be written before its gate is open."""

    def __init__(self, gate: threading.Event) -> None:
        self.gate = gate

    def __reduce__(self) -> Any:
        assert self.gate.wait(60)
        return (str, ())


def test_one_write_at_a_time_and_looking_does_not_wait(tmp_path: Path) -> None:
    gate, writer = threading.Event(), AsyncWriter()
    writer.start(tmp_path, {"a": Held(gate)}, {})
    assert writer.result(wait=False) is None
    with pytest.raises(RuntimeError, match="still on"):
        writer.start(tmp_path, {"a": b""}, {})
    gate.set()
    assert writer.result(wait=True) is not None


def test_what_is_no_disk_fault_is_raised(tmp_path: Path) -> None:
    writer = AsyncWriter()
    writer.start(tmp_path, {"a": threading.Lock()}, {})
    with pytest.raises(TypeError):
        writer.result(wait=True)


def test_a_failing_rank_fails_its_learner() -> None:
    good = Written({"a": {"size": 1, "sha256": ""}}, {"weights": ("a",)}, 1.0)
    both = merged([good, Written({"b": {"size": 2, "sha256": ""}}, {"weights": ("b",)}, 2.0)])
    assert set(both.files) == {"a", "b"} and both.parts == {"weights": ("a", "b")} and both.seconds == 2.0
    assert merged([good, Written({}, {}, 0.5, "disk")]) == Written({}, {"weights": ("a",)}, 1.0, "disk")


# --- the driver ------------------------------------------------------------------------------------


class Learner:
    """The writing half of a learner group: real files of real threads, without a model."""

    version = 3

    def __init__(self) -> None:
        self.writer, self.gate = AsyncWriter(), threading.Event()
        self.gate.set()
        self.numbers = 1000

    def save(self, folder: Path) -> None:
        files = {"state.pt": [torch.zeros(self.numbers), Held(self.gate)]}
        self.writer.start(folder, files, {"weights": ("state.pt",)})

    def written(self, wait: bool) -> Written | None:
        return self.writer.result(wait)


class Bench:
    def __init__(self, root: Path) -> None:
        self.learner, self.events = Learner(), list[str]()
        self.store = CheckpointStore(root, keep=2, warn=self.events.append)
        context = SimpleNamespace(
            store=self.store,
            identity=lambda: Identity("hash", "code", None),
            event=self.events.append,
        )
        self.checkpointer = AsyncCheckpointer(cast(Any, context), {"policy": cast(Any, self.learner)})

    def start(self, step: int) -> None:
        self.checkpointer.start(step, {"progress": {"step": step}})

    @property
    def newest(self) -> str | None:
        path = self.store.latest_valid()
        return path and path.name


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_checkpoint_counts_only_when_all_is_written_and_polling_does_not_wait(bench: Bench) -> None:
    bench.learner.gate.clear()
    bench.start(10)
    bench.checkpointer.poll()
    assert bench.checkpointer.take_metrics() == {} and not list(bench.store.folder.glob("step-*"))
    bench.learner.gate.set()
    bench.checkpointer.finish()
    assert bench.newest == "step-000010"
    metrics = bench.checkpointer.take_metrics()
    assert metrics[names.CHECKPOINT_WRITE_SECONDS] > 0 and metrics[names.CHECKPOINT_BYTES] > 4000
    assert bench.store.manifest(bench.store.folder / "step-000010")["versions"] == {"policy": 3}
    bench.checkpointer.poll()
    assert bench.checkpointer.take_metrics() == {}


def test_the_next_one_waits_for_the_last_one(bench: Bench) -> None:
    bench.learner.gate.clear()
    bench.start(10)
    threading.Timer(0.3, bench.learner.gate.set).start()
    bench.start(20)
    assert bench.checkpointer.take_metrics() and (bench.store.folder / "step-000010").is_dir()
    bench.checkpointer.require()
    assert bench.newest == "step-000020"


def test_a_lost_folder_costs_that_checkpoint_and_no_other(bench: Bench) -> None:
    bench.start(10)
    bench.checkpointer.finish()
    bench.learner.gate.clear()
    bench.start(20)
    while not (writing := list(bench.store.folder.glob(".tmp-step-000020-*/policy/state.pt"))):
        time.sleep(0.01)
    shutil.rmtree(writing[0].parents[1])
    bench.learner.gate.set()
    bench.checkpointer.finish()
    assert len(bench.events) == 1 and "checkpoint of step 20 could not be written" in bench.events[0]
    assert [path.name for path in bench.store.folder.glob("step-*")] == ["step-000010"]
    shutil.rmtree(bench.store.folder)
    bench.start(30)
    bench.checkpointer.require()
    assert bench.newest == "step-000030"


def test_a_failure_at_the_end_is_an_error_and_a_later_success_is_not(bench: Bench) -> None:
    bench.store.folder.parent.mkdir(exist_ok=True)
    bench.store.folder.touch()  # a file where the folder should be
    bench.start(10)
    with pytest.raises(RunFailure, match="checkpoint of step 10 could not be written"):
        bench.checkpointer.require()
    bench.store.folder.unlink()
    bench.start(20)
    bench.checkpointer.require()
    assert bench.newest == "step-000020"


# --- a full disk -----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True
    ).returncode:
        pytest.skip("only root may mount a small disk; the test with a file size limit covers the rest")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint_and_gives_its_space_back(small_disk: Path) -> None:
    bench = Bench(small_disk)
    bench.start(10)
    bench.checkpointer.finish()
    bench.learner.numbers = 1_000_000  # 4 MB
    bench.start(20)
    bench.checkpointer.finish()
    assert "No space left on device" in bench.events[0] and "state.pt" in bench.events[0]
    assert bench.newest == "step-000010" and verify(bench.store.folder / "step-000010") is None
    bench.learner.numbers = 100_000
    bench.start(30)
    bench.checkpointer.require()
    assert bench.newest == "step-000030"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 5000))
    bench.start(40)
    with pytest.raises(RunFailure, match="No space left on device"):
        bench.checkpointer.require()
    assert bench.newest == "step-000030"


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from rairl_ray.engines.async_writer import AsyncWriter
writer, folder = AsyncWriter(), Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
writer.start(folder, {"a": [torch.zeros(1_000_000) for _ in range(3)], "b": b"small"}, {})
print(writer.result(wait=True).error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
writer.start(folder, {"a": [torch.zeros(1_000_000)], "b": b"small"}, {})
print(writer.result(wait=True).error, sorted(path.name for path in folder.iterdir()))
"""


def test_a_disk_that_refuses_in_the_middle_of_a_file_is_a_value_and_the_process_lives(tmp_path: Path) -> None:
    """The kernel refuses inside torch.save's C++ code, which no exception may cross."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{tmp_path / 'a'}: File too large", "None ['a', 'b']"]
