"""A run one of whose nodes hangs on a cable: pulled for five seconds, then for good, and the same rows."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from rairl_ray.actors.process_monitor import MARK
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.run import train
from tests.cabled_nodes import CabledNodes, cabled_nodes, refused
from tests.driven import DrivenRun
from tests.faults import configuration, events, steps
from tests.inprocess import differing, moved, rows_in

STEPS = 20
CUT_AFTER = 3
"""The step with whose row the cable is pulled."""

pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1500)]


def drive(output: Path, address: str) -> int:
    """Train with an actor on either worker, and no two of a kind: which of them is where changes no number."""
    one_each = ["learner.replicas=1", "placement.cpus_per_actor=0.33", f"trainer.steps={STEPS}"]
    apart = ["placement.type=disaggregated", "placement.strategy=SPREAD"]
    return train(configuration(output, *one_each, *apart, f"cluster.address={address}"))


class Run(DrivenRun):
    """Its driver lives on the head's side of the cable."""

    seconds = 300.0

    def __init__(self, nodes: CabledNodes, output: Path) -> None:
        super().__init__(output)
        self.nodes = nodes
        call = f"drive(Path({str(output)!r}), {nodes.address!r})"
        python = nodes.command(nodes.home, sys.executable)
        self.call(python, "tests.actors.test_cut_cable", call, nodes.environment)

    def roles(self, space: str) -> set[str]:
        """Roles that have a process on this side of the cable."""
        found = set()
        for process in self.nodes.processes(space):
            try:
                mark = process.environ().get(MARK, "//")
            except psutil.Error:
                continue
            found.add(mark.split("/")[1])
        return found - {""}


@pytest.mark.skipif(bool(refused()), reason=refused())
def test_a_cable_cut_for_five_seconds_and_one_cut_for_good(tmp_path: Path) -> None:
    with cabled_nodes() as nodes:
        calm = Run(nodes, tmp_path / "calm")
        calm.finish()
        for_seconds(Run(nodes, tmp_path / "seconds"))
        for_good(Run(nodes, tmp_path / "good"))
    rows = rows_in(RunFolder(calm.folder))
    assert moved(rows) and not events(calm.folder, "^failure ")
    for name in ("seconds", "good"):
        folder = tmp_path / name / "demo" / "airl"
        assert steps(folder) == list(range(1, STEPS + 1))
        assert differing(rows, rows_in(RunFolder(folder))) == []


def for_seconds(run: Run) -> None:
    """The run waits for what was lost on the way, which comes again, and goes on."""
    run.reached(CUT_AFTER)
    far = run.roles(run.nodes.far)
    run.nodes.pull()
    before = len(steps(run.folder))
    time.sleep(5)
    during = len(steps(run.folder)) - before
    run.nodes.plug()
    plugged = time.monotonic()
    run.reached(before + during + 1)
    print(f"5 s without {far}: {during} rows; the next one came {time.monotonic() - plugged:.1f} s after them")
    run.finish()
    assert far and during <= 1, f"{during} steps without {far}: the cut was not one"
    assert not events(run.folder, "^failure |^recovered "), run.said()


def for_good(run: Run) -> None:
    """The node's loss is noticed, and its actors live on the other side from the newest checkpoint on."""
    run.reached(CUT_AFTER)
    far = run.roles(run.nodes.far)
    cut = time.time()
    run.nodes.pull()
    run.finish()
    [(failed, failure)] = events(run.folder, "^failure 1 of role ")
    [(_, recovered)] = events(run.folder, "^recovered from the failure of ")
    print(f"without {far} for good: noticed after {failed - cut:.1f} s\n{failure}\n{recovered}")
    assert far and failure.split()[4].rstrip(",") in far, run.said()
