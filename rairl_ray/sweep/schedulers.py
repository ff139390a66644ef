"""Which trials are stopped early: Tune's own rules, over the metric's reports in the run folders.

A report is known by its number in the whole run, so a trial whose process was started anew goes on counting.
Nothing here pauses a trial, which Tune's synchronous HyperBand does at every rung: a pause ends the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from rairl_ray.config.variants import complete
from rairl_ray.keys import keyed_random
from rairl_ray.sweep.file import Scheduler, SweepFile
from rairl_ray.sweep.points import stop_mark
from rairl_ray.sweep.supervise import REPORT


def id_of(trial: Any) -> str:
    """Our id of one of Tune's trials."""
    return Path(trial.config["spec"]["folder"]).name


class Halving(AsyncHyperBandScheduler):
    """ASHA, and as `hyperband` its brackets: what HyperBand hedges, without a trial that waits for others."""

    def __init__(self, file: SweepFile) -> None:
        settings = file.scheduler
        super().__init__(
            time_attr=REPORT,
            grace_period=settings.grace,
            reduction_factor=settings.reduction,
            max_t=settings.longest,
            brackets=settings.brackets if settings.type == "hyperband" else 1,
            stop_last_trials=False,
        )
        self._file = file

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Tune's odds, drawn by the trial's id alone: a resume puts it into the same bracket."""
        super().on_trial_add(tune_controller, trial)
        sizes = [len(bracket._rungs) for bracket in self._brackets]
        odds = [math.exp(size - max(sizes)) for size in sizes]
        draw = keyed_random("bracket", self._file.search.seed, id_of(trial))
        self._trial_info[trial.trial_id] = draw.choices(self._brackets, odds)[0]

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return _marked(self._file, trial, super().on_trial_result(tune_controller, trial, result))


class Median(MedianStoppingRule):
    """Vizier's median stopping rule."""

    def __init__(self, file: SweepFile) -> None:
        super().__init__(
            time_attr=REPORT,
            grace_period=file.scheduler.grace,
            min_samples_required=file.scheduler.min_samples,
            min_time_slice=math.inf,
        )
        self._file = file

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not math.isfinite(result.get(self._file.metrics[0], math.nan)):
            return str(TrialScheduler.CONTINUE)
        return _marked(self._file, trial, super().on_trial_result(tune_controller, trial, result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: the last report is the final evaluation, which has no place among those of a run."""


def _marked(file: SweepFile, trial: Any, action: str) -> str:
    """Mark what is stopped in the sweep's folder, so that no resume trains it on."""
    if action == TrialScheduler.STOP:
        mark = stop_mark(file, id_of(trial))
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return str(action)


SCHEDULERS: dict[str, Callable[[SweepFile], Any] | None] = {
    "none": None,
    "asha": Halving,
    "hyperband": Halving,
    "median": Median,
    "pbt": None,
}
"""Those of Tune; `pbt` is a run of its own kind (`population.py`)."""
complete(f"{__name__}.SCHEDULERS", SCHEDULERS, Scheduler, "type")


def scheduler_of(file: SweepFile) -> Any:
    """Tune's scheduler; None: every trial runs to its end."""
    kind = SCHEDULERS[file.scheduler.type]
    return None if kind is None else kind(file)
