"""`budget.gpu_hours`: what the trials of a sweep have held of GPUs, over all processes that worked on it."""

from __future__ import annotations

import json
import time
from contextlib import suppress

from rairl_ray.actors.placement import PlacementPlan
from rairl_ray.errors import ConfigError
from rairl_ray.files import write_atomic
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import sweep_folder

SPENT = "gpu_hours.json"
SAVE_SECONDS = 60.0
"""A kill loses the account of so much time at most."""


class GpuMeter:
    """GPUs of each running trial's placement times wall time."""

    def __init__(self, file: SweepFile) -> None:
        self._file, self._limit = sweep_folder(file) / SPENT, file.budget.gpu_hours
        self._held: dict[str, float] = {}
        """Trial that runs -> its GPUs."""
        self._hours = 0.0
        with suppress(OSError, ValueError):
            self._hours = float(json.loads(self._file.read_text())["gpu_hours"])
        self._since = self._saved = time.monotonic()

    def starts(self, trial: str, gpus: float) -> None:
        self.hours()
        self._held[trial] = gpus

    def ends(self, trial: str) -> None:
        self.hours()
        self._held.pop(trial, None)
        self.save()

    def hours(self) -> float:
        """GPU hours until now."""
        now = time.monotonic()
        self._hours += sum(self._held.values()) * (now - self._since) / 3600
        self._since = now
        if now - self._saved > SAVE_SECONDS:
            self.save()
        return self._hours

    @property
    def exhausted(self) -> bool:
        return self._limit is not None and self.hours() >= self._limit

    def check(self, placement: PlacementPlan) -> None:
        """Refuse a budget that means nothing, or is spent already. Raises ConfigError."""
        if self._limit is None:
            return
        if placement.total("GPU") == 0:
            raise ConfigError(
                f"budget.gpu_hours={self._limit:g}: the trials' placement has no GPU; use budget.hours"
            )
        if self.exhausted:
            raise ConfigError(
                f"budget.gpu_hours={self._limit:g}: the sweep has held GPUs for {self._hours:.2f} hours "
                "already; give more, or take it out"
            )

    def save(self) -> None:
        self._saved = time.monotonic()
        if self._limit is not None:
            write_atomic(self._file, json.dumps({"gpu_hours": self._hours}) + "\n")
