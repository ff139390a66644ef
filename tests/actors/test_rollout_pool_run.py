"""A real run on separate nodes whose second replica comes and goes with its node; no number shows it."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from rairl_ray import metrics as names
from rairl_ray.actors.process_monitor import MARK
from rairl_ray.files import read_json_lines
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.rl_trainer import RLTrainer
from rairl_ray.trainer.run import train
from tests.driven import DrivenRun
from tests.faults import configuration, events, steps
from tests.inprocess import differing, moved, rows_in
from tests.local_cluster import SeparateNodes, separate_nodes

STEPS = 6
SERVING = {2: 2, 3: 1, 4: 2, 5: 2, 6: 2}
"""Step -> replicas that serve when it begins."""
SAMPLED = [1, 2, 1, 1, 1, 2]
"""Replicas that are left when a step has its samples: in steps 4 and 5 one dies."""
SECONDS = 240.0

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc"),
    pytest.mark.slow,
    pytest.mark.cluster,
]


def drive(output: Path, address: str, replicas: str, serving: Mapping[int, int]) -> int:
    """Train; a step that `serving` names begins once so many replicas serve, as after a longer one."""
    own_step = RLTrainer._step

    def step_when_ready(self: RLTrainer, step: int) -> None:
        until = time.monotonic() + SECONDS
        (output / f"before-{step}").touch()
        while len(self.workers.rollouts) != serving.get(step, len(self.workers.rollouts)):
            assert time.monotonic() < until
            self.rollout_pool.leave_drained()
            self.rollout_pool.grow()
            time.sleep(0.1)
        while serving and not (output / f"begin-{step}").exists():
            assert time.monotonic() < until
            time.sleep(0.1)
        own_step(self, step)

    RLTrainer._step = step_when_ready
    one_each = ["learner.replicas=1", "placement.cpus_per_actor=0.33", f"trainer.steps={STEPS}"]
    asked = [f"rollout.replicas={replicas}", f"cluster.address={address}"]
    return train(configuration(output, *one_each, *asked))


class Course(DrivenRun):
    """A run with so many replicas, whose steps begin when the test says so."""

    def __init__(self, nodes: SeparateNodes, output: Path, replicas: str, serving: Mapping[int, int]) -> None:
        super().__init__(output)
        self.homes: list[str] = []
        call = f"drive(Path({str(output)!r}), {nodes.address!r}, {replicas!r}, {dict(serving)!r})"
        self.call([sys.executable], "tests.actors.test_rollout_pool_run", call, nodes.environment)

    def before(self, step: int) -> None:
        self.wait((self.output / f"before-{step}").exists)

    def begin(self, step: int) -> None:
        (self.output / f"begin-{step}").touch()

    def joined(self) -> tuple[int, str]:
        """The next replica that joins from a node where none did so far: its rank, 8 digits of the node's id.

        Not by a rank that is known before: one that the cluster's state made the pool give up has had one, too.
        """
        found: list[tuple[int, str]] = []

        def elsewhere() -> bool:
            texts = [text for _, text in events(self.folder, "^replica [0-9]+ joined ")]
            places = [re.search(r"^replica ([0-9]+) joined .*\(([0-9a-f]{8})\)", text) for text in texts]
            found[:] = [(int(p[1]), p[2]) for p in places if p is not None and p[2] not in self.homes]
            return bool(found)

        self.wait(elsewhere)
        self.homes.append(found[0][1])
        return found[0]


def test_replicas_follow_the_nodes_and_the_numbers_are_those_of_one_replica(tmp_path: Path) -> None:
    with separate_nodes(1, "--cpus", "1") as nodes:
        Course(nodes, tmp_path / "fixed", "1", {}).finish()
        course = Course(nodes, tmp_path / "pool", "{min: 1, max: 2}", SERVING)
        course.begin(1)
        course.before(2)
        nodes.call("add")  # worker 2
        drained, home = course.joined()
        course.begin(2)
        course.before(3)
        nodes.drain(home)
        course.begin(3)
        course.before(4)
        nodes.call("add")  # worker 3
        killed, _ = course.joined()
        nodes.call("kill", "3")
        course.begin(4)
        course.before(5)
        nodes.call("add")  # worker 3 again
        course.joined()
        actor_of(nodes, 0).kill()
        course.begin(5)
        course.joined()  # in the bundle that the first replica has left
        course.begin(6)
        course.finish()
        print(course.said())
    assert_same(tmp_path, drained, killed)


def actor_of(nodes: SeparateNodes, rank: int) -> psutil.Process:
    """The process of a rollout replica."""
    [found] = [
        process
        for process in nodes.processes()
        if process.environ().get(MARK, "").endswith(f"/rollout/{rank}")
        and "RolloutActor" in " ".join(process.cmdline())
    ]
    return found


def assert_same(output: Path, drained: int, killed: int) -> None:
    """Rows, samples and learners of both runs, and what the events tell of these two replicas."""
    one, pool = (output / name / "demo" / "airl" for name in ("fixed", "pool"))
    rows = rows_in(RunFolder(pool))
    assert moved(rows) and steps(pool) == list(range(1, STEPS + 1))
    assert differing(rows_in(RunFolder(one)), rows) == []
    for step in range(1, STEPS + 1):
        file = f"rollouts/step-{step:06d}.jsonl"
        assert read_json_lines(pool / file) == read_json_lines(one / file), f"step {step}"
    trained = [row for row in RunFolder(pool).read_metrics() if names.POLICY_LOSS in row]
    assert [row[names.ROLLOUT_REPLICAS] for row in trained] == SAMPLED
    print([(row[names.TIME_ROLLOUT], row[names.TIME_SYNC]) for row in trained])
    assert not events(pool, "^failure |^recovered |is being drained: saved"), "a learner began again"
    left = [text for _, text in events(pool, "^replica [0-9]+ left")]
    told = [f"replica {rank} left, 1 go on: {why}" for rank, why in ((drained, "node"), (killed, ""), (0, ""))]
    assert [text.startswith(begin) for text, begin in zip(left, told, strict=True)] == [True] * 3, left
    assert "is being drained" in left[0] and "is gone" in left[2]
    assert not events(one, "^replica ")
