"""Finds the runs of an output folder that MLflow does not wholly have, sends their rest and closes them.

    OUTPUT/.unsent-UID/ID    a pointer: a file that holds the run folder's path, seen from OUTPUT

A run has one from its first record until all of it is sent and it is closed; nobody looks at the others. ID is
in the first line of the spool, which never changes: so a folder that was moved aside (NAME~1) is told from the
run that took its name. Paths are relative, so that OUTPUT may be moved. Every user has pointers of his own.

Touched are only folders of this user that no process carries (its lock is free), and whose last driver either
said how it ended or is proven dead: it was started on this host, and there is no such process now.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import Any

from rairl_ray.config.load import read_saved
from rairl_ray.files import write_atomic
from rairl_ray.provenance import may_be_alive
from rairl_ray.tracking.spool import first_session, read_records, saved_cursor, unfinished
from rairl_ray.tracking.uploader import Uploader, server_names, tracking_uri

EVERY_SECONDS = 60.0
"""Between two attempts at folders whose server did not answer."""


def pointers(output: Path) -> list[Path]:
    """Those of this user; none where there is no such folder, or it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(path for path in _place(output).iterdir() if not path.name.startswith("."))
    return []


def settle(output: Path, folder: Path) -> None:
    """See that a run folder has its pointer exactly as long as it is unfinished. Raises OSError."""
    run = first_session(folder)
    if run is None:
        return
    pointer, path = _place(output) / run, os.path.relpath(folder, output)
    if not unfinished(folder):
        pointer.unlink(missing_ok=True)
    # Asked anew, because a resume may have begun in between, and its pointer was the one that went.
    if unfinished(folder) and not (pointer.exists() and pointer.read_text() == path):
        pointer.parent.mkdir(exist_ok=True)
        write_atomic(pointer, path)


def find(output: Path, pointer: Path) -> Path | None:
    """The run folder, where it is now; None where it is gone. Raises OSError where that cannot be seen."""
    folder = output / pointer.read_text()
    if first_session(folder) == pointer.name:
        return folder
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder.parent):
            if name.startswith(f"{folder.name}~") and first_session(folder.with_name(name)) == pointer.name:
                return folder.with_name(name)
    return None


def _place(output: Path) -> Path:
    return output / f".unsent-{os.getuid()}"


class UnsentRuns:
    """A thread that sends what other runs of `output` left unsent, until it is stopped."""

    def __init__(self, output: Path, own: Path) -> None:
        self._output, self._own = output, own
        self._stopped = threading.Event()
        self._uploader: Uploader | None = None
        self.thread = threading.Thread(target=self._loop, name="tracking-unsent-runs", daemon=True)

    def stop(self) -> None:
        """End after the request that runs now; the rest stays where it is."""
        self._stopped.set()
        if self._uploader is not None:
            self._uploader.spool.close()

    def _loop(self) -> None:
        left = pointers(self._output)
        while left and not self._stopped.is_set():
            left = [pointer for pointer in left if not self.finish(pointer)]
            self._stopped.wait(EVERY_SECONDS if left else 0)

    def finish(self, pointer: Path) -> bool:
        """Whether nothing is left to do behind this pointer, by us."""
        try:
            folder = find(self._output, pointer)
            if folder is None:
                pointer.unlink(missing_ok=True)
            elif folder != self._own and folder.stat().st_uid == os.getuid():
                return self._send(folder)
            return True
        except Exception:
            # A dead server, a disk, a folder that is just being removed: next time.
            return False

    def _send(self, folder: Path) -> bool:
        if unfinished(folder):
            self._uploader = uploader = _open(self._output, folder)
            if uploader is None:
                return True
            # Only now: whoever stops us closes the spool that he sees.
            if self._stopped.is_set():
                uploader.spool.close()
            try:
                last = _unfinished_start(uploader.spool.path)
                if last is not None:
                    if may_be_alive(last):
                        return True
                    uploader.spool.put({"kind": "finish", "status": "KILLED", "session": last["session"]})
                if not uploader.once():
                    return False
            finally:
                uploader.spool.close()
        settle(self._output, folder)
        return True


def _open(output: Path, folder: Path) -> Uploader | None:
    """The folder's spool with its lock held; None where it is not ours to touch."""
    uri = tracking_uri(read_saved(folder / "config.yaml"), output)
    if uri is None:
        return None
    names = server_names(uri, output)
    if saved_cursor(folder).get("server", names[0]) not in names:
        return None
    uploader = Uploader(uri, output, folder, warn=lambda topic, text: None, on_failure=lambda error: None)
    return uploader if uploader.spool.own(strict=True) else None


def _unfinished_start(spool: Path) -> dict[str, Any] | None:
    """The last `start` record, if its process did not say how it ended."""
    last = None
    for record, _ in read_records(spool, "start", "finish"):
        if record is not None and record["kind"] == "start":
            last = record
        elif record is not None and last is not None and record["session"] == last["session"]:
            last = None
    return last
