"""Sweep files of the tests, and folders of runs that have ended."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.runfolder import RunFolder, write_summary
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import Trial, started_with, trial_folder
from tests.runs import ROOT

DEMO = str(ROOT / "experiments/demo/airl.yaml")
SFT = ROOT / "experiments/demo/sft.yaml"


def written(folder: Path, **changes: Any) -> str:
    """A sweep file with a small space."""
    data: dict[str, Any] = {
        "name": "sw",
        "base": DEMO,
        "output_dir": str(folder / "runs"),
        "space": {"reward.density.type": ["sparse", "dense"]},
        "seeds": [0, 1],
        "overrides": {"warm_start": None},
        **changes,
    }
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return str(file)


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def end(file: SweepFile, item: Trial, values: dict[str, float]) -> None:
    """The folder of a run that has ended."""
    folder = RunFolder(trial_folder(file, item.id))
    folder.create()
    folder.write_config(dump_yaml(load_config(item.base, started_with(file, item))))
    folder.final_policy.mkdir(parents=True)
    folder.final_reward_model.mkdir()
    (folder.final_reward_model / "reward.json").touch()
    summary = {name: {"value": value} for name, value in values.items()}
    write_summary(folder.evaluation("final") / "summary.json", summary)


@dataclass(eq=False)
class OfTune:
    """What a scheduler or a callback sees of one of Tune's trials."""

    trial_id: str
    config: dict[str, Any]
    last_result: dict[str, float] | None = field(default_factory=dict)


def of_tune(file: SweepFile, item: Trial) -> OfTune:
    return OfTune(item.id, {"spec": {"folder": str(trial_folder(file, item.id)), "gpus": 0.5}})
