"""Pointers to the runs of an output folder that MLflow does not wholly have: nobody looks at the others.

    OUTPUT/.unsent-UID/ID    a file that holds the run folder's path, seen from OUTPUT

A run has one from its first record until all of it is sent and it is closed. ID is in the first line of the
spool, which never changes: so a folder that was moved aside (NAME~1) is told from the run that took its name.
Paths are relative, so that OUTPUT may be moved. Every user has a folder, and so need not write to another's.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rairl_ray.files import write_atomic

SPOOL = "tracking_spool.jsonl"
CURSOR = "tracking_cursor.json"


def pointers(output: Path) -> list[Path]:
    """Those of this user; none where there is no such folder, or it cannot be read."""
    with contextlib.suppress(OSError):
        return sorted(path for path in _place(output).iterdir() if not path.name.startswith("."))
    return []


def settle(output: Path, folder: Path) -> None:
    """See that a run folder has its pointer exactly as long as it is unfinished. Raises OSError."""
    run = _run(folder)
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
    return next((path for path in _candidates(folder) if _run(path) == pointer.name), None)


def _candidates(folder: Path) -> Iterator[Path]:
    yield folder
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder.parent):
            if name.startswith(f"{folder.name}~"):
                yield folder.with_name(name)


def unfinished(folder: Path) -> bool:
    """Whether MLflow lacks something of a folder with a spool, or its run is not closed."""
    cursor = saved_cursor(folder)
    offsets = [value for name, value in cursor.items() if name.endswith("_offset")]
    return not cursor or not cursor["closed"] or min(offsets) < (folder / SPOOL).stat().st_size


def saved_cursor(folder: Path) -> dict[str, Any]:
    """Empty where there is none: that driver died before it sent anything."""
    try:
        return json.loads((folder / CURSOR).read_bytes())
    except FileNotFoundError:
        return {}


def _place(output: Path) -> Path:
    return output / f".unsent-{os.getuid()}"


def _run(folder: Path) -> str | None:
    """What names the spool in this folder: the session of its first start. None without a spool."""
    try:
        with open(folder / SPOOL, "rb") as file:
            for line in file:
                if line.startswith(b'{"kind": "start"') and line.endswith(b"\n"):
                    with contextlib.suppress(ValueError):  # a line that a kill tore off
                        return json.loads(line)["session"]
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None
