"""The head of a cluster dies alone and comes back, its knowledge kept in Redis: what goes on meanwhile."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import ssl
import sys
import time
from pathlib import Path

import pytest
import ray

from rairl_ray.actors.head import RAYS_BOUND
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.rl_trainer import RLTrainer
from rairl_ray.trainer.run import train
from tests.driven import DrivenRun
from tests.faults import configuration, events, steps
from tests.inprocess import differing, moved, rows_in
from tests.local_cluster import SeparateNodes, separate_nodes

STEPS = 20
AWAY_AFTER = 3
"""The step with whose row the head is killed."""
WITHOUT = 8
"""The last step that a run makes before it may go on, which is when the head is back."""

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="needs redis-server"),
    pytest.mark.slow,
    pytest.mark.cluster,
]


def drive(output: Path, address: str, home: str, resume: bool) -> int:
    """Train, as a driver on the node with this folder: on one machine Ray would always choose the head."""
    ray.init = functools.partial(ray.init, _temp_dir=home)
    own_step = RLTrainer._step

    def step_when_told(self: RLTrainer, step: int) -> None:
        while step > WITHOUT and not (output / "go-on").exists():
            time.sleep(0.1)
        if "SLOWLY" in os.environ:
            time.sleep(2.0)
        own_step(self, step)

    RLTrainer._step = step_when_told
    config = configuration(
        output,
        "learner.replicas=1",
        "placement.cpus_per_actor=0.33",
        f"trainer.steps={STEPS}",
        f"cluster.address={address}",
    )
    return train(config, resume=config.name if resume else None)


class Run(DrivenRun):
    """Its driver lives on this node."""

    def __init__(self, nodes: SeparateNodes, output: Path, node: int, held: bool = False, **extra: str) -> None:
        super().__init__(output)
        self.extra = extra
        if not held:
            self.go_on()
        self.nodes, self.home = nodes, str(nodes.folder / str(node))
        self.start()

    def go_on(self) -> None:
        (self.output / "go-on").touch()

    def start(self, resume: bool = False) -> None:
        call = f"drive(Path({str(self.output)!r}), {self.nodes.address!r}, {self.home!r}, {resume})"
        self.call(
            [sys.executable], "tests.jobs.test_head_restart", call, {**self.nodes.environment, **self.extra}
        )


def test_the_head_alone_dies_and_comes_back(tmp_path: Path) -> None:
    with separate_nodes(2, "--cpus", "1", "--redis") as nodes:
        redis_is_closed(nodes)
        calm = Run(nodes, tmp_path / "calm", 1)
        calm.finish()
        with_the_driver_elsewhere(Run(nodes, tmp_path / "elsewhere", 1, held=True))
        with_the_driver_on_it(Run(nodes, tmp_path / "on-it", 0))
        gone = Run(nodes, tmp_path / "gone", 1, SLOWLY="1", **{RAYS_BOUND: "20"})
        with_the_head_away_for_too_long(gone)
    assert not nodes.processes() and not nodes.folder.exists()
    rows = rows_in(RunFolder(calm.folder))
    assert moved(rows) and not events(calm.folder, "")
    for name in ("elsewhere", "on-it", "gone"):
        folder = tmp_path / name / "demo" / "airl"
        assert steps(folder) == list(range(1, STEPS + 1))
        assert differing(rows, rows_in(RunFolder(folder))) == []


def redis_is_closed(nodes: SeparateNodes) -> None:
    """Redis listens on loopback alone, and answers nobody without the key in its folder."""
    [redis] = [process for process in nodes.processes() if process.name() == "redis-server"]
    assert {c.laddr.ip for c in redis.net_connections("tcp") if c.status == "LISTEN"} == {"127.0.0.1"}
    own = nodes.folder / "redis"
    assert (own / "key").stat().st_mode & 0o777 == 0o600

    def answer(key: bool) -> bytes:
        context = ssl.create_default_context(cafile=own / "cert")
        context.check_hostname = False
        if key:
            context.load_cert_chain(own / "cert", own / "key")
        host, _, port = nodes.address.partition(":")
        try:
            with context.wrap_socket(socket.create_connection((host, int(port) + 2), timeout=10)) as client:
                client.sendall(b"PING\r\n")
                return client.recv(64)
        except OSError:
            return b""

    assert answer(key=True) == b"+PONG\r\n" and answer(key=False) == b""


def with_the_driver_elsewhere(run: Run) -> None:
    """Driver and actors outlive the head: the run goes on without it, and nothing is begun again."""
    run.reached(AWAY_AFTER)
    session = (run.nodes.folder / "0" / "session_latest").resolve().name
    run.nodes.call("kill", "0")
    killed, before = time.monotonic(), len(steps(run.folder))
    run.reached(WITHOUT)
    print(f"without the head from step {before} to {WITHOUT} in {time.monotonic() - killed:.1f} s")
    run.nodes.call("add")
    assert (run.nodes.folder / "0" / "session_latest").resolve().name == session
    print(f"the head was away for {time.monotonic() - killed:.1f} s")
    run.go_on()
    run.finish()
    assert not events(run.folder, ""), run.said()


def with_the_head_away_for_too_long(run: Run) -> None:
    """The driver, told of a shorter bound than Ray's 60 s, saves and says how to go on before Ray ends it."""
    run.reached(AWAY_AFTER)
    run.nodes.call("kill", "0")
    assert run.process.wait(run.seconds) != 0, run.said()
    print(run.said())
    run.nodes.call("add")
    [(_, text)] = events(run.folder, "^failed: ")
    said = r"has not answered for 10 s: saved after step [0-9]+; .* go on with --resume demo/airl$"
    assert re.search(said, text), text
    run.extra = {}
    run.start(resume=True)
    run.finish()


def with_the_driver_on_it(run: Run) -> None:
    """The driver ends, as its node did; the cluster stands, and the run is resumed there."""
    run.reached(AWAY_AFTER)
    run.nodes.call("kill", "0")
    killed = time.monotonic()
    run.nodes.call("add")
    back = time.monotonic() - killed
    assert run.process.wait(run.seconds) != 0, run.said()
    ended = time.monotonic() - killed
    print(f"the head was back after {back:.1f} s, the driver seen to have ended after {ended:.1f} s")
    run.start(resume=True)
    run.finish()
    print(run.said())
    assert events(run.folder, "^resumed from "), run.said()
