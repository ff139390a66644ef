"""A cluster of separate nodes on this machine, by `cluster/local.sh`, for tests that take it apart."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from tests.runs import ROOT, inheriting, launch

DRAIN = """
import sys, time, ray
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from rairl_ray.actors.joining import join
join(sys.argv[1])
nodes = sorted(n["NodeID"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU"))
reason, deadline = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"), int((time.time() + 60) * 1000)
client = ray._raylet.GcsClient(address=sys.argv[1])
node = next(node for i, node in enumerate(nodes) if sys.argv[2] in (str(i), node[:8]))
assert client.drain_node(node, reason, "spot", deadline)[0]
"""
SCRIPT = str(ROOT / "cluster" / "local.sh")


@cache
def refused_apart() -> str:
    """Why no process of this machine can have a disk of its own; empty where one can."""
    if shutil.which("unshare") is None:
        return "needs unshare (util-linux)"
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*on_own_disk(Path(folder)), "true"], capture_output=True, text=True, timeout=30)
    return f"this kernel, or this user, gives no mount namespaces: {done.stderr}" if done.returncode else ""


def on_own_disk(folder: Path) -> list[str]:
    """The beginning of a command for whose processes a folder is another, empty disk."""
    return ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(folder)]


def local(
    *arguments: str, timeout: float = 200, before: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`cluster/local.sh ARGUMENTS`; `before`: the beginning of the command."""
    command = [*before, "bash", SCRIPT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def free_ports() -> int:
    """The first of 100 ports that nobody holds, below those the system gives away by itself.

    Each process of a suite has a range of its own: a cluster that is down for a moment keeps its ports."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    for first in range(21000 + 2000 * worker, 23000 + 2000 * worker, 100):
        try:
            for port in range(first, first + 100):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no 100 free ports in a row")


class SeparateNodes:
    """A head without work and some workers, each in processes of its own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.address = folder, f"127.0.0.1:{port}"
        self._begun: subprocess.Popen[bytes] | None = None
        self.options = ["--dir", str(folder), "--port", str(port), "--dashboard-port", str(port + 10)]

    @property
    def environment(self) -> dict[str, str]:
        """What a driver of this cluster needs: the token's path, and nothing of another cluster."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        return {**kept, **token, "MLFLOW_DISABLE_TELEMETRY": "true"}

    def launch(self, *arguments: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """`python launch.py ARGUMENTS` with the cluster's token."""
        return launch(*arguments, timeout=timeout, environment={**self.environment, "COLUMNS": "400"})

    def call(self, *arguments: str, before: Sequence[str] = ()) -> None:
        """A verb of the script. Raises AssertionError with what it said where it fails."""
        if self._begun is not None:
            assert self._begun.wait(200) == 0
            self._begun = None
        done = local(*arguments, *self.options, before=before)
        assert done.returncode == 0, done.stdout + done.stderr

    def begin(self, *arguments: str) -> None:
        """The same, which the next `call` waits for."""
        command = ["bash", SCRIPT, *arguments, *self.options]
        self._begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def drain(self, worker: int | str) -> None:
        """Give a worker (its number, or 8 digits of its node's id) the notice of a spot machine that ends."""
        command = [sys.executable, "-c", DRAIN, self.address, str(worker)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr

    def processes(self) -> list[psutil.Process]:
        return marked(self.folder)


def marked(folder: Path) -> list[psutil.Process]:
    """Processes of the cluster in this folder, by the mark in their environment, sorted by their number."""
    return inheriting(lambda has: has.get("RAIRL_LOCAL_CLUSTER", "").startswith(f"{folder}:"))


@contextmanager
def separate_nodes(workers: int, *options: str, apart: Path | None = None) -> Iterator[SeparateNodes]:
    """Such a cluster, in a short folder (sockets lie below it); nothing of it is left afterwards.

    Args:
        apart: a folder that is an empty disk for all nodes (`refused_apart`).
    """
    nodes = SeparateNodes(Path(f"/tmp/rairl-t-{uuid.uuid4().hex[:8]}"), free_ports())
    try:
        nodes.call("up", str(workers), *options, before=() if apart is None else on_own_disk(apart))
        yield nodes
    finally:
        local("down", *nodes.options)
        shutil.rmtree(nodes.folder, ignore_errors=True)
        Path(f"{nodes.folder}.log").unlink(missing_ok=True)
