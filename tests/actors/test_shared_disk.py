"""Nodes that do not see a job's files: one line before anything is computed, whatever the job is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray

from rairl_ray import files
from rairl_ray.actors import chunks
from rairl_ray.actors.chunks import Pool, map_file, split
from rairl_ray.actors.process_monitor import ActorProcess, ProcessMonitor
from rairl_ray.actors.shared_disk import check_shared, require_shared
from rairl_ray.errors import PlacementError, UserError
from rairl_ray.files import planted, unseen
from tests.actors.test_chunks import Doubled, numbers
from tests.finished import finished_run
from tests.local_cluster import refused_apart, separate_nodes
from tests.runs import ROOT, TINY, TINY_AIRL
from tests.small_actor import SmallActor
from tests.sweeps import written

SECONDS = 60.0


@pytest.fixture(scope="module")
def actor() -> Iterator[ActorProcess]:
    """An actor process that is said to live on another node than the driver."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    handle = ray.remote(SmallActor).options(num_cpus=0).remote(0)
    yield ActorProcess("policy", 0, handle, "10.0.0.7", 1, "another node")
    ray.shutdown()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SEEN_SECONDS", 0.0)


def watched(actor: ActorProcess) -> ProcessMonitor:
    monitor = ProcessMonitor(probe_seconds=30)
    monitor.add(actor)
    return monitor


def test_what_is_planted_is_new_and_gone_afterwards(tmp_path: Path) -> None:
    (tmp_path / f"{files.SIGN}of-a-killed-process").touch()
    with planted(tmp_path) as first:
        assert [*tmp_path.iterdir()] == [first] and unseen([first]) == []
        require_shared(first)
    assert [*tmp_path.iterdir()] == []
    with planted(tmp_path) as second:
        assert second != first


def test_a_file_that_comes_late_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    late = tmp_path / "late"
    monkeypatch.setattr(files.time, "sleep", lambda _seconds: late.touch())
    assert unseen([late, tmp_path]) == []


def test_a_node_without_the_runs_folder_is_named(actor: ActorProcess, tmp_path: Path) -> None:
    """Its actor looks for a file that was never planted, as one on another disk would."""
    with pytest.raises(PlacementError) as told:
        check_shared(
            watched(actor), tmp_path / ".seen-elsewhere", {"model.policy.path": str(tmp_path)}, SECONDS
        )
    assert str(told.value).startswith(f"output_dir: node 10.0.0.7 does not see {tmp_path};")


def test_a_node_with_all_files_is_good(actor: ActorProcess, tmp_path: Path) -> None:
    with planted(tmp_path) as sign:
        check_shared(watched(actor), sign, {"model.policy.path": str(tmp_path)}, SECONDS)
        check_shared(watched(actor), sign, {"model.policy.path": "some/id-of-the-hub"}, SECONDS)
        check_shared(ProcessMonitor(probe_seconds=30), sign, {}, SECONDS)


def test_the_drivers_own_node_is_not_asked(actor: ActorProcess, tmp_path: Path) -> None:
    here = ActorProcess("policy", 0, actor.handle, "here", 1, ray.get_runtime_context().get_node_id())
    check_shared(watched(here), tmp_path / ".seen-elsewhere", {}, SECONDS)


def test_a_verbs_file_that_is_not_there_is_one_line(impatient: None, tmp_path: Path) -> None:
    with (
        planted(tmp_path) as sign,
        pytest.raises(PlacementError, match=r"file: node .* does not see .*rows\.jsonl"),
    ):
        require_shared(sign, tmp_path / "rows.jsonl")
    with pytest.raises(PlacementError, match=f"output_dir: node .* does not see {tmp_path};"):
        require_shared(sign)


def test_a_pool_on_another_disk_says_so(
    tmp_path: Path, actor: ActorProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool's actors are told of a sign that the driver has not planted where they look."""
    source = numbers(tmp_path, 4)
    monkeypatch.setattr(chunks, "planted", lambda _parts: nullcontext(tmp_path / ".seen-elsewhere"))
    with pytest.raises(UserError, match="does not see"):
        map_file(source, split(source, 2), tmp_path / "parts", Doubled, {}, Pool(actors=1, cpus=0.5))


# --- real nodes with a disk of their own ---------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(bool(refused_apart()), reason=refused_apart())
def test_nodes_with_a_disk_of_their_own_refuse_every_job(tmp_path: Path) -> None:
    """Head and worker have an empty disk where the driver has its results (a mount namespace of their own)."""
    own = tmp_path / "own"
    own.mkdir()
    finished_run(own, "done")
    rows = own / "rows.jsonl"
    rows.write_text('{"question": "1 + 1?", "completion": "<think>\\n1+1=2\\n</think>\\n\\n2"}\n')
    sweep = written(tmp_path, output_dir=str(own), base=str(ROOT / "experiments/demo/sft.yaml"))
    with separate_nodes(1, "--cpus", "2", apart=own) as nodes:
        told = {}
        settings = [f"output_dir={own}", f"cluster.address={nodes.address}", "tracking.uri=none"]
        for name, words in {
            "train airl": ["experiments/demo/airl.yaml", *TINY_AIRL, "warm_start=null"],
            "train sft": ["experiments/demo/sft.yaml", *TINY],
            "evaluate": ["done", *TINY],
            "score": ["done", str(rows), f"--output={tmp_path}/scored.jsonl"],
        }.items():
            verb = name.partition(" ")[0]
            done = nodes.launch(verb, *words, *settings)
            told[name] = done.stderr.strip().splitlines()[-1:]
            assert done.returncode == 2, (name, done.stdout, done.stderr)
        done = nodes.launch("sweep", sweep, f"address={nodes.address}")
        said = (done.stdout + done.stderr).splitlines()
        told["sweep"] = [line for line in said if "does not see" in line][-1:]
        assert done.returncode == 1, said
    print(told)
    assert all(len(line) == 1 and f"does not see {own}" in line[0] for line in told.values()), told
