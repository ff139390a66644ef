"""Which code and which process made something: noted beside it, and asked later by somebody else."""

from __future__ import annotations

import os
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any


def git_state() -> dict[str, str]:
    """Commit of this code and whether it was edited since; "unknown" where it is no git checkout."""
    here = Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        # Fails for a copy that lies, untracked, in somebody else's checkout: that commit is not ours.
        git("ls-files", "--error-unmatch", here.name)
        return {
            "git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(bool(git("status", "--porcelain"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {"git.commit": "unknown", "git.dirty": "unknown"}


def process_identity() -> dict[str, Any]:
    """This process, as `may_be_alive` tells it from every other; `session` is new with each call."""
    pid = os.getpid()
    return {"session": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "born": _born(pid)}


def may_be_alive(process: dict[str, Any]) -> bool:
    """Whether the process of an identity may still be there; True for what cannot be known here."""
    if process["host"] != socket.gethostname():
        return True
    if process["born"] is not None:
        return _born(process["pid"]) == process["born"]
    try:
        os.kill(process["pid"], 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _born(pid: int) -> str | None:
    """When a process started, so that another one with its number is not taken for it; None if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
    # The name, in parentheses, may hold anything. The 22nd field is the start in clock ticks since boot.
    return f"{boot} {stat.rpartition(')')[2].split()[19]}"
