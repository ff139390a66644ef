"""Processes that stop or die in the middle of a real run, and what the run must leave behind afterwards.

Nothing of it is in the package: the driver of these runs is the test's own process, in which an actor class is
replaced by one whose chosen verb sends its own process a signal, once. Ray carries that class by value.
"""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rairl_ray import metrics as names
from rairl_ray.actors.process_monitor import MARK
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer import worker_groups
from tests.conftest import TESTER
from tests.runs import ROOT, TINY_AIRL, inheriting

CLASSES = {"rollout": "RolloutActor", "policy": "PolicyActor", "discriminator": "DiscriminatorActor"}

STEPS = 3
RUN = [
    *TINY_AIRL,
    "warm_start=null",
    "tracking.uri=none",
    "discriminator.head=scalar",
    "discriminator.loss.level=unit",
    "discriminator.warmup_steps=0",
    "discriminator.warmup_max_steps=0",
    "learner.replicas=2",
    "learner.discriminator_replicas=1",
    "learner.zero_stage=1",
    "placement.cpus_per_actor=0.25",
    "eval.at_end=false",
    f"trainer.steps={STEPS}",
    "trainer.retry_backoff_seconds=0.1",
    "timeouts.teardown_seconds=60",
]
"""A tiny R-AIRL run with two policy ranks and a checkpoint after every step."""


@dataclass(frozen=True)
class Fault:
    """A signal that one rank sends itself when a verb of its begins."""

    role: str
    rank: int
    verb: str
    call: int = 1
    """The how-manieth call of the verb in its process."""
    number: signal.Signals = signal.SIGSTOP

    def mark(self, folder: Path) -> Path:
        """Holds the time of the signal; where it exists, the fault is over."""
        return folder / f"{self.role}-{self.rank}-{self.verb}"


def plant(fault: Fault, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next runs of this process meet the fault, once."""
    base: Any = getattr(worker_groups, CLASSES[fault.role])
    mark = str(fault.mark(folder))
    counter = f"calls:{mark}"

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        rank = args[0] if fault.verb == "__init__" else self.rank
        calls = getattr(self, counter, 0) + 1
        setattr(self, counter, calls)
        if rank == fault.rank and calls == fault.call and not os.path.exists(mark):
            with open(mark, "w") as file:
                file.write(str(time.time()))
            os.kill(os.getpid(), fault.number)
        return getattr(base, fault.verb)(self, *args, **kwargs)

    monkeypatch.setattr(worker_groups, CLASSES[fault.role], type(base.__name__, (base,), {fault.verb: faulty}))


def plant_in_sft(fault: Fault, folder: Path) -> Any:
    """The entry point of SFT's workers with a fault in a method of theirs; Ray Train carries it by value."""
    mark, method, rank, call = str(fault.mark(folder)), fault.verb, fault.rank, fault.call
    number = int(fault.number)

    def train_worker(settings: dict[str, Any]) -> None:
        import ray.train

        from rairl_ray.trainer import sft_worker

        own, original = ray.train.get_context().get_world_rank(), getattr(sft_worker.Worker, method)
        calls: list[int] = []

        def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if own == rank and len(calls) == call and not os.path.exists(mark):
                with open(mark, "w") as file:
                    file.write(str(time.time()))
                os.kill(os.getpid(), number)
            return original(self, *args, **kwargs)

        setattr(sft_worker.Worker, method, faulty)
        sft_worker.train_worker(settings)

    return train_worker


def configuration(output: Path, *overrides: str, experiment: str = "airl") -> RunConfig:
    arguments = [*RUN, *overrides, f"output_dir={output}"]
    if experiment != "airl":
        arguments = [text for text in arguments if not text.startswith("discriminator.")]
    return load_config(str(ROOT / "experiments" / "demo" / f"{experiment}.yaml"), arguments)


def events(folder: Path, pattern: str) -> list[tuple[float, str]]:
    """(time, text) of the run's events that match. A run to which nothing happened has no events.log."""
    assert folder.is_dir(), folder
    log = RunFolder(folder).events
    lines = log.read_text().splitlines() if log.exists() else []
    split = [line.partition(" ") for line in lines]
    return [(datetime.fromisoformat(at).timestamp(), text) for at, _, text in split if re.search(pattern, text)]


def steps(folder: Path) -> list[float]:
    """The policy steps in metrics.jsonl, in its order."""
    rows = RunFolder(folder).read_metrics()
    return [row["step"] for row in rows if names.POLICY_LOSS in row]


def marked_processes() -> list[psutil.Process]:
    """Processes of any run's actors on this machine that were started by this test's cluster."""
    return inheriting(lambda has: MARK in has and has.get(TESTER) == os.environ[TESTER])


def assert_nothing_left() -> None:
    """No process of an actor, running or stopped, and no placement group, a moment after the run's end."""
    deadline = time.monotonic() + 10
    while (left := marked_processes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, [process.as_dict(["pid", "ppid", "status", "cmdline", "create_time"]) for process in left]
    groups = ray.util.placement_group_table().values()
    assert not [group for group in groups if group["state"] != "REMOVED"]
