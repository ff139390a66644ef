"""The matrix of part 4: every role stopped in every phase, kills, SFT, a lost node, a Ctrl-C in a hang."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from rairl_ray.actors.group import GroupFailure
from rairl_ray.errors import DataError
from rairl_ray.trainer import sft
from rairl_ray.trainer.run import train
from tests.faults import (
    STEPS,
    Fault,
    assert_nothing_left,
    configuration,
    events,
    marked_processes,
    plant,
    plant_in_sft,
    steps,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.matrix,
]  # CI has no hour for it; test_deadlines.py has one of each role

START = "timeouts.start_seconds=90"
SECONDS = 20
"""Deadline of the phase under test; the start's is START: loading takes long on a busy machine."""


@pytest.fixture
def own_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


LEARNERS = [("policy", 0), ("policy", 1), ("discriminator", 0)]
MATRIX = [
    (Fault("rollout", 0, "__init__"), "start", START, 0),
    (Fault("rollout", 0, "open"), "open", START, 0),
    (Fault("rollout", 0, "generate", call=2), "generate", "timeouts.rollout_seconds=20", 1),
    (Fault("rollout", 0, "sync", call=2), "sync", "timeouts.sync_seconds=20", 0),
    *((Fault(role, rank, "__init__"), "start", START, 0) for role, rank in LEARNERS),
    *((Fault(role, rank, "open"), "open", START, 0) for role, rank in LEARNERS),
    *(
        (Fault(role, rank, "update", call=2), "update", "timeouts.update_seconds=20", 1)
        for role, rank in LEARNERS
    ),
    *(
        (Fault(role, rank, "save", call=2), "save", "timeouts.checkpoint_seconds=20", 2)
        for role, rank in LEARNERS
    ),
    *(
        (Fault(role, rank, "export"), "export", "timeouts.checkpoint_seconds=20", STEPS)
        for role, rank in LEARNERS
    ),
    (Fault("policy", 0, "weights", call=2), "weights", "timeouts.sync_seconds=20", 0),
    (Fault("policy", 1, "weights", call=2), "weights", "timeouts.sync_seconds=20", 0),
    (Fault("discriminator", 0, "score", call=2), "score", "timeouts.score_seconds=20", 1),
]
"""(fault, phase in the report, deadline, last finished step in the report)"""


def assert_reported(
    folder: Path, output: Path, fault: Fault, phase: str, last: int, deadline: float, failure: int = 1
) -> None:
    """One paragraph names the culprit, in time."""
    [(at, text)] = events(folder, f"^failure {failure} of role {fault.role}")
    state = "is gone" if fault.number == signal.SIGKILL else "is stopped"
    assert f"{fault.role} rank {fault.rank} (node " in text and state in text, text
    assert f"in phase {phase}" in text and f"last finished step {last}" in text, text
    detection = at - float(fault.mark(output).read_text())
    assert detection < deadline + 30
    print(f"{fault.role} {fault.rank} {fault.verb} {fault.number.name}: detected in {detection:.1f} s")


def assert_recovered(folder: Path, fault: Fault, phase: str) -> None:
    """The run went on, and says how long that took; no step is lost or doubled."""
    assert len(events(folder, f"^recovered from the failure of {fault.role} in phase {phase} in ")) == 1
    assert steps(folder) == list(range(1, STEPS + 1))
    assert_nothing_left()


@pytest.mark.parametrize(
    ("fault", "phase", "deadline", "last"),
    MATRIX,
    ids=[f"{fault.role}{fault.rank}-{phase}" for fault, phase, _, _ in MATRIX],
)
def test_every_role_stopped_in_every_phase(
    own_cluster: None,
    fault: Fault,
    phase: str,
    deadline: str,
    last: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(fault, tmp_path, monkeypatch)
    assert train(configuration(tmp_path, deadline)) == 0
    folder = tmp_path / "demo" / "airl"
    assert_reported(folder, tmp_path, fault, phase, last, float(deadline.partition("=")[2]))
    assert_recovered(folder, fault, phase)


@pytest.mark.parametrize(("role", "rank"), LEARNERS)
def test_stopped_while_it_loads_after_a_kill(
    own_cluster: None, role: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two failures in one run: a kill in step 3, seen at once, and a stop in the load that follows."""
    kill = Fault(role, rank, "update", call=3, number=signal.SIGKILL)
    stop = Fault(role, rank, "load")
    plant(kill, tmp_path, monkeypatch)
    plant(stop, tmp_path, monkeypatch)
    overrides = ["timeouts.checkpoint_seconds=20", "trainer.max_restarts_per_role=2"]
    assert train(configuration(tmp_path, *overrides)) == 0
    folder = tmp_path / "demo" / "airl"
    assert_reported(folder, tmp_path, kill, "update", 2, 0)
    assert_reported(folder, tmp_path, stop, "load", 2, 20, failure=2)
    assert_recovered(folder, stop, "load")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("rollout", 0, "generate", call=2, number=signal.SIGKILL),
        Fault("policy", 0, "update", call=2, number=signal.SIGKILL),
        Fault("policy", 1, "update", call=2, number=signal.SIGKILL),
        Fault("discriminator", 0, "score", call=2, number=signal.SIGKILL),
    ],
    ids=lambda fault: f"{fault.role}{fault.rank}",
)
def test_a_killed_process_is_seen_at_once(
    own_cluster: None, fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(fault, tmp_path, monkeypatch)
    assert train(configuration(tmp_path)) == 0
    folder = tmp_path / "demo" / "airl"
    assert_reported(folder, tmp_path, fault, fault.verb, 1, 0)
    assert_recovered(folder, fault, fault.verb)


def test_a_role_that_keeps_failing_ends_the_run_with_one_paragraph(
    own_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for call in (2, 3):
        fault = Fault("policy", 0, "update", call=call, number=signal.SIGKILL)
        plant(fault, tmp_path / str(call), monkeypatch)
        (tmp_path / str(call)).mkdir()
    with pytest.raises(GroupFailure, match=r"policy rank 0 .* is gone") as caught:
        train(configuration(tmp_path, "trainer.steps=6"))
    assert "\n" not in str(caught.value)
    assert len(events(tmp_path / "demo" / "airl", "^failure ")) == 2
    assert_nothing_left()


def test_ctrl_c_twice_ends_a_run_that_waits_for_a_stopped_process(
    own_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault("policy", 1, "update", call=2)
    plant(fault, tmp_path, monkeypatch)

    def interrupt() -> None:
        while not fault.mark(tmp_path).exists():
            time.sleep(0.1)
        for _ in range(2):
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(configuration(tmp_path))
    assert time.monotonic() - started < 300  # update_seconds is 1800
    assert_nothing_left()


# --- SFT by Ray Train -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rank", "call", "number", "phase", "last"),
    [
        ("__init__", 0, 1, signal.SIGSTOP, "start", 0),
        ("__init__", 1, 1, signal.SIGSTOP, "open", 0),
        ("_restore", 1, 1, signal.SIGSTOP, "load", 0),
        ("_update", 0, 2, signal.SIGSTOP, "update", 1),
        ("_update", 1, 2, signal.SIGSTOP, "update", 1),
        ("_save", 1, 2, signal.SIGSTOP, "save", 1),
        ("_export", 0, 1, signal.SIGSTOP, "export", STEPS),
        ("_update", 1, 2, signal.SIGKILL, "update", 1),
    ],
)
def test_a_stopped_worker_of_ray_train(
    own_cluster: None,
    method: str,
    rank: int,
    call: int,
    number: signal.Signals,
    phase: str,
    last: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault = Fault("policy", rank, method, call=call, number=number)
    monkeypatch.setattr(sft, "train_worker", plant_in_sft(fault, tmp_path))
    limits = [f"timeouts.{name}_seconds={SECONDS}" for name in ("update", "checkpoint", "placement")]
    assert train(configuration(tmp_path, START, *limits, experiment="sft")) == 0
    folder = tmp_path / "demo" / "sft"
    assert_reported(folder, tmp_path, fault, phase, last, 90 + SECONDS)
    assert_recovered(folder, fault, phase)


def test_an_error_of_the_user_in_a_worker_of_ray_train_is_not_tried_again(
    own_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_worker(settings: dict[str, Any]) -> None:
        from rairl_ray.errors import DataError
        from rairl_ray.trainer import sft_worker

        def refuse(_self: Any) -> None:
            raise DataError("my.jsonl line 3")

        sft_worker.Worker._restore = refuse
        sft_worker.train_worker(settings)

    monkeypatch.setattr(sft, "train_worker", train_worker)
    with pytest.raises(DataError, match=r"my\.jsonl line 3"):
        train(configuration(tmp_path, experiment="sft"))
    assert not events(tmp_path / "demo" / "sft", "^failure ")
    assert_nothing_left()


# --- a node ---------------------------------------------------------------------------------------------


def test_a_node_that_falls_silent_is_named_and_the_run_goes_on_elsewhere(tmp_path: Path) -> None:
    """The raylet of a second node is stopped in the middle of a run that has its learners there."""
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": {"health_check_period_ms": 1000}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    second = cluster.add_node(num_cpus=1)
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    raylet = second.all_processes["raylet"][0].process.pid
    folder = tmp_path / "demo" / "airl"

    def stop_second_node() -> None:
        while not (folder / "metrics.jsonl").exists() or 1 not in steps(folder):
            time.sleep(0.1)
        os.kill(raylet, signal.SIGSTOP)

    threading.Thread(target=stop_second_node, daemon=True).start()
    try:
        overrides = ["placement.strategy=SPREAD", "placement.type=disaggregated", "trainer.steps=40"]
        limits = ["timeouts.probe_seconds=5", "timeouts.teardown_seconds=5", "timeouts.update_seconds=60"]
        assert train(configuration(tmp_path, *overrides, *limits)) == 0
        [(_, text)] = events(folder, "^failure 1 of role ")
        assert "on a lost node" in text or "on a silent node" in text
        assert steps(folder) == list(range(1, 41))
    finally:
        os.kill(raylet, signal.SIGCONT)
        ray.shutdown()
        cluster.shutdown()
    deadline = time.monotonic() + 60
    while marked_processes() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not marked_processes()
