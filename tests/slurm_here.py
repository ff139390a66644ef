"""Slurm itself on this machine: munged, slurmctld and three slurmd on loopback, ended by their process ids."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
NODES = 3

CONFIG = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,batch_sched_delay=1
KillWait=30
ReturnToService=2
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """What of Slurm is not installed here."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass(frozen=True)
class Slurm:
    """A running Slurm; `environment` makes its commands talk to it."""

    root: Path
    environment: dict[str, str]

    def call(self, *command: str, cwd: Path | None = None) -> str:
        """The command's output; raises with its error where it fails."""
        done = subprocess.run(
            command, env=self.environment, cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr or done.stdout}"
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields that `scontrol show job` has for it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", number)))

    def wait(self, number: str, states: set[str], seconds: float) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {number} is {job['JobState']}, not {states}"
            time.sleep(0.5)
        return job


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def slurm(root: Path) -> Iterator[Slurm]:
    """Three nodes n1, n2, n3 with two CPUs each; all daemons are gone afterwards."""
    host = socket.gethostname().split(".")[0]
    user = os.environ.get("USER") or subprocess.check_output(["id", "-un"], text=True).strip()
    nodes = "\n".join(
        f"NodeName=n{i} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN"
        for i in range(1, NODES + 1)
    )
    (root / "state").mkdir(parents=True)
    config = root / "slurm.conf"
    config.write_text(CONFIG.format(host=host, user=user, port=free_port(), root=root, nodes=nodes))
    key = root / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RAY_"))}
    environment |= {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munged = ["munged", "--foreground", "--force", f"--socket={root}/munge.sock", f"--key-file={key}"]
    munged += [f"--{name}-file={root}/munged.{name}" for name in ("pid", "log", "seed")]
    daemons = [munged, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"n{i}"] for i in range(1, NODES + 1))]
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (root / "daemons.out").open("ab") as output:
            for command in daemons:
                running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=output))
                time.sleep(1)
        here = Slurm(root, environment)
        deadline = time.monotonic() + 60
        while here.call("sinfo", "-h", "-t", "idle", "-o", "%D").split() != [str(NODES)]:
            assert time.monotonic() < deadline, (root / "daemons.out").read_text()[-2000:]
            time.sleep(1)
        yield here
    finally:
        for daemon in reversed(running):
            daemon.terminate()
        for daemon in reversed(running):
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
