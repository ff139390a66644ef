"""Imports what a kind of process imports under an environment, and forks one whenever it is asked for.

Usage: server.py FOLDER/KIND-KEY PADDING. It ends with the process RAIRL_WARM_OWNER, or idle; its files are the
session's, and its lock goes on to the next server of its name. A fork's first environment, by which runs find
their processes in /proc, is overwritten with that of the process for which it stands.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ACTORS = ("rairl_ray.actors.policy", "rairl_ray.actors.discriminator", "rairl_ray.actors.rollout_actor")
ENGINES = ("rairl_ray.engines.deepspeed_engine", "rairl_ray.engines.heads", "rairl_ray.engines.models")
MODELS = ("transformers.models.llama.modeling_llama", "peft")
IMPORTS = {
    "learner": (*ACTORS, *ENGINES, *MODELS),
    "vllm": (
        *ACTORS,
        "rairl_ray.engines.vllm_engine",
        "rairl_ray.engines.weight_transfer_vllm",
        "vllm.entrypoints.llm",
        "vllm.v1.attention.backends.cpu_attn",
        "vllm.v1.engine.llm_engine",
        "vllm.v1.worker.cpu_worker",
    ),
    "driver": ("launch", "rairl_ray.trainer.run", "rairl_ray.trainer.rl_trainer"),
    "worker": (
        "ray.data",
        "ray.train.torch",
        "ray.tune",
        "rairl_ray.actors.chunks",
        "rairl_ray.sweep.supervise",
    ),
    "daemon": (
        "ray.dashboard.agent",
        "ray.dashboard.dashboard",
        "ray.autoscaler._private.monitor",
        "ray._private.log_monitor",
        "ray._private.runtime_env.agent.main",
    ),
}
IDLE_SECONDS = 300.0
"""After so long without a fork a server ends: jobs come and go, each with servers of its own."""


@contextmanager
def no_id_drawn() -> Iterator[None]:
    """Ray's own generator stays unseeded while this lasts, or all forks would draw the same ids from it.

    Modules of Ray that define actors draw one for each.
    """
    import ray.actor

    genuine = ray.actor.ActorClassID

    class Other:
        @staticmethod
        def from_random() -> Any:
            return genuine(os.urandom(genuine.size()))

    ray.actor.ActorClassID = Other
    try:
        yield
    finally:
        ray.actor.ActorClassID = genuine


def preload(kind: str) -> None:
    """Import; what is not installed is the fork's own to complain about."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    with no_id_drawn():
        for name in IMPORTS[kind]:
            try:
                importlib.import_module(name)
            except ImportError:
                traceback.print_exc()
        if kind == "driver":
            from rairl_ray.tracking.mlflow_run import import_mlflow

            import_mlflow()
        if kind == "daemon":
            from ray.dashboard.utils import DashboardAgentModule, get_all_modules

            get_all_modules(DashboardAgentModule)
    gc.freeze()  # or each fork's collector goes through, and so copies, all that is imported


def overwrite_environment(values: dict[str, str]) -> None:
    """Put `values` where /proc/PID/environ shows this process's first environment."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    begin, end = int(fields[47]), int(fields[48])
    block = b"".join(f"{name}={value}".encode() + b"\0" for name, value in values.items())
    ctypes.memmove(begin, block[: end - begin].ljust(end - begin, b"\0"), end - begin)


def become(said: dict[str, Any], streams: list[int]) -> int:
    """Do the work of the process that asked, in this fork; the exit code."""
    os.setpgid(0, 0)  # Ray ends a worker's whole process group
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
        os.close(stream)
    os.environ.clear()
    os.environ.update(said["environment"])
    if said["kind"] == "daemon":  # Ray's end where their parent is another one
        os.environ["RAY_RAYLET_PID"] = str(os.getppid())
    overwrite_environment(said["environment"])
    os.chdir(said["folder"])
    sys.argv, sys.orig_argv[1:] = said["command"], said["command"]
    sys.path.insert(0, str(Path(sys.argv[0]).absolute().parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def receive(there: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a fork is to be, and its three streams. Raises OSError where who asks ends in the middle."""
    head, ancillary, _, _ = there.recvmsg(8, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    size, text = int.from_bytes(head, "big"), b""
    while len(text) < size and (part := there.recv(size - len(text))):
        text += part
    if not size or len(text) < size:
        for stream in streams:
            os.close(stream)
        raise ConnectionError("the process that asked has ended")
    return json.loads(text), list(streams)


class Server:
    """A listening socket, and a connection for each fork that lives."""

    def __init__(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)  # of a server that was killed
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen(64)
        self._woken, self._wake = socket.socketpair()
        self._wake.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._choose = selectors.DefaultSelector()
        for one in (self._listener, self._woken):
            self._choose.register(one, selectors.EVENT_READ)
        self._forks: dict[int, socket.socket] = {}

    def serve(self, owner: Path) -> None:
        """Until the process `owner` (in /proc) ends, or nobody has asked for a while and no fork lives."""
        idle_since = time.monotonic()
        while owner.exists() and time.monotonic() - idle_since < IDLE_SECONDS:
            found = self._choose.select(5.0)
            if found or self._forks:
                idle_since = time.monotonic()
            for key, _ in found:
                if key.fileobj is self._listener:
                    self._fork()
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:  # the process for which a fork stands has ended
                    self._choose.unregister(key.fileobj)
                    with suppress(ProcessLookupError):
                        os.kill(key.data, signal.SIGKILL)
            self._tell_ends()
        for pid in self._forks:
            os.kill(pid, signal.SIGKILL)

    def _fork(self) -> None:
        there, _ = self._listener.accept()
        try:
            said, streams = receive(there)
        except OSError:
            there.close()
            return
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for one in (self._listener, self._woken, self._wake, there, *self._forks.values()):
                one.close()
            self._choose.close()
            code = become(said, streams)
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        for stream in streams:
            os.close(stream)
        if said["kind"] == "driver":
            with suppress(OSError):  # it has ended: its fork is ended as soon as that is seen
                there.sendall(pid.to_bytes(8, "big"))
        self._forks[pid] = there
        self._choose.register(there, selectors.EVENT_READ, pid)

    def _tell_ends(self) -> None:
        while self._forks:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            there = self._forks.pop(pid)
            with suppress(KeyError):
                self._choose.unregister(there)
            with suppress(OSError):
                there.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            there.close()


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    place = Path(sys.argv[1])
    preload(place.name.partition("-")[0])
    Server(str(place)).serve(Path("/proc") / os.environ["RAIRL_WARM_OWNER"])
