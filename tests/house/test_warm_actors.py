"""A forked worker is the worker that Ray would have started: environment, threads, numbers, end."""

from __future__ import annotations

import os
import runpy
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import psutil
import pytest
import ray
import torch

from rairl_ray.actors.process_monitor import MARK
from rairl_ray.engines.environment import compute_environment
from tests.runs import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("RAIRL_COLD" in os.environ, reason="RAIRL_COLD: no actor is a fork"),
]


class Worker:
    def __init__(self) -> None:
        self.modules = set(sys.modules)

    def numbers(self) -> float:
        torch.manual_seed(3)
        return float((torch.randn(64, 64) @ torch.randn(64, 64)).double().sum())

    def about(self) -> dict[str, Any]:
        return {
            "pid": os.getpid(),
            "group": os.getpgrp(),
            "folder": os.getcwd(),
            "threads": torch.get_num_threads(),
            "mark": os.environ[MARK],
            "cores": len(os.sched_getaffinity(0)),
            "raylet": int(os.environ["RAY_RAYLET_PID"]),
            "imported": "deepspeed" in self.modules,
        }

    def drawn(self) -> tuple[int, str]:
        """Its server's process, and a random id."""
        return os.getppid(), ray.ObjectRef.from_random().hex()


@pytest.fixture
def private_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def forked(threads: int, mark: str) -> Any:
    kind: Any = ray.remote(Worker)
    variables = {**compute_environment("cpu", threads), MARK: mark}
    for _ in range(3):  # on a busy machine a server may come too late for the first
        actor = kind.options(num_cpus=0, runtime_env={"env_vars": variables}).remote()
        if ray.get(actor.about.remote())["imported"]:
            return actor
        ray.kill(actor)
    raise AssertionError("not forked")


@pytest.mark.usefixtures("private_ray")
def test_forks_are_the_workers_they_stand_for() -> None:
    actors = [forked(1, "a"), forked(2, "b" * 3000)]
    one, two = ray.get([actor.about.remote() for actor in actors])
    assert (one["threads"], two["threads"]) == (1, 2)
    assert (one["mark"], two["mark"]) == ("a", "b" * 3000)
    for about in (one, two):
        assert about["pid"] == about["group"] and about["folder"] != os.path.dirname(__file__)
        assert psutil.Process(about["pid"]).environ()[MARK] == about["mark"], "as /proc shows it"
        server = psutil.Process(about["pid"]).parent()
        assert server is not None and MARK not in server.environ(), "a run would count, or end, its server"
        assert about["cores"] == len(os.sched_getaffinity(0))
    here = Worker().numbers()
    assert ray.get([actor.numbers.remote() for actor in actors]) == [here, here]
    for actor in actors:
        ray.kill(actor)
    wait_for_the_end([about["pid"] for about in (one, two)])


@pytest.mark.usefixtures("private_ray")
def test_forks_of_one_server_draw_different_ids() -> None:
    """Ray's workers draw object ids: equal ones crash them, now and then, where they begin at once."""
    plain = ray.remote(Worker).options(num_cpus=0)
    pairs = [[plain.remote() for _ in range(2)], [forked(1, mark) for mark in "ab"]]
    for pair in pairs:
        (server, one), (same, two) = ray.get([actor.drawn.remote() for actor in pair])
        assert server == same and one != two


@pytest.mark.parametrize("sent", [b"", (100).to_bytes(8, "big"), (100).to_bytes(8, "big") + b"half"])
def test_a_server_outlives_a_process_that_is_killed_while_it_asks(sent: bytes) -> None:
    server = runpy.run_path(str(ROOT / "tests" / "warm" / "server.py"))
    here, there = socket.socketpair()
    with here, there:
        here.sendall(sent)
        here.close()
        with pytest.raises(OSError, match="has ended"):
            server["receive"](there)


@pytest.mark.usefixtures("private_ray")
def test_a_fork_follows_the_raylet_of_its_own_session() -> None:
    """Its server's first session, whose raylet is gone, is that of the test above."""
    actor = forked(1, "a")
    about = ray.get(actor.about.remote())
    time.sleep(3.0)  # Ray looks for the raylet every second
    assert ray.get(actor.about.remote()) == about
    psutil.Process(about["raylet"]).kill()
    wait_for_the_end([about["pid"]])


def wait_for_the_end(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline, "a fork lives on"
        time.sleep(0.1)
