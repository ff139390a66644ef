"""No wait without an end: deadlines, culprits, teardown, budgets, a stopped process of each role in a real run.

The whole matrix of roles and phases is in test_deadlines_slow.py.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rairl_ray.actors.draining import Drained
from rairl_ray.actors.group import (
    ActorGroup,
    GroupFailure,
    create_processes,
    pause_after,
    reserve,
    start_processes,
)
from rairl_ray.actors.placement import PlacementPlan, Slot
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.errors import DataError, PlacementError, RunFailure
from rairl_ray.files import read_json_lines
from rairl_ray.trainer import recovery
from rairl_ray.trainer.run import train
from rairl_ray.trainer.run_context import StopRequest
from tests.faults import (
    Fault,
    assert_nothing_left,
    configuration,
    events,
    marked_processes,
    plant,
    steps,
)
from tests.small_actor import SmallActor


@pytest.fixture(scope="module", autouse=True)
def own_cluster() -> Iterator[None]:
    """One private Ray for the module; the runs join it, so that what they leave behind can be seen."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


# --- a group of small actors --------------------------------------------------------------------------


@pytest.fixture
def group() -> Iterator[ActorGroup]:
    plan = PlacementPlan(
        ({"CPU": 0.5},), "PACK", {"tester": (Slot(0, {"CPU": 0.1}), Slot(0, {"CPU": 0.1}))}, "cpu"
    )
    monitor = ProcessMonitor(probe_seconds=60)
    monitor.groups.append(reserve(plan, 30))
    processes = start_processes(
        {"tester": create_processes("tester", SmallActor, plan, monitor, {}, ())}, monitor, deadline_seconds=300
    )
    yield ActorGroup("tester", processes["tester"], monitor)
    assert monitor.end(60) == []
    assert_nothing_left()


def test_a_call_has_its_whole_deadline_once_the_calls_before_it_have_ended(group: ActorGroup) -> None:
    first = group.submit("first", 30, lambda actor, _rank: actor.nap.remote(2.0))
    second = group.submit("second", 1.5, lambda actor, _rank: actor.nap.remote(0.0))
    assert group.wait(second) == [0, 1]
    assert group.wait(first) == [0, 1]
    assert group.call("alone", 30, lambda actor, _rank: actor.nap.remote(0.0), ranks=1) == [0]


def test_a_late_driver_still_finds_what_was_ready_and_an_earlier_failure_is_the_earlier_calls(
    group: ActorGroup,
) -> None:
    ready = group.submit("ready", 0.2, lambda actor, _rank: actor.nap.remote(0.0))
    time.sleep(1.0)
    assert group.wait(ready) == [0, 1]
    group.submit("early", 30, lambda actor, _rank: actor.fail.remote(RuntimeError("no\nluck")))
    with pytest.raises(GroupFailure, match=r"phase early.*RuntimeError: no luck") as failure:
        group.wait(group.submit("late", 30, lambda actor, _rank: actor.nap.remote(0.0)))
    assert "\n" not in str(failure.value)


def test_a_stopped_rank_is_told_from_one_that_waits_for_it(group: ActorGroup) -> None:
    group.last_step = 7
    verbs = [lambda actor: actor.nap.remote(60), lambda actor: actor.signal_self.remote(signal.SIGSTOP)]
    with pytest.raises(GroupFailure) as caught:
        group.call("update", 2, lambda actor, rank: verbs[rank](actor))
    failure = pickle.loads(pickle.dumps(caught.value))
    found = (failure.role, failure.rank, failure.node, failure.phase, failure.last_step)
    assert found == ("tester", 1, group.processes[1].node, "update", 7)
    assert 2 <= failure.waited_seconds < 2 + 60 + 5
    text = str(failure)
    assert text.startswith("tester rank 1 (node ") and "is stopped" in text
    assert "no answer within 2 s in phase update (last finished step 7)" in text
    assert text.endswith("Processes: tester rank 0 running, tester rank 1 stopped")


def test_a_killed_rank_is_seen_at_once(group: ActorGroup) -> None:
    verbs = [lambda actor: actor.nap.remote(60), lambda actor: actor.signal_self.remote(signal.SIGKILL)]
    started = time.monotonic()
    with pytest.raises(GroupFailure, match="tester rank 1 gone") as caught:
        group.call("update", 300, lambda actor, rank: verbs[rank](actor))
    assert caught.value.rank == 1
    assert time.monotonic() - started < 60


def test_an_error_of_the_user_comes_out_as_itself(group: ActorGroup) -> None:
    with pytest.raises(DataError) as caught:
        group.call("update", 30, lambda actor, _rank: actor.fail.remote(DataError("my.jsonl line 3")))
    assert str(caught.value) == "my.jsonl line 3"


def test_stopped_processes_and_their_children_are_gone_after_the_end(group: ActorGroup) -> None:
    children = group.call("child", 30, lambda actor, _rank: actor.have_child.remote())
    for process in group.processes:
        os.kill(process.pid, signal.SIGSTOP)
    os.kill(children[0], signal.SIGSTOP)
    ours = {*children, *(process.pid for process in group.processes)}
    deadline = time.monotonic() + 30  # a child carries the mark only once it has become another program
    while not ours <= {process.pid for process in marked_processes()}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert group.monitor is not None and group.monitor.end(60) == []
    assert_nothing_left()


# --- budgets and backoff --------------------------------------------------------------------------------


def failing_context(
    monkeypatch: pytest.MonkeyPatch, retries: int, backoff: float = 0.0
) -> tuple[Any, list[str]]:
    """A run context whose workers start at once, and its events."""
    monkeypatch.setattr(recovery, "start_worker_groups", lambda *_: SimpleNamespace(close=lambda: None))
    said: list[str] = []
    config = SimpleNamespace(
        name="run",
        trainer=SimpleNamespace(max_restarts_per_role=retries, retry_backoff_seconds=backoff),
        timeouts=SimpleNamespace(probe_seconds=1.0, teardown_seconds=1.0),
    )
    context = SimpleNamespace(
        config=config,
        prepared=None,
        plan=None,
        folder=SimpleNamespace(root=None),
        resumed=False,
        stop=StopRequest(),
        lent=None,
        event=said.append,
        display=SimpleNamespace(phase=lambda *_: None),
    )
    return context, said


def attempts(context: Any, body: Callable[[recovery.Recovery], bool]) -> bool:
    """As the trainers make them."""
    tries = recovery.Recovery(context)
    while tries.goes_on():
        with tries.attempt():
            tries.start_workers()
            return body(tries)
    return False


def failures_of(*roles: str) -> tuple[Callable[[recovery.Recovery], bool], list[bool]]:
    """A body that fails once for each role and then finishes, and how it was asked to start each time."""
    left, resumed = list(roles), []

    def body(tries: recovery.Recovery) -> bool:
        resumed.append(tries.resumes)
        tries.ready()
        if left:
            raise GroupFailure("it broke", role=left.pop(0), phase="update")
        return True

    return body, resumed


def test_every_role_has_a_budget_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    context, said = failing_context(monkeypatch, retries=1)
    body, resumed = failures_of("policy", "rollout", "discriminator")
    assert attempts(context, body)
    assert resumed == [False, True, True, True]
    assert [text.startswith("recovered from the failure of") for text in said] == [False, True] * 3
    body, _ = failures_of("policy", "rollout", "policy")
    with pytest.raises(GroupFailure):
        attempts(context, body)


def test_the_backoff_doubles_up_to_its_cap() -> None:
    pauses = [pause_after(failures, 2.0) for failures in (1, 2, 3, 8, 9, 10_000)]
    assert pauses == [2, 4, 8, 256, 300, 300]


def test_a_stop_request_ends_the_backoff_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    context, said = failing_context(monkeypatch, retries=5, backoff=250.0)

    def body(*_: Any) -> bool:
        context.stop._event.set()
        raise GroupFailure("it broke", role="policy", phase="update")

    started = time.monotonic()
    assert not attempts(context, body)
    assert time.monotonic() - started < 60
    assert "--resume run" in said[-1]


def test_a_run_in_a_lent_placement_group_stops_where_its_nodes_are_drained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def body(_tries: recovery.Recovery) -> bool:
        raise Drained(["f" * 8], 3)

    context, said = failing_context(monkeypatch, retries=1)
    context.lent = object()
    assert not attempts(context, body)
    assert "cannot move" in said[-1] and "--resume run" in said[-1]


def test_errors_of_the_user_are_not_tried_again_and_a_shrunken_cluster_says_what_failed_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context, said = failing_context(monkeypatch, retries=5)
    calls = []

    def body(*_: Any) -> bool:
        calls.append(1)
        raise DataError("my.jsonl line 3")

    with pytest.raises(DataError):
        attempts(context, body)
    assert len(calls) == 1 and not said

    def no_room(*_: Any) -> Any:
        raise PlacementError("placement: no room")

    def once(*_: Any) -> bool:
        monkeypatch.setattr(recovery, "start_worker_groups", no_room)
        raise GroupFailure("the node broke", role="policy", phase="update")

    with pytest.raises(RunFailure, match=r"the node broke.*no room"):
        attempts(context, once)


# --- one stopped process of each role in a real run ------------------------------------------------------


@pytest.mark.slow
def test_a_run_recovers_from_a_stopped_process_of_each_role(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine, then the discriminator, then a policy rank, each in the second step that its process does.

    Where it goes on depends on the checkpoint of the first step, which is written beside training.
    """
    faults = (
        Fault("rollout", 0, "generate", call=2),
        Fault("discriminator", 0, "score", call=2),
        Fault("policy", 1, "update", call=2),
    )
    for fault in faults:
        plant(fault, tmp_path, monkeypatch)
    deadlines = [f"timeouts.{name}_seconds=12" for name in ("rollout", "score", "update")]
    assert train(configuration(tmp_path, *deadlines, "trainer.steps=4")) == 0
    folder = tmp_path / "demo" / "airl"
    failures = events(folder, "^failure ")
    assert len(failures) == len(faults)
    restarts = [text for _, text in events(folder, "^(no checkpoint to resume from|resumed from step-)")]
    starts = [
        0,
        *(int(text.split()[2].removeprefix("step-")) if text.startswith("resumed") else 0 for text in restarts),
    ]
    for fault, start, (at, text) in zip(faults, starts[:-1], failures, strict=True):
        named = f"{fault.role} rank {fault.rank} (node "
        assert f"failure 1 of role {fault.role}" in text and named in text and "is stopped" in text
        assert f"in phase {fault.verb}" in text and f"last finished step {start + 1}" in text
        assert at - float(fault.mark(tmp_path).read_text()) < 12 + 30
        assert len(events(folder, f"^recovered from the failure of {fault.role} in phase {fault.verb}")) == 1
    assert steps(folder) == [1, 2, 3, 4]
    assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_lost_rollout_replica_is_replaced_and_no_learner_begins_again(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["rollout.replicas=2", "timeouts.rollout_seconds=12", "learner.replicas=1"]
    assert train(configuration(tmp_path / "calm", *words)) == 0
    plant(Fault("rollout", 1, "generate", call=2, number=number), tmp_path, monkeypatch)
    assert train(configuration(tmp_path / "lost", *words)) == 0
    calm, folder = (tmp_path / name / "demo" / "airl" for name in ("calm", "lost"))
    [(_, text)] = events(folder, "^rollout rank 1 replaced in ")
    assert ("is stopped" if number == signal.SIGSTOP else "is gone") in text and "last finished step 1" in text
    assert not events(folder, "^failure ") and not events(folder, "^recovered ")
    assert steps(folder) == [1, 2, 3]
    for step in (1, 2, 3):
        file = f"rollouts/step-{step:06d}.jsonl"
        was, now = (
            [(row["seed"], row["generation"]) for row in read_json_lines(run / file)] for run in (calm, folder)
        )
        assert was == now and was, f"step {step}"
    assert_nothing_left()
