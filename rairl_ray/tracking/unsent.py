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

from rairl_ray.config.load import read_saved
from rairl_ray.files import write_atomic
from rairl_ray.provenance import may_be_alive
from rairl_ray.tracking.spool import Record, first_session, read_records, unfinished
from rairl_ray.tracking.uploader import Uploader, tracking_uri

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

    def settle_own(self) -> None:
        """See to the pointer of our own run; without one, what is left of it waits for `--resume` alone."""
        with contextlib.suppress(OSError):
            settle(self._output, self._own)

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
                if unfinished(folder) and not self._send(folder):
                    return False
                settle(self._output, folder)
            return True
        except Exception:
            # A dead server, a disk, a folder that is just being removed: next time.
            return False

    def _send(self, folder: Path) -> bool:
        """Whether all of it is sent, or it is not ours to touch."""
        uri = tracking_uri(read_saved(folder / "config.yaml"), self._output)
        if uri is None:
            return True
        self._uploader = Uploader(uri, self._output, folder, warn=lambda topic, text: None)
        with contextlib.closing(self._uploader.spool) as spool:
            # Asked only now, because whoever stops us closes the spool that he sees.
            if self._stopped.is_set() or spool.elsewhere or not spool.own(strict=True):
                return True
            last = _unfinished_start(spool.path)
            if last is not None:
                if may_be_alive(last):
                    return True
                spool.put({"kind": "finish", "status": "KILLED", "session": last["session"]})
            return self._uploader.once()


def _unfinished_start(spool: Path) -> Record | None:
    """The last `start` record, if its process did not say how it ended."""
    records = [record for record, _ in read_records(spool, "start", "finish") if record is not None]
    starts = [record for record in records if record["kind"] == "start"]
    ended = {record["session"] for record in records if record["kind"] == "finish"}
    return starts[-1] if starts and starts[-1]["session"] not in ended else None
