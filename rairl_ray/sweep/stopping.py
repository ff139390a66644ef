"""Ending a sweep or one of its trials cleanly: a file asks, whoever runs the sweep or watches the trial obeys.

launch.py sweep --stop NAME ──file──> the sweep's process ──SIGTERM to itself──> as Ctrl-C there
                                 └──> each trial's watcher (supervise.py) ──SIGTERM──> the run saves, leaves
"""

from __future__ import annotations

import difflib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rairl_ray.display import Display
from rairl_ray.errors import UserError
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import planned, sweep_folder
from rairl_ray.sweep.result import DONE, state_of

WHOLE = "sweep"
POLL_SECONDS = 1.0


def stop_request(file: SweepFile, name: str = WHOLE) -> Path:
    """The file that asks for the end of a trial, or of the whole sweep."""
    return sweep_folder(file) / "stop_requests" / name


def leave_request(request: Path) -> None:
    """Ask; whoever runs the sweep finds it."""
    request.parent.mkdir(exist_ok=True)
    request.touch()


def forget_requests(file: SweepFile) -> None:
    shutil.rmtree(stop_request(file).parent, ignore_errors=True)


def ask_to_stop(file: SweepFile, trial: str | None) -> str:
    """Ask for the end of a running sweep or of one trial; what will happen now.

    Raises UserError for a sweep that does not run, and for a trial that is unknown or has ended.
    """
    holder = RunFolder(sweep_folder(file)).holder
    if holder is None:
        raise UserError(
            f"--stop {file.name}: it does not run; launch.py sweep --status {file.name} shows its trials"
        )
    name = WHOLE if trial is None else _trial(file, trial)
    leave_request(stop_request(file, name))
    if name == WHOLE:
        return f"{file.name} ({holder}) stops: trials that run save a checkpoint; go on with --resume"
    return f"{name} stops with a checkpoint; --resume of the sweep goes on with it"


def trial_ids(file: SweepFile) -> list[str]:
    """Trials that are planned, in order, then others that have a folder."""
    folder = sweep_folder(file) / "trials"
    there = [path.name for path in sorted(folder.glob("*")) if path.is_dir() and "~" not in path.name]
    return list(dict.fromkeys([*planned(file), *there]))


def _trial(file: SweepFile, text: str) -> str:
    """The id that a person means: all of it, or its last six digits."""
    ids = trial_ids(file)
    found = [name for name in ids if name == text or name.rpartition("-")[2] == text]
    if len(found) != 1:
        near = difflib.get_close_matches(text, ids, n=3, cutoff=0.0)
        raise UserError(f"--trial {text}: no trial of {file.name}; nearest: {', '.join(near)}")
    if (state := state_of(file, found[0])) in DONE:
        raise UserError(f"--trial {found[0]}: has ended ({state}); nothing to stop")
    return found[0]


@contextmanager
def listening(file: SweepFile, display: Display) -> Iterator[None]:
    """Ctrl-C, SIGTERM and `--stop` end the sweep cleanly; a second signal ends it at once."""
    request, told, over = stop_request(file), threading.Event(), threading.Event()

    def on_signal(number: int, _frame: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()
        leave_request(stop_request(file))
        display.note("stopping: trials that run save a checkpoint and leave; once more ends at once")

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            if request.exists():
                if not told.is_set():
                    # A warm start that is being trained has a handler of its own.
                    os.kill(os.getpid(), signal.SIGTERM)
                return

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    watcher = threading.Thread(target=watch, name="sweep-stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        for number, handler in before.items():
            signal.signal(number, handler)
