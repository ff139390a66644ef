"""Trials that only report, in the place of runs.

A function travels to Tune's worker as its module's name: this one imports little, for every trial imports it.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import SAVED, Trial, trials
from rairl_ray.sweep.supervise import ENDED, REPORT
from tests.sweeps import end

RATE = "policy.learning_rate"


def _of(config: dict[str, Any]) -> tuple[SweepFile, Trial]:
    folder = Path(config["spec"]["folder"])
    file = SweepFile.model_validate_json((folder.parents[1] / SAVED).read_text())
    (item,) = [item for item in trials(file) if item.id == folder.name]
    return file, item


def objective(item: Trial) -> float:
    """Best at a rate of 1e-4, gamma 0.5, interval."""
    rate = math.log10(item.config.policy.learning_rate) + 4
    interval = item.config.reward.density.type == "interval"
    return interval - rate**2 - 4 * (item.config.advantage.gamma - 0.5) ** 2 + item.seed / 10


def reports_the_objective(config: dict[str, Any]) -> None:
    """Its metrics are `objective`, and, of a second one, its opposite."""
    from ray import tune

    file, item = _of(config)
    values = {metric: (1 - 2 * place) * objective(item) for place, metric in enumerate(file.metrics)}
    end(file, item, values)
    tune.report(values | {"step": ENDED})


def reports_three_times(config: dict[str, Any]) -> None:
    """The lower the rate, the better; three reports, a second apart where GPU hours are counted, and an end."""
    from ray import tune

    file, item = _of(config)
    value = 1 - item.values[RATE]
    for number in (1, 2, 3):
        time.sleep(1.0 if file.budget.gpu_hours else 0.0)
        tune.report({file.metrics[0]: value, "step": number, REPORT: number})
    end(file, item, {file.metrics[0]: value})
    tune.report({file.metrics[0]: value, "step": ENDED})
