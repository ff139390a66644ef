"""Which trials are stopped early: Tune's own rules, over the metric's reports in the run folders.

A report is known by its number in the whole run, so a trial whose process was started anew goes on counting,
and by our id of its trial: a resumed sweep compares with what earlier processes heard (`earlier_reports`).
Nothing here pauses a trial, which Tune's synchronous HyperBand does at every rung: a pause ends the process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from rairl_ray.config.variants import complete
from rairl_ray.keys import keyed_random
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import Scheduler, SweepFile
from rairl_ray.sweep.points import planned, stop_mark, trial_folder
from rairl_ray.sweep.supervise import REPORT


def id_of(trial: Any) -> str:
    """Our id of one of Tune's trials."""
    return Path(trial.config["spec"]["folder"]).name


@dataclass(frozen=True)
class Known:
    """A trial as Tune's rules see it: by our id, under which an earlier process compared it, too."""

    trial_id: str


def earlier_reports(file: SweepFile) -> Iterator[tuple[Known, dict[str, Any]]]:
    """The reports of the metric that the trials' folders hold, each trial's in order: what was heard before."""
    metric = file.metrics[0]
    for name in planned(file):
        number = 0
        for row in RunFolder(trial_folder(file, name)).read_metrics():
            if metric in row:
                number += 1
                yield Known(name), {metric: row[metric], "step": row["step"], REPORT: number}


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

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Tune's last call before the trials: from here on it is known which way is better."""
        known = super().set_search_properties(metric, mode, **spec)
        for trial, result in earlier_reports(self._file):
            self._place(trial)
            # Who was stopped then has a mark; what this says of a report out of its order counts for nothing.
            super().on_trial_result(None, trial, result)
        return known

    def _place(self, trial: Known) -> None:
        """Tune's odds, drawn by the trial's id alone: a resume puts it into the same bracket."""
        sizes = [len(bracket._rungs) for bracket in self._brackets]
        odds = [math.exp(size - max(sizes)) for size in sizes]
        draw = keyed_random("bracket", self._file.search.seed, trial.trial_id)
        self._trial_info[trial.trial_id] = draw.choices(self._brackets, odds)[0]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._place(Known(id_of(trial)))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, Known(id_of(trial)), result)
        return _marked(self._file, trial, action)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Nothing: the last report is the final evaluation, which has no place among those of a run."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Nothing: what it reported stays."""


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

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """As that of `Halving`."""
        known = super().set_search_properties(metric, mode, **spec)
        for trial, result in earlier_reports(self._file):
            if math.isfinite(result[self._file.metrics[0]]):
                self._results[trial].append(result)
        return known

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if not math.isfinite(result.get(self._file.metrics[0], math.nan)):
            return str(TrialScheduler.CONTINUE)
        known = Known(id_of(trial))
        if any(earlier[REPORT] == result.get(REPORT) for earlier in self._results[known]):
            # A resume goes back to a checkpoint and makes the reports after it again, with equal values.
            return str(TrialScheduler.CONTINUE)
        return _marked(self._file, trial, super().on_trial_result(tune_controller, known, result))

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
