"""A real training with `placement.strategy: SPREAD_ROLLOUTS`: which node has whom, and no number shows it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rairl_ray.actors.process_monitor import MARK
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.run import train
from tests.driven import DrivenRun
from tests.faults import configuration, steps
from tests.inprocess import differing, moved, rows_in
from tests.local_cluster import SeparateNodes, separate_nodes

STEPS = 4

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc"),
    pytest.mark.slow,
    pytest.mark.cluster,
]


def drive(output: Path, address: str, strategy: str) -> int:
    """Train with two ranks of each learner and two engines."""
    roles = ["learner.replicas=2", "learner.discriminator_replicas=2", "rollout.replicas=2"]
    placed = ["placement.type=disaggregated", f"placement.strategy={strategy}", "placement.cpus_per_actor=0.25"]
    return train(configuration(output, *roles, *placed, f"trainer.steps={STEPS}", f"cluster.address={address}"))


def trained(nodes: SeparateNodes, output: Path, strategy: str) -> tuple[Path, dict[str, list[int]]]:
    """The folder of a finished run, and of each role the node (its raylet's pid) of each of its ranks."""
    run = DrivenRun(output)
    call = f"drive(Path({str(output)!r}), {nodes.address!r}, {strategy!r})"
    run.call([sys.executable], "tests.actors.test_spread_run", call, nodes.environment)
    run.reached(1)
    found: dict[str, dict[int, int]] = {}
    for process in nodes.processes():
        variables = process.environ()
        if MARK in variables:
            _, role, rank = variables[MARK].split("/")
            found.setdefault(role, {})[int(rank)] = int(variables["RAY_RAYLET_PID"])
    run.finish()
    return run.folder, {role: [where[rank] for rank in sorted(where)] for role, where in found.items()}


def test_learners_are_packed_engines_spread_and_the_numbers_are_those_of_packed_ones(tmp_path: Path) -> None:
    with separate_nodes(4, "--cpus", "1") as nodes:
        spread, where = trained(nodes, tmp_path / "spread", "SPREAD_ROLLOUTS")
        packed, _ = trained(nodes, tmp_path / "packed", "PACK")
    print(where)
    assert {role: len(ranks) for role, ranks in where.items()} == dict.fromkeys(where, 2)
    homes = {role: set(ranks) for role, ranks in where.items()}
    assert [len(homes[role]) for role in ("rollout", "policy", "discriminator")] == [2, 1, 1]
    assert len(set.union(*homes.values())) == 4, "four bundles, four nodes"
    rows = rows_in(RunFolder(spread))
    assert moved(rows) and steps(spread) == list(range(1, STEPS + 1))
    assert differing(rows_in(RunFolder(packed)), rows) == []
