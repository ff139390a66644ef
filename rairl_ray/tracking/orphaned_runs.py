"""Sends the rows and closes the runs that dead drivers left behind in an output folder.

Touched are only run folders of this user that no process carries (its lock is free), and whose last driver
either said how it ended or is proven dead: it was started on this host, and there is no such process now.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rairl_ray.config.load import read_saved
from rairl_ray.tracking.uploader import CURSOR, SPOOL, Uploader, server_hash, tracking_uri

EVERY_SECONDS = 60.0
"""Between two attempts at folders whose server did not answer."""


class OrphanedRuns:
    """A thread that sends what other run folders below `output` still hold, until it is stopped."""

    def __init__(self, output: Path, own: Path) -> None:
        self._output, self._own = output, own
        self._stopped = threading.Event()
        self._uploader: Uploader | None = None
        self.thread = threading.Thread(target=self._loop, name="tracking-orphaned-runs", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """End after the request that runs now; the rest stays where it is."""
        self._stopped.set()
        if self._uploader is not None:
            self._uploader.spool.close()

    def _loop(self) -> None:
        folders = [folder for folder in run_folders(self._output) if folder != self._own]
        while folders and not self._stopped.is_set():
            folders = [folder for folder in folders if not self._finish(folder)]
            self._stopped.wait(EVERY_SECONDS if folders else 0)

    def _finish(self, folder: Path) -> bool:
        """Whether nothing is left to do in this folder, by us."""
        try:
            self._uploader = uploader = _open(folder)
            if uploader is None:
                return True
            # Only now: whoever stops us closes the spool that he sees.
            if self._stopped.is_set():
                uploader.spool.close()
            try:
                last = _unfinished_start(uploader)
                if last is not None:
                    if alive(last):
                        return True
                    uploader.spool.put({"kind": "finish", "status": "KILLED", "session": last["session"]})
                return uploader.once()
            finally:
                uploader.spool.close()
        except Exception:
            # A dead server, a disk, a folder that is just being removed: next time.
            return False


def run_folders(output: Path) -> Iterator[Path]:
    """Folders below `output` with something that MLflow does not have, or a run that is not closed."""
    for root, folders, files in os.walk(output):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "mlartifacts"]
        if SPOOL in files or "config.yaml" in files:
            folders.clear()
        if SPOOL in files and _unfinished(Path(root)):
            yield Path(root)


def identity() -> dict[str, Any]:
    """What a `start` record says about the process that writes it."""
    pid = os.getpid()
    return {"session": uuid.uuid4().hex, "host": socket.gethostname(), "pid": pid, "born": _born(pid)}


def alive(start: dict[str, Any]) -> bool:
    """Whether the process of a `start` record may still be there; True for what cannot be known here."""
    if start["host"] != socket.gethostname():
        return True
    if start["born"] is not None:
        return _born(start["pid"]) == start["born"]
    try:
        os.kill(start["pid"], 0)
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


def _open(folder: Path) -> Uploader | None:
    """The folder's spool with its lock held; None where it is not ours to touch."""
    config = read_saved(folder / "config.yaml")
    output = folder.parents[len(Path(config.name).parts) - 1]
    uri = tracking_uri(config, output)
    if uri is None or _saved_cursor(folder).get("server", server_hash(uri)) != server_hash(uri):
        return None
    uploader = Uploader(uri, output, folder, warn=lambda topic, text: None, on_failure=lambda error: None)
    return uploader if uploader.spool.own(strict=True) else None


def _saved_cursor(folder: Path) -> dict[str, Any]:
    """Empty where there is none: that driver died before it sent anything."""
    try:
        return json.loads((folder / CURSOR).read_bytes())
    except FileNotFoundError:
        return {}


def _unfinished(folder: Path) -> bool:
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        cursor = _saved_cursor(folder)
        offsets = [value for name, value in cursor.items() if name.endswith("_offset")]
        return not cursor or not cursor["closed"] or min(offsets) < (folder / SPOOL).stat().st_size
    except (OSError, ValueError, KeyError):
        return False


def _unfinished_start(uploader: Uploader) -> dict[str, Any] | None:
    """The last `start` record, if no `finish` came after it."""
    last = None
    for record, _ in uploader.spool.records("start", "finish"):
        if record is not None:
            last = record if record["kind"] == "start" else None
    return last
