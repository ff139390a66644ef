"""Sends the rows and closes the runs that dead drivers left behind in an output folder.

Looked at are only runs with a pointer (unsent.py), and touched only folders of this user that no process
carries (its lock is free), and whose last driver either said how it ended or is proven dead: it was started on
this host, and there is no such process now.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from rairl_ray.config.load import read_saved
from rairl_ray.provenance import may_be_alive
from rairl_ray.tracking.unsent import find, pointers, saved_cursor, settle, unfinished
from rairl_ray.tracking.uploader import Uploader, server_names, tracking_uri

EVERY_SECONDS = 60.0
"""Between two attempts at folders whose server did not answer."""


class OrphanedRuns:
    """A thread that sends what other runs of `output` left unsent, until it is stopped."""

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
        left = pointers(self._output)
        while left and not self._stopped.is_set():
            left = [pointer for pointer in left if not self._finish(pointer)]
            self._stopped.wait(EVERY_SECONDS if left else 0)

    def _finish(self, pointer: Path) -> bool:
        """Whether nothing is left to do behind this pointer, by us."""
        try:
            folder = find(self._output, pointer)
            if folder is None:
                pointer.unlink(missing_ok=True)
                return True
            if folder == self._own or folder.stat().st_uid != os.getuid():
                return True
            return self._send(folder)
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
                last = _unfinished_start(uploader)
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


def _unfinished_start(uploader: Uploader) -> dict[str, Any] | None:
    """The last `start` record, if its process did not say how it ended."""
    last = None
    for record, _ in uploader.spool.records("start", "finish"):
        if record is not None and record["kind"] == "start":
            last = record
        elif record is not None and last is not None and record["session"] == last["session"]:
            last = None
    return last
