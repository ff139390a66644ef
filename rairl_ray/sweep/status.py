"""How a sweep stands, from its folders alone: in any shell, and as the live display of the one that runs it."""

from __future__ import annotations

import difflib
import json
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from rairl_ray.config.load import read_saved
from rairl_ray.display import Display, clock, table_of
from rairl_ray.errors import UserError
from rairl_ray.metrics import TIME_STEP
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.lineage import lineage
from rairl_ray.sweep.points import SAVED, newest_folder, read_sweep, sweep_folder, trial_log
from rairl_ray.sweep.result import FINISHED, NOT_STARTED, STOPPED, UNFINISHED, final_values, last_line, state_of
from rairl_ray.sweep.stopping import stop_request, trial_ids

RUNNING, STARTING, STOPPING, FAILED, ASKED = "running", "starting", "stopping", "failed", "stopped"
ORDER = (RUNNING, STOPPING, STARTING, FINISHED, STOPPED, ASKED, UNFINISHED, FAILED, NOT_STARTED)
FEW = 20
"""So many trials are shown one by one."""
BEST, RUNS, FAILURES = 5, 16, 5
"""Rows of each table where there are more."""
FORKS_SHOWN = 8
TAIL_BYTES = 64 * 1024
SECONDS_BETWEEN_LOOKS = 2.0


@dataclass(frozen=True)
class Seen:
    """One trial as its folder shows it."""

    trial: str
    state: str
    step: int | None = None
    steps: int | None = None
    value: float = math.nan
    """Of the final evaluation, or the newest of the run."""
    seconds_left: float | None = None
    """Of its steps, at the pace of the last ones; without the final evaluation."""


@dataclass(frozen=True)
class Block:
    """A table under its title."""

    title: str
    rows: Sequence[dict[str, object]]
    columns: Sequence[str]


def find_sweep(text: str, changes: Sequence[str] = ()) -> SweepFile:
    """The sweep of a file, a folder, a URI or a name below runs/ or `output_dir=`; a remote one is fetched.

    Raises UserError naming the near ones.
    """
    file = load_sweep(text, changes) if Path(text).is_file() else None
    said = [word.partition("=")[2] for word in changes if word.startswith("output_dir=")]
    output = file.output_dir if file is not None else said[-1] if said else "runs"
    if "://" in output or "://" in text:
        from rairl_ray.trainer.outputs import read_sweep_of  # pyarrow, which others do without

        found = [Path(read_sweep_of(text if file is None else file.name, output))]
    else:
        found = [Path(text), Path(output) / text] if file is None else [sweep_folder(file)]
    started = [folder for folder in found if (folder / SAVED).is_file()]
    if not started and file is not None:
        raise UserError(f"{text}: has not been started: there is no {output}/{file.name}")
    if not started:
        raise UserError(f"{text}: no such sweep; {_near(text)}")
    return read_sweep(started[0])


def _near(text: str) -> str:
    names = []
    for root, folders, files in os.walk("runs"):
        if SAVED in files:
            names.append(Path(root).relative_to("runs").as_posix())
        if SAVED in files or "config.yaml" in files:
            folders.clear()
    near = difflib.get_close_matches(text.removeprefix("runs/").rstrip("/"), names, n=3, cutoff=0.0)
    return f"nearest: {', '.join(near)}" if near else "runs/ has none; name its file or its folder"


def look(file: SweepFile) -> list[Seen]:
    """Every trial, in the sweep's order."""
    runs = RunFolder(sweep_folder(file)).holder is not None
    return [_seen(file, name, runs) for name in trial_ids(file)]


def _seen(file: SweepFile, name: str, runs: bool) -> Seen:
    folder = RunFolder(newest_folder(file, name))
    state = _state(file, name, folder, runs)
    if state == NOT_STARTED:
        return Seen(name, state)
    rows = _last_rows(folder.metrics)
    metric = file.metrics[0]
    values = [row[metric] for row in rows if isinstance(row.get(metric), int | float)]
    value = values[-1] if values else math.nan
    if state == FINISHED:
        value = final_values(folder).get(metric, math.nan)
    step = int(rows[-1]["step"]) if rows else None
    if state not in (RUNNING, STOPPING):
        return Seen(name, state, step, None, value)
    steps = read_saved(folder.config).trainer.steps
    # Warm-up steps count up to 0 and take their own time.
    times = [row[TIME_STEP] for row in rows[-10:] if row["step"] > 0 and row.get(TIME_STEP)]
    left = sum(times) / len(times) * max(0, steps - (step or 0)) if times else None
    return Seen(name, state, step, steps, value, left)


def _state(file: SweepFile, name: str, folder: RunFolder, runs: bool) -> str:
    state = state_of(file, name)
    if state in (FINISHED, STOPPED):
        return state
    asked = any(stop_request(file, request).exists() for request in ("sweep", name))
    if folder.holder is not None:
        return STOPPING if asked else RUNNING
    if asked:
        return ASKED if state == UNFINISHED else state
    if state == UNFINISHED:
        return FAILED if " failed: " in last_line(folder.events) else UNFINISHED
    if trial_log(file, name).is_file():
        return STARTING if runs else FAILED
    return state


def _last_rows(path: Path) -> list[dict[str, Any]]:
    """The newest rows of metrics.jsonl, without reading the whole of a long one."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            lines = file.read().split(b"\n")[1 if size > TAIL_BYTES else 0 :]
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows


def headline(file: SweepFile, seen: Sequence[Seen]) -> str:
    """Who runs the sweep, and how many trials are in each state."""
    states = Counter(item.state for item in seen)
    counts = ", ".join(f"{states[state]} {state}" for state in ORDER if states[state])
    return f"{file.name}: {len(seen)} trials: {counts or 'none yet'}"


def blocks(file: SweepFile, seen: Sequence[Seen]) -> list[Block]:
    """All trials where they are few; else those that run, the best ones, and those that failed."""
    metric = file.metrics[0]
    columns = ["trial", "state", "step", metric, "ETA"]
    known = [item for item in seen if math.isfinite(item.value)]
    best = sorted(known, key=lambda item: item.value, reverse=file.modes[0] == "max")
    if len(seen) <= FEW:
        top = f"; best so far: {best[0].trial} {best[0].value:.4g}" if best else ""
        every = Block(f"{metric}, {file.modes[0]}{top}", [_row(item, metric) for item in seen], columns)
        return [every, *_forks(file)]
    run = [item for item in seen if item.state in (RUNNING, STOPPING, STARTING)]
    failed = [item for item in seen if item.state == FAILED]
    said = {item.trial: last_line(trial_log(file, item.trial)) for item in failed[:FAILURES]}
    made = [
        Block(_of("running", run, RUNS), [_row(item, metric) for item in run[:RUNS]], columns),
        Block(_of("best so far", best, BEST), [_row(item, metric) for item in best[:BEST]], columns[:4]),
        Block(
            _of("failed", failed, FAILURES),
            [{"trial": name, "said": text[:100]} for name, text in said.items()],
            ["trial", "said"],
        ),
        *_forks(file),
    ]
    return [block for block in made if block.rows]


def _forks(file: SweepFile) -> list[Block]:
    """The newest forks of a population."""
    rows = lineage(file) if file.scheduler.type == "pbt" else []
    shown: list[dict[str, object]] = [
        {"trial": row.member, "from": row.origin, "values": row.told} for row in rows[-FORKS_SHOWN:]
    ]
    title = "forks" if len(rows) <= FORKS_SHOWN else f"forks (the newest {FORKS_SHOWN} of {len(rows)})"
    return [Block(title, shown, ["trial", "from", "values"])] if rows else []


def _of(title: str, items: Sequence[Seen], most: int) -> str:
    return f"{title} ({most} of {len(items)})" if len(items) > most else title


def _row(item: Seen, metric: str) -> dict[str, object]:
    step = None if item.step is None else f"{item.step}/{item.steps}" if item.steps else str(item.step)
    eta = None if item.seconds_left is None else clock(item.seconds_left)
    value = f"{item.value:.4g}" if math.isfinite(item.value) else None
    return {"trial": item.trial, "state": item.state, "step": step, metric: value, "ETA": eta}


def show_status(file: SweepFile, display: Display) -> None:
    """Print how a sweep stands."""
    seen, holder = look(file), RunFolder(sweep_folder(file)).holder
    display.note(headline(file, seen))
    display.note(f"run by {holder}" if holder else "does not run; go on with launch.py sweep FILE --resume")
    for block in blocks(file, seen):
        display.table(block.title, block.rows, block.columns)


class SweepDisplay(Display):
    """The display of a sweep: in a terminal, its status instead of a bar."""

    def __init__(self, file: SweepFile, total: int) -> None:
        super().__init__(file.name, total)
        self._file = file
        self._looked, self._shown = -math.inf, Group()

    def _draw(self) -> RenderableType:
        try:
            if time.monotonic() - self._looked > SECONDS_BETWEEN_LOOKS:
                seen = look(self._file)
                tables = [
                    table_of(block.title, block.rows, block.columns) for block in blocks(self._file, seen)
                ]
                self._shown = Group(*tables, Text(headline(self._file, seen)))
                self._looked = time.monotonic()
        except Exception:
            # A folder that is just being made or moved: next time.
            self._looked = time.monotonic()
        return self._shown
