"""The schedulers and the budget of GPU hours under Ray Tune itself; a trial only reports and waits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from rairl_ray.display import Display
from rairl_ray.errors import ConfigError
from rairl_ray.sweep import run
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import sweep_folder, trials
from rairl_ray.sweep.result import trial_state
from tests.stand_ins import RATE, reports_three_times
from tests.sweeps import written

METRIC = "eval/pass_at_1"
RATES = [1e-5, 2e-5, 3e-5, 4e-5]
GPU_SECONDS = 4.0


@pytest.fixture(scope="module")
def ray_with_gpus() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, num_gpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def stood_in(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> SweepFile:
    monkeypatch.setattr(run, "trainable", reports_three_times)
    overrides = {"warm_start": None, "eval.every": 1, "placement.device": "gpu", "tracking.uri": "none"}
    settings = {"space": {RATE: RATES}, "seeds": [0], "max_concurrent": 1, "overrides": overrides}
    return load_sweep(written(folder, **{**settings, **changes}))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_with_gpus")
@pytest.mark.parametrize(
    ("scheduler", "stopped"),
    [
        ({"type": "median", "min_samples": 2}, [False, False, True, True]),
        ({"type": "hyperband", "reduction": 2, "longest": 3, "brackets": 2}, None),
    ],
)
def test_tune_obeys(
    scheduler: dict[str, Any], stopped: list[bool] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = stood_in(tmp_path, monkeypatch, scheduler=scheduler)
    assert run.sweep(file, display=Display("sw", 4)) == 0
    states = [trial_state(file, item) for item in trials(file)]
    assert states[0] == "finished" and set(states) == {"finished", "stopped early"}
    assert stopped is None or [state == "stopped early" for state in states] == stopped


@pytest.mark.slow
@pytest.mark.usefixtures("ray_with_gpus")
def test_gpu_hours_end_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = stood_in(tmp_path, monkeypatch, budget={"gpu_hours": GPU_SECONDS / 3600})
    assert run.sweep(file, display=Display("sw", 4)) == 1
    states = Counter(trial_state(file, item) for item in trials(file))
    assert states["finished"] >= 1 and states["not started"] >= 1
    spent = json.loads((sweep_folder(file) / "gpu_hours.json").read_text())["gpu_hours"]
    assert spent >= GPU_SECONDS / 3600
    with pytest.raises(ConfigError, match="the sweep has held GPUs for 0"):
        run.sweep(file, resume=True, display=Display("sw", 4))
    assert run.sweep(stood_in(tmp_path, monkeypatch), resume=True, display=Display("sw", 4)) == 0
    assert {trial_state(file, item) for item in trials(file)} == {"finished"}
