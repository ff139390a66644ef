"""Questions to a head that is away: they hold no step, no notice is lost, and who cannot go on says so."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rairl_ray.actors import draining, process_monitor
from rairl_ray.actors import group as groups
from rairl_ray.actors import head as heads
from rairl_ray.actors import pool as pools
from rairl_ray.actors.draining import Drained, draining_nodes
from rairl_ray.actors.head import Head, HeadAway, Stranded
from rairl_ray.actors.placement import Node, PlacementPlan
from rairl_ray.actors.process_monitor import ActorProcess, ProcessMonitor
from rairl_ray.errors import RunFailure
from rairl_ray.trainer import rl_trainer
from rairl_ray.trainer.recovery import Recovery
from rairl_ray.trainer.rl_trainer import RLTrainer
from tests.actors.test_deadlines import attempts, failing_context
from tests.actors.test_rollout_pool import pool_of

SOON, LONG = 0.05, 60.0


class Away:
    """A head that answers `nodes` are being drained, once it is back; `patience` of those who ask."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *nodes: str) -> None:
        self.nodes, self.back, self.asked, self.patience = nodes, threading.Event(), 0, SOON
        self.head = Head()
        monkeypatch.setattr(draining, "_noticed", set())
        monkeypatch.setattr(ray._private.state.state, "get_draining_nodes", self.answer)
        for module in (draining, pools):
            monkeypatch.setattr(module, "ask", self.ask)

    def ask(self, question: Callable[[], Any]) -> Any:
        return self.head.ask(question, self.patience)

    def answer(self) -> dict[str, int]:
        self.asked += 1
        self.back.wait(LONG)
        return dict.fromkeys(self.nodes, 0)

    def returns(self) -> None:
        self.patience = LONG
        self.back.set()


def test_one_question_is_open_at_a_time_and_the_notice_is_heard_when_the_head_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head = Away(monkeypatch, "a")
    assert draining_nodes() == draining_nodes() == set() and head.asked == 1
    head.returns()
    assert draining_nodes() == {"a"} and head.asked == 2


def test_a_question_that_hangs_does_not_hold_the_step_and_no_drain_notice_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, monitor = Away(monkeypatch, "a", "b"), ProcessMonitor(1.0)
    monitor.add(ActorProcess("policy", 0, None, node_id="b"))
    run: Any = RLTrainer.__new__(RLTrainer)
    saved: list[int] = []
    run.workers, run.progress = SimpleNamespace(monitor=monitor), SimpleNamespace(step=7)
    run.rollout_pool, _, _ = pool_of(1, {"min": 1, "max": 2})
    run._save_this_moment = lambda: saved.append(1)
    run._leave_drained_nodes()
    run.rollout_pool.grow()
    assert not saved and head.asked == 1
    head.returns()
    with pytest.raises(Drained, match="node b is being drained: saved after step 7"):
        run._leave_drained_nodes()
    assert saved == [1]


def test_what_a_question_raises_comes_out_and_the_next_one_is_put() -> None:
    head = Head()
    with pytest.raises(ZeroDivisionError):
        head.ask(lambda: 1 // 0, LONG)
    assert head.ask(lambda: None, LONG) is None
    with pytest.raises(HeadAway):
        head.ask(threading.Event().wait, SOON)


def test_no_replica_begins_on_a_node_whose_notice_went_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drained node ends once it is idle, and Ray then no longer counts it among those that it drains."""
    head = Away(monkeypatch, "going")
    head.returns()
    free = {"going": Node({"CPU": 4.0}, {})}
    monkeypatch.setattr(pools, "free_nodes", lambda: free)
    monkeypatch.setattr(pools, "placement_group", lambda *_, **__: None)
    pool, workers, _ = pool_of(1, {"min": 1, "max": 2})
    begun: list[str] = []
    monkeypatch.setattr(pool, "_open", lambda place, node: begun.append(node))
    monkeypatch.setattr(pool, "_vacant", list)
    pool.leave_drained()
    head.nodes = ()
    pool.grow()
    assert begun == []
    free["new"] = Node({"CPU": 0.5}, {})
    pool.grow()
    assert begun == ["new"] and len(workers) == 1


# --- drivers that can no longer go on ----------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Head]:
    """A head that will never answer, which Ray would bear for a tenth of a second; it has been asked once."""
    monkeypatch.setenv(heads.RAYS_BOUND, "0.1")
    own, back = Head(), threading.Event()
    for module, name in ((process_monitor, "ask"), (process_monitor, "insist"), (groups, "insist")):
        monkeypatch.setattr(module, name, getattr(own, name))
    monkeypatch.setattr(heads, "insist", own.insist)
    with pytest.raises(HeadAway):
        own.ask(lambda: back.wait(LONG), 2 * heads.patience())
    yield own
    back.set()


def test_a_driver_gives_up_before_ray_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(heads.RAYS_BOUND, raising=False)
    assert heads.patience() == 50
    monkeypatch.setenv(heads.RAYS_BOUND, "600")
    assert heads.patience() == 590


def test_a_run_saves_and_ends_once_its_head_was_silent_for_too_long(
    silent: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    run: Any = RLTrainer.__new__(RLTrainer)
    run.workers, run.progress = SimpleNamespace(monitor=ProcessMonitor(1.0)), SimpleNamespace(step=7)
    run.rollout_pool = SimpleNamespace(leave_drained=lambda: None)
    run._save_this_moment = lambda: saved.append(1)
    monkeypatch.setattr(process_monitor, "draining_nodes", set)
    run._leave_drained_nodes()  # another head, which nobody has asked
    assert not saved
    monkeypatch.setattr(rl_trainer, "check_silence", silent.check_silence)
    with pytest.raises(Stranded, match=r"has not answered for 0\.05 s: saved after step 7"):
        run._leave_drained_nodes()
    assert saved == [1]


def test_a_failure_and_an_end_without_a_head_ask_nobody_any_more(
    silent: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_monitor, "check_own", lambda: None)
    monitor = ProcessMonitor(1.0)
    actor = ActorProcess("rollout", 0, None)
    monitor.add(actor)
    with pytest.raises(Stranded, match=r"has not answered .*; first seen as: it raised"):
        groups.attribute_failure("it raised", actor, monitor, "generate", 3, 0.0, own=True)
    [left] = monitor.end(LONG)
    assert "the cluster's head does not answer" in left


class Waiting:
    """A placement group that is never granted."""

    def __init__(self) -> None:
        self.looks = 0

    def wait(self, timeout_seconds: float) -> bool:
        self.looks += 1
        return False


def test_bundles_are_not_waited_for_by_a_driver_whose_node_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    group, ended = Waiting(), iter([False, False, False, True])
    monkeypatch.setattr(groups, "placement_group", lambda *_, **__: group)
    monkeypatch.setattr(heads, "own_node_ended", lambda: next(ended))
    monkeypatch.setattr(heads, "living_nodes", lambda: {"own"})
    context = SimpleNamespace(get_node_id=lambda: "own")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    plan = PlacementPlan(({"CPU": 1.0},), "PACK", {}, "cpu")
    with pytest.raises(Stranded, match="processes of this driver's node have ended"):
        groups.reserve(plan, 300)
    assert group.looks == 3
    context.get_node_id = lambda: "another"
    monkeypatch.setattr(heads, "own_node_ended", lambda: False)
    with pytest.raises(Stranded, match="holds this driver's node for dead"):
        groups.reserve(plan, 300)


def test_new_actors_are_not_waited_for_either(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[int] = []

    def wait(refs: list[object], **_: object) -> tuple[list[object], list[object]]:
        waits.append(1)
        return [], refs

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(heads, "ANEW_SECONDS", 0.0)
    monkeypatch.setattr(heads, "own_node_ended", lambda: bool(waits))
    monkeypatch.setattr(heads, "insist", lambda _question: {"own"})
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "own"))
    handle = SimpleNamespace(whereabouts=SimpleNamespace(remote=object))
    created = {"policy": [ActorProcess("policy", 0, handle)]}
    with pytest.raises(Stranded, match="processes of this driver's node have ended"):
        groups.start_processes(created, ProcessMonitor(1.0), 600)
    assert waits == [1]


def test_a_node_has_ended_when_nothing_listens_where_its_raylet_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "raylet"
    monkeypatch.setattr(
        ray._private.worker.global_worker, "node", SimpleNamespace(raylet_socket_name=str(path))
    )
    assert heads.own_node_ended()
    with socket.socket(socket.AF_UNIX) as raylet:
        raylet.bind(str(path))
        raylet.listen(1)
        assert not heads.own_node_ended()  # it does not accept, but it is there
    assert heads.own_node_ended()
    monkeypatch.setattr(ray._private.worker.global_worker, "node", None)
    assert not heads.own_node_ended()


def test_a_stranded_driver_rebuilds_nothing_and_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    context, said = failing_context(monkeypatch, retries=5)
    begun: list[int] = []

    def body(_tries: Recovery) -> bool:
        begun.append(1)
        raise Stranded("the Ray processes of this driver's node have ended")

    with pytest.raises(RunFailure, match=r"have ended; when the cluster answers, go on with --resume run$"):
        attempts(context, body)
    assert begun == [1] and not said
