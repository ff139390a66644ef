"""A real Ray cluster of one node with its dashboard, a token and a folder of its own, for the tests of jobs."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.runs import launch

START_SECONDS = 120.0


@dataclass(frozen=True)
class LocalCluster:
    address: str
    folder: Path
    environment: dict[str, str]

    def launch(self, *arguments: str, timeout: float = 400, **extra: str) -> subprocess.CompletedProcess[str]:
        """`python launch.py ARGUMENTS` with the cluster's token."""
        return launch(*arguments, timeout=timeout, environment={**self.environment, **extra})

    def processes(self) -> list[psutil.Process]:
        """Every process of this cluster: its folder is in their arguments or their environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                seen = " ".join(process.cmdline()) + " ".join(process.environ().values())
                if str(self.folder) in seen and process.pid != os.getpid():
                    found.append(process)
        return found


@contextmanager
def local_cluster() -> Iterator[LocalCluster]:
    """Start a head node; afterwards nothing of it is left."""
    # Short: Unix sockets lie below it, and their paths hold 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="rj"))
    (folder / "token").write_text(secrets.token_hex(32))
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "COLUMNS": "200",
    }
    environment.pop("RAY_ADDRESS", None)
    port, dashboard, agent = free_ports(3)
    cluster = LocalCluster(f"http://127.0.0.1:{dashboard}", folder, environment)
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--disable-usage-stats",
        "--num-cpus", "2", "--object-store-memory", "200000000", "--temp-dir", str(folder), "--port", str(port),
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
        "--dashboard-agent-listen-port", str(agent),
    ]  # fmt: skip
    with open(folder / "ray.log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(cluster, head)
        yield cluster
    finally:
        head.terminate()
        with suppress(subprocess.TimeoutExpired):
            head.wait(20)
        for process in cluster.processes():
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(cluster: LocalCluster, head: subprocess.Popen[bytes]) -> None:
    token = (cluster.folder / "token").read_text()
    request = urllib.request.Request(
        f"{cluster.address}/nodes?view=summary", headers={"Authorization": f"Bearer {token}"}
    )
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and head.poll() is None:
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(request, timeout=5) as answer:
            if b'"ALIVE"' in answer.read():
                return
        time.sleep(0.5)
    raise RuntimeError((cluster.folder / "ray.log").read_text()[-2000:])


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, all above those that Ray gives its workers."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()
