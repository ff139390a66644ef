"""The process that was started: hands its command line, environment and streams to a fork, and waits for it."""

from __future__ import annotations

import array
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AT_IMPORT = (
    "LD_",
    "VLLM_",
    "HF_",
    "TRANSFORMERS_",
    "TORCH",
    "KMP_",
    "GOMP_",
    "OMP_",
    "MKL_",
    "PYTHON",
    "CUDA_",
    "RAY_",
)
"""Beginnings of variables that libraries read when they are loaded; others are read when a worker runs."""
ITS_OWN = (
    "LD_LIBRARY_PATH",
    "PYTHONBREAKPOINT",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_NODE_ID",
    "RAY_RAYLET_PID",
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC",
    "TORCHINDUCTOR_COMPILE_THREADS",
    "TORCH_EXTENSIONS_DIR",
)
"""Of these, what differs from fork to fork, or with what a test has imported: read late, or of no account."""
DAEMONS = {"LD_PRELOAD": "", "RAY_enable_pipe_based_agent_to_parent_health_check": "1"}
"""What Ray gives to some of its daemons: the allocator does not matter, the others do not look for a parent."""
LOOK_SECONDS = 1.0
PATIENCE = 50.0
"""Seconds; Ray gives a worker sixty to begin."""


def server_of(kind: str, environment: dict[str, str]) -> Path:
    """The socket of the server that has a kind's imports, made under an environment like this one."""
    counts = {
        name: value for name, value in environment.items() if name.startswith(AT_IMPORT) and name not in ITS_OWN
    }
    spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("mnt", "net", "pid")]
    key = hashlib.sha256(json.dumps([counts, spaces], sort_keys=True).encode()).hexdigest()[:12]
    return Path(environment["RAIRL_WARM"]) / f"{kind}-{key}"


def connected(path: Path, environment: dict[str, str]) -> socket.socket | None:
    """A connection to the server there, which is started where none is; None: none answers."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            there.connect(str(path))
            return there
        except OSError:
            there.close()
        with open(f"{path}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # the server has it from its start to its end
                time.sleep(0.05)
            else:
                start(path, environment, lock.fileno())
    return None


def start(path: Path, environment: dict[str, str], lock: int) -> None:
    """Start a server, whose first environment and command line have room for those of any worker.

    Ray keeps from its import to which job a worker belongs (so each job has its servers) and whose end it
    follows: of forks it is the test session's, and this process, which Ray has started, follows its raylet for
    them (`ended`). It bears no run's mark and is nobody's child: it belongs to none, and would be ended, or
    counted, with its forks.
    """
    command = [sys.executable, str(Path(__file__).with_name("server.py")), str(path), "-" * 4096]
    places = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    kept = {k: v for k, v in environment.items() if k.startswith("RAIRL_WARM") or not k.startswith("RAIRL_")}
    environment = {**kept, "PYTHONPATH": places, "RAIRL_WARM_ROOM": "x" * 65536}
    environment["RAY_RAYLET_PID"] = environment["RAIRL_WARM_OWNER"]
    if between := os.fork():
        os.waitpid(between, 0)
        return
    with open(f"{path}.log", "a") as log:
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
            start_new_session=True, pass_fds=[lock],
        )  # fmt: skip
    os._exit(0)


def pass_signals(there: socket.socket) -> None:
    """From now on the fork gets what asks this process to end."""
    pid = int.from_bytes(there.recv(8, socket.MSG_WAITALL), "big")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))


def ended(there: socket.socket, follows: bool) -> int:
    """Wait for the fork's exit code; 1 once the raylet that it follows is gone, and so this process and it."""
    raylet, answer = os.getppid(), b""
    while not answer.endswith(b"\n"):
        if follows and os.getppid() != raylet:
            return 1
        if select.select([there], [], [], LOOK_SECONDS)[0]:
            said = there.recv(64)
            if not said:
                return 1
            answer += said
    return int(answer)


def fork_instead(kind: str, command: list[str]) -> None:
    """Have a fork run `command` and end as it ends; returns only where no server answers."""
    servers = os.environ | (DAEMONS if kind == "daemon" else {})
    there = connected(server_of(kind, servers), servers)
    if there is None:
        return
    said = json.dumps(
        {"kind": kind, "command": command, "environment": dict(os.environ), "folder": os.getcwd()}
    ).encode()
    streams = array.array("i", [0, 1, 2])
    there.sendmsg([len(said).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
    there.sendall(said)
    if kind == "driver":
        pass_signals(there)
    code = ended(there, follows=kind != "driver")
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
