"""`plan SWEEP.yaml`: trials, sizes and sums, and that nothing is started or written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rairl_ray.config.estimate import work
from rairl_ray.errors import ConfigError, PlacementError
from rairl_ray.sweep.file import is_sweep, load_sweep
from rairl_ray.sweep.plan import show_sweep_plan
from rairl_ray.sweep.points import trials
from tests.runs import ROOT
from tests.sweeps import DEMO, SFT, written
from tests.verbs.test_cli import rairl, refused

WHOLE_CPUS = {"warm_start": None, "placement.cpus_per_actor": 1.0}


def shown(file: str, **cluster: int | None) -> tuple[str, list[list[str]]]:
    output = io.StringIO()
    show_sweep_plan(load_sweep(file), Console(file=output, width=200), **cluster)
    text = output.getvalue()
    return text, [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]


def test_every_trial_and_the_sum_of_all(tmp_path: Path) -> None:
    space: dict[str, Any] = {"trainer.steps": [10, 30]}
    overrides = {"warm_start": str(SFT), "rollout.replicas": 2, "placement.cpus_per_actor": 0.5}
    file = written(tmp_path, space=space, overrides=overrides, max_concurrent=5)
    planned = trials(load_sweep(file))
    text, rows = shown(file, cpus=6, gpus=0, nodes=2)
    one = work(planned[0].config).total_completion_tokens
    for item, steps in zip(planned, (10, 10, 30, 30), strict=True):
        assert [item.id, "2", "0", "6", str(steps), f"{one * steps // 10:,}"] in rows
    assert "4 run at once on 2 node(s) of 6 CPUs and 0 GPUs (max_concurrent: 5)" in text
    assert ["runs", "4", "2"] in rows, "a warm start for each seed, shared by both points"
    assert text.count("trained first: sw/warm_starts/sft-") == 2
    tokens = next(row for row in rows if row[0] == "completion tokens")
    assert tokens[1] == f"{8 * one:,}"
    memory = [row[0] for row in rows if len(row) == 7]
    assert memory == ["rollout", "policy", "discriminator"], "alike in all trials, so it is shown once"
    assert not (tmp_path / "runs").exists()


def test_trials_of_different_sizes_are_told_apart(tmp_path: Path) -> None:
    space: dict[str, Any] = {"model.policy.build.layers": [1, 6], "rollout.replicas": [1, 2]}
    text, rows = shown(written(tmp_path, space=space, seeds=[0]), cpus=64)
    assert text.count("1 trials such as ") == 4
    parameters = {row[3] for row in rows if len(row) == 7 and row[0] == "policy"}
    assert len(parameters) == 2


def test_of_an_optuna_sweep_an_example_is_shown(tmp_path: Path) -> None:
    search = {"type": "optuna"}
    space = {"policy.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    text, rows = shown(written(tmp_path, space=space, search=search, trials=7), cpus=16)
    assert "14 trials, 0 of them drawn" in text and "14 trials are drawn by optuna" in text
    assert ["runs", "14", "0"] in rows
    assert sum(row[0].startswith("example: learning_rate=") for row in rows) == 1


def test_what_does_not_fit_or_is_no_sweep(tmp_path: Path) -> None:
    file = written(tmp_path, overrides=WHOLE_CPUS)
    with pytest.raises(PlacementError, match="the run needs 3 CPUs and the cluster has 2"):
        shown(file, cpus=2, gpus=0)
    with pytest.raises(ConfigError, match=r"^metric=eval/pass_at_16"):
        shown(written(tmp_path, metric="eval/pass_at_16"), cpus=16)
    pool = written(tmp_path, overrides={**WHOLE_CPUS, "rollout.replicas": {"min": 1, "max": 3}})
    with pytest.raises(ConfigError, match=r"^rollout\.replicas: trials .*write a number, .*replicas: 3}$"):
        shown(pool, cpus=16)
    assert is_sweep(file) and not is_sweep(DEMO) and not is_sweep(str(tmp_path / "nothing.yaml"))
    assert not any(map(is_sweep, map(str, (ROOT / "experiments/base").glob("*.yaml"))))


def test_the_command_line_starts_nothing(tmp_path: Path) -> None:
    file = written(tmp_path, overrides=WHOLE_CPUS)
    code = (
        "import sys, launch\n"
        "try: launch.main()\n"
        "except SystemExit as error: assert error.code == 0, error.code\n"
        "heavy = {'ray', 'torch', 'transformers', 'optuna', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = rairl("plan", file, "--cpus", "9", code=code)
    assert result.returncode == 0 and "3 run at once" in result.stdout, result.stderr
    assert refused("plan", file, "seed=1").endswith("overrides.seed: is the sweep's own; use seeds")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.yaml"]
