"""A forked worker is the worker that Ray would have started: environment, threads, numbers, end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray
import torch

from rairl_ray.engines.environment import compute_environment

pytestmark = pytest.mark.usefixtures("warm_actors")


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
            "mark": os.environ["MARK"],
            "imported": "deepspeed" in self.modules,
        }


@pytest.fixture(scope="module")
def private_ray(warm_actors: None) -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def begun(threads: int, mark: str) -> Any:
    kind: Any = ray.remote(Worker)
    variables = {**compute_environment("cpu", threads), "MARK": mark}
    return kind.options(num_cpus=0, runtime_env={"env_vars": variables}).remote()


@pytest.mark.usefixtures("private_ray")
def test_forks_are_the_workers_they_stand_for() -> None:
    actors = [begun(1, "a"), begun(2, "b" * 3000)]
    one, two = ray.get([actor.about.remote() for actor in actors])
    assert one["imported"] and two["imported"], "not forked"
    assert (one["threads"], two["threads"]) == (1, 2)
    assert (one["mark"], two["mark"]) == ("a", "b" * 3000)
    for about in (one, two):
        assert about["pid"] == about["group"] and about["folder"] != os.path.dirname(__file__)
        assert psutil.Process(about["pid"]).environ()["MARK"] == about["mark"], "as /proc shows it"
    here = Worker().numbers()
    assert ray.get([actor.numbers.remote() for actor in actors]) == [here, here]
    for actor in actors:
        ray.kill(actor)
    deadline = time.monotonic() + 30
    while any(psutil.pid_exists(about["pid"]) for about in (one, two)):
        assert time.monotonic() < deadline, "a killed fork lives"
        time.sleep(0.1)
