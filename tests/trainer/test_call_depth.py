"""How deep the driver is when it first asks for samples: a traceback from there should fit on a screen.

Nothing is started: cluster and workers are stand-ins, and the frames above them are the run's own.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import MagicMock

import pytest

import launch
from rairl_ray.errors import DataError
from rairl_ray.trainer import recovery, rl_trainer, run
from tests.runs import ROOT, TINY, TINY_AIRL

MOST_FRAMES = 8


def frames_above() -> list[str]:
    """This project's functions that are running, the outermost first."""
    frame: FrameType | None = sys._getframe(2)
    found: list[str] = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file == ROOT / "launch.py" or ROOT / "rairl_ray" in file.parents:
            found.append(f"{file.relative_to(ROOT)}: {frame.f_code.co_qualname}")
        frame = frame.f_back
    return found[::-1]


@pytest.mark.parametrize(
    ("experiment", "options", "asks"),
    [
        ("grpo", [*TINY, "warm_start=null", "eval.at_start=false"], "RolloutBuffer.get"),
        ("grpo", [*TINY, "warm_start=null", "eval.at_start=true"], "Evaluator.sample"),
        ("airl", [*TINY_AIRL, "warm_start=null"], "WarmupPool._draw"),
        ("sft", TINY, "Evaluator.sample"),
    ],
)
def test_the_first_sample_is_at_most_eight_frames_below_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, options: list[str], asks: str
) -> None:
    """From `train` in launch.py to the rollout workers' own method, both included."""
    found: list[str] = []

    def asked(*_: Any, **__: Any) -> Any:
        found.extend(frames_above())
        raise DataError("here")  # an error of the user is not tried again

    plan, workers = MagicMock(device="cpu"), MagicMock(device="cpu")
    workers.rollouts.start = workers.rollouts.generate = asked
    monkeypatch.setattr(run, "cluster", lambda config: contextlib.nullcontext())
    monkeypatch.setattr(run, "place", lambda config: plan)
    monkeypatch.setattr(run, "check_room", lambda config: None)
    monkeypatch.setattr(run, "check_machine", lambda config, device: None)
    monkeypatch.setattr(recovery, "start_worker_groups", lambda *_: workers)
    monkeypatch.setattr(recovery, "ProcessMonitor", MagicMock())
    monkeypatch.setattr(rl_trainer, "RolloutPool", MagicMock())
    unchecked = [] if experiment == "sft" else ["rollout.sync_check_every=0"]
    overrides = [*options, *unchecked, "tracking.uri=none", f"output_dir={tmp_path}"]
    with pytest.raises(DataError, match="here"):
        launch.train(str(ROOT / "experiments" / "demo" / f"{experiment}.yaml"), overrides)
    assert found[0] == "launch.py: train" and found[-1].endswith(asks), found
    assert len(found) + 1 <= MOST_FRAMES, "\n".join(found)
