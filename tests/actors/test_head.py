"""Questions to a head that is away: they hold no step, and what it has to say is heard when it is back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rairl_ray.actors import draining
from rairl_ray.actors import pool as pools
from rairl_ray.actors.draining import Drained, draining_nodes
from rairl_ray.actors.head import Head, HeadAway
from rairl_ray.actors.placement import Node
from rairl_ray.actors.process_monitor import ActorProcess, ProcessMonitor
from rairl_ray.trainer.rl_trainer import RLTrainer
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
