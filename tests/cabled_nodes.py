"""A Ray cluster of which one worker hangs on a cable that can be pulled: network namespaces joined by a bridge.

    HOME (head, worker 1, the driver) ── bridge ──cable── FAR (worker 2)

The bridge's end of the cable goes down: as with a real one, each node keeps its address and reaches itself, and
what it sends to the other is lost. Nothing of it is reachable from the machine's own network.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import psutil

from tests.runs import ROOT

PORT = 6379


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
    return done.stdout


@cache
def refused() -> str:
    """Why there can be no such cluster on this machine; empty where there can."""
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "needs ip (iproute2) and nsenter (util-linux)"
    name = f"rairl-{uuid.uuid4().hex[:6]}"
    try:
        ip("netns", "add", name)
        try:
            ip("-n", name, "link", "add", "hub", "type", "bridge")
            ip("-n", name, "link", "add", "port", "type", "veth", "peer", "name", "wire")
        finally:
            ip("netns", "del", name)
    except AssertionError as error:
        return f"this kernel, or this user, gives no network namespaces: {error}".strip()
    return ""


class CabledNodes:
    """Such a cluster, closed by a token."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        key = folder.name[-6:]
        self.home, self.far, self.hub = (f"rairl-{key}-{end}" for end in ("home", "far", "hub"))
        self.net = f"10.77.{int(key, 16) % 250}"
        self.address = f"{self.net}.1:{PORT}"
        """Of the head. Ray looks for a twin among all processes of the machine, so each cluster has its own."""

    @property
    def environment(self) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token")}
        return {**kept, **token, "RAY_USAGE_STATS_ENABLED": "0", "GLOO_SOCKET_IFNAME": "wire"}

    def command(self, space: str, *words: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{space}", *words]

    def up(self) -> None:
        self.folder.mkdir(mode=0o700)
        token = self.folder / "token"
        token.touch(0o600)
        token.write_text(secrets.token_hex(32))
        for space in (self.hub, self.home, self.far):
            ip("netns", "add", space)
        ip("-n", self.hub, "link", "add", "hub", "type", "bridge")
        ip("-n", self.hub, "link", "set", "hub", "up")
        for i, space in enumerate((self.home, self.far), 1):
            port = ("-n", self.hub, "link", "set", f"port{i}")
            ip(*f"-n {self.hub} link add port{i} type veth peer name wire netns {space}".split())
            ip(*port, "master", "hub")
            ip(*port, "up")
            ip("-n", space, "addr", "add", f"{self.net}.{i}/24", "dev", "wire")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "wire", "up")
            ip("-n", space, "route", "add", "default", "dev", "wire")  # Ray asks it for the node's address
        self._start(
            0, self.home, 1, "--head", "--port", str(PORT), "--num-cpus", "0", "--include-dashboard=false"
        )
        self._start(1, self.home, 1, "--address", self.address, "--num-cpus", "1")
        self._start(2, self.far, 2, "--address", self.address, "--num-cpus", "1")

    def _start(self, node: int, space: str, host: int, *words: str) -> None:
        base = 20000 + 10 * node
        own = ["--node-ip-address", f"{self.net}.{host}", "--temp-dir", str(self.folder / str(node))]
        own += ["--num-gpus", "0", "--object-store-memory", str(300 * 2**20)]
        own += ["--min-worker-port", "0", "--max-worker-port", "0", "--node-manager-port", str(base)]
        own += ["--object-manager-port", str(base + 1), "--metrics-export-port", str(base + 2)]
        own += ["--dashboard-agent-listen-port", str(base + 3), "--dashboard-agent-grpc-port", str(base + 4)]
        own += ["--runtime-env-agent-port", str(base + 5)]
        ray = str(Path(sys.executable).with_name("ray"))
        with open(self.folder / f"start-{node}.log", "wb") as log:
            done = subprocess.run(
                self.command(space, ray, "start", *words, *own),
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=180,
            )
        assert done.returncode == 0, (self.folder / f"start-{node}.log").read_text()[-3000:]

    def pull(self) -> None:
        """Take the far node's cable out."""
        ip("-n", self.hub, "link", "set", "port2", "down")

    def plug(self) -> None:
        """Put it in again."""
        ip("-n", self.hub, "link", "set", "port2", "up")

    def processes(self, space: str) -> list[psutil.Process]:
        found = []
        for pid in ip("netns", "pids", space).split():
            with suppress(psutil.Error):
                found.append(psutil.Process(int(pid)))
        return found

    def down(self) -> None:
        """End what runs in the namespaces, and the namespaces; safe to call after half an `up`."""
        there = {line.split()[0] for line in ip("netns", "list").splitlines() if line}
        for space in (self.home, self.far, self.hub):
            if space not in there:
                continue
            while found := self.processes(space):
                for process in found:
                    with suppress(psutil.Error):
                        process.kill()
                psutil.wait_procs(found, timeout=5)
            ip("netns", "del", space)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def cabled_nodes() -> Iterator[CabledNodes]:
    """Such a cluster; nothing of it is left afterwards."""
    nodes = CabledNodes(Path(f"/tmp/rairl-t-{uuid.uuid4().hex[:8]}"))
    try:
        nodes.up()
        yield nodes
    finally:
        nodes.down()
