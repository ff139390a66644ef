"""The run folder (README.md): everything of a run; here its configuration, rows and events are written.

It alone is enough to resume, evaluate and report. All appends survive a kill: a torn last line is
ignored by readers. One process trains in it at a time (`lock`); any number may read.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rairl_ray.errors import ConfigError, DataError, ResumeError
from rairl_ray.files import append_line, json_text, read_json_lines, write_atomic, write_json_lines
from rairl_ray.metrics import DISCRIMINATOR_WARMUP_STEP, POLICY_LOSS

Summary = dict[str, dict[str, float]]
"""Metric name -> {"value", "low", "high", "n"}; "low" and "high" are missing where there is no interval."""

TRAINS = {POLICY_LOSS, DISCRIMINATOR_WARMUP_STEP}
"""A row of metrics.jsonl with none of these only evaluates."""

TRANSFER_PREFIX = "transfer-"
"""How evaluations begin that belong to a transfer matrix (transfer.json), which holds their numbers."""


class RunFolder:
    """Paths and small files of one run. Making the object touches nothing; `create` makes the folders."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).absolute()
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.events = self.root / "events.log"
        self.rollouts = self.root / "rollouts"
        self.evaluations = self.root / "evaluations"
        self.report = self.root / "report"
        self.fork = self.root / "fork.json"
        self.checkpoints = self.root / "checkpoints"
        self.final_policy = self.root / "final" / "policy"
        self.final_reward_model = self.root / "final" / "reward_model"

    def create(self) -> None:
        """Make the folders. Raises ConfigError where the place cannot be written."""
        try:
            for folder in (self.rollouts, self.evaluations, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".writable-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"output_dir: cannot write to {self.root} ({error.strerror}); "
                "give a folder you may write to with output_dir=FOLDER"
            ) from error

    @property
    def has_run(self) -> bool:
        """Whether a run was already started here."""
        return self.metrics.exists() or any(self.checkpoints.glob("step-*"))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder as its only writer; the kernel gives it back when this process ends in any way.

        Raises ResumeError naming the holder if another process has it.
        """
        with open(self.root / ".lock", "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ResumeError(
                    f"{self.root}: {holder} is writing to this run folder; "
                    "stop it first, or choose another one with name=NAME"
                ) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)

    def write_fork(self, run: Path, step: int, changed: Sequence[str]) -> None:
        """Say whose checkpoint this run goes on from, and what was changed."""
        write_atomic(self.fork, json_text({"run": str(run), "step": step, "changed": list(changed)}) + "\n")

    def read_fork(self) -> dict[str, Any] | None:
        """`run`, `step` and `changed` of a fork; None for a run that is none."""
        try:
            found = json.loads(self.fork.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and {"run", "step", "changed"} <= found.keys() else None

    @property
    def holder(self) -> str | None:
        """The process that has the folder (`lock`); None for one of this host that is no more."""
        try:
            text = (self.root / ".lock").read_text(encoding="utf-8")
        except OSError:
            return None
        found = re.fullmatch(r"process (\d+) on (.*)", text)
        if found is None or (found[2] == socket.gethostname() and not Path(f"/proc/{found[1]}").exists()):
            return None
        return text

    # --- metrics and events ----------------------------------------------------------------------

    def append_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl; several lines may share a step. NaN and infinities are written as null."""
        append_line(self.metrics, json_text({"step": step, **{name: float(x) for name, x in metrics.items()}}))

    def read_metrics(self) -> list[dict[str, float]]:
        """Lines of metrics.jsonl in order, null read as NaN; none if the file does not exist."""
        if not self.metrics.exists():
            return []
        rows = read_json_lines(self.metrics, skip_broken=True)
        return [{name: math.nan if x is None else x for name, x in row.items()} for row in rows]

    def truncate_to_step(self, step: int, evaluated: int | None = None) -> int:
        """Forget metrics and rollouts of later steps, which a resumed run will write again; lines dropped.

        `evaluated`: the last step whose evaluation stays where that has a row of its own; `step` by default.
        """
        last_evaluated = step if evaluated is None else evaluated
        if not self.metrics.exists():
            return 0
        rows = read_json_lines(self.metrics, skip_broken=True)
        kept = [row for row in rows if row["step"] <= (step if TRAINS & row.keys() else last_evaluated)]
        write_json_lines(self.metrics, kept)
        for path in self.rollouts.glob("step-*.jsonl"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        return len(rows) - len(kept)

    def event(self, text: str) -> None:
        """One line with the time (UTC) in events.log. It never raises: a note must not end a run."""
        with suppress(OSError):
            append_line(self.events, f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}")

    # --- rollouts, evaluations, configuration ----------------------------------------------------

    def write_config(self, text: str) -> None:
        """Save the resolved configuration whole."""
        write_atomic(self.config, text)

    def write_rollouts(self, step: int, rows: list[dict[str, Any]]) -> Path:
        """Write the sample rollouts of a step to rollouts/step-000020.jsonl, replacing an earlier version."""
        path = self.rollouts / f"step-{step:06d}.jsonl"
        write_json_lines(path, rows)
        return path

    def evaluation(self, name: str) -> Path:
        """Folder evaluations/NAME, made if needed; it holds rows.jsonl and summary.json."""
        folder = self.evaluations / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def write_summary(path: Path, summary: Summary) -> None:
    """Write a flat summary.json. Raises ValueError for an entry without a value."""
    for name, entry in summary.items():
        if "value" not in entry or not set(entry) <= {"value", "low", "high", "n"}:
            raise ValueError(
                f"summary entry {name} needs value and may have low, high, n; it has {sorted(entry)}"
            )
    write_atomic(path, json_text(summary, indent=1) + "\n")


def read_summary(path: Path) -> Summary:
    """Read a summary.json; null is read as NaN. Raises DataError for a broken one."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: {part: math.nan if x is None else x for part, x in entry.items()}
            for name, entry in summary.items()
        }
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a summary of metrics ({error}); evaluate the run again") from error
