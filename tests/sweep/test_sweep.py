"""Sweep files and their trials, checked before a start; one real sweep, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rairl_ray.config.load import load_config
from rairl_ray.errors import ConfigError, ResumeError
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep import run
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.ledger import PARENT
from rairl_ray.sweep.lineage import check_population
from rairl_ray.sweep.points import examples, trial_id, trials
from rairl_ray.sweep.status import find_sweep, look
from rairl_ray.sweep.stopping import ask_to_stop
from tests.runs import ROOT, TINY_AIRL
from tests.sweeps import table, written
from tests.tracked import runs as mlflow_runs
from tests.tracked import sqlite

CIRCLE = {
    "reward.density.every": {"grid": [5], "when": {"trainer.steps": 9}},
    "trainer.steps": {"grid": [9], "when": {"reward.density.every": 5}},
}


def test_every_point_with_every_seed(tmp_path: Path) -> None:
    space = {
        "reward.density.type": ["sparse", "interval"],
        "reward.density.every": {"grid": [5, 9], "when": {"reward.density.type": "interval"}},
    }
    made = trials(load_sweep(written(tmp_path, space=space)))
    every = "reward.density.every"
    assert [(item.config.reward.density.type, item.values.get(every), item.seed) for item in made] == [
        ("sparse", None, 0), ("sparse", None, 1),
        ("interval", 5, 0), ("interval", 5, 1),
        ("interval", 9, 0), ("interval", 9, 1),
    ]  # fmt: skip
    assert len({item.id for item in made}) == 6
    assert all(item.config.name == f"sw/trials/{item.id}" for item in made)
    assert all(item.config.seed == item.seed for item in made)


def test_several_experiments_are_an_axis(tmp_path: Path) -> None:
    demo = ROOT / "experiments/demo"
    bases = [str(demo / "airl.yaml"), str(demo / "airl_t*.yaml")]
    space = {"advantage.gamma": {"grid": [0.25, 0.5], "when": {"base": "demo/airl"}}}
    changes: dict[str, Any] = {"space": space, "seeds": [0], "overrides": {"warm_start": None}}
    sweep = load_sweep(written(tmp_path, base=bases, **changes))
    made = trials(sweep)
    assert [(item.values, item.config.data.arithmetic.operands_max) for item in made] == [
        ({"base": "demo/airl", "advantage.gamma": 0.25}, 4),
        ({"base": "demo/airl", "advantage.gamma": 0.5}, 4),
        ({"base": "demo/airl_three"}, 3),
    ]
    assert made[2].base == str(demo / "airl_three.yaml") and "base=demo-airl_three" in made[2].id
    for base, said in {
        "nothing-*.yaml": r"base=nothing-\*\.yaml: no such experiment file",
        f"{demo}/[": r"no such experiment file",
    }.items():
        with pytest.raises(ConfigError, match=said):
            load_sweep(written(tmp_path, base=base))
    with pytest.raises(ConfigError, match="each FOLDER/NAME once"):
        load_sweep(written(tmp_path, base=[bases[0], bases[0]]))
    with pytest.raises(ConfigError, match="when base: is no other axis"):
        load_sweep(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.system_prompt", "Think: then 'answer' #1 \"now\""),
        ("data.system_prompt", "null"),
        ("data.system_prompt", "Tränk 😀: \u2028 then\x85\x7f # {"),
        ("reward.clip", [-5.0, 0.5]),
        ("reward.clip", None),
        ("advantage.scale", False),
        ("policy.learning_rate", 1e-05),
        ("discriminator.perturbations.kinds", ["propagated_error", "numbers"]),
    ],
)
def test_a_value_reaches_the_run_as_it_is(key: str, value: Any, tmp_path: Path) -> None:
    (made,) = trials(load_sweep(written(tmp_path, space={key: [value]}, seeds=[3])))
    found: Any = made.config
    for part in key.split("."):
        found = getattr(found, part)
    assert (list(found) if isinstance(found, tuple) else found) == value


def test_random_points_are_keyed_and_within_their_bounds(tmp_path: Path) -> None:
    space = {
        "policy.learning_rate": {"loguniform": [1e-5, 1e-3]},
        "advantage.gamma": {"uniform": [0.2, 0.8]},
        "rollout.samples_per_prompt": {"randint": [2, 5]},
        "reward.density.type": {"choice": ["sparse", "dense"]},
    }
    file = written(tmp_path, space=space, search={"type": "random", "seed": 4}, trials=40, seeds=[0])
    made = trials(load_sweep(file))
    assert len(made) == 40 and [item.id for item in made] == [item.id for item in trials(load_sweep(file))]
    rates = [item.config.policy.learning_rate for item in made]
    assert all(1e-5 <= rate <= 1e-3 for rate in rates) and sum(rate < 1e-4 for rate in rates) in range(10, 31)
    assert {item.config.rollout.samples_per_prompt for item in made} == {2, 3, 4}
    assert {item.config.reward.density.type for item in made} == {"sparse", "dense"}
    # more trials keep the first ones
    more = trials(
        load_sweep(written(tmp_path, space=space, search={"type": "random", "seed": 4}, trials=50, seeds=[0]))
    )
    assert [item.id for item in more[:40]] == [item.id for item in made]


def test_ids_depend_on_values_and_seed_alone() -> None:
    assert trial_id({"a.b": 1}, 0) == trial_id({"a.b": 1}, 0)
    assert (
        len(
            {
                trial_id({"a.b": 1}, 0),
                trial_id({"a.b": 1}, 1),
                trial_id({"c.b": 1}, 0),
                trial_id({"a.b": "1"}, 0),
            }
        )
        == 4
    )
    assert "/" not in trial_id({"model.policy.path": "Qwen/Qwen2.5-3B"}, 0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"space": {"reward.densty.type": ["sparse"]}},
            r"reward\.densty\.type: unknown; nearest: reward\.density\.type",
        ),
        ({"space": {"reward.density.type": []}}, "at least one value"),
        ({"space": {"reward.density.type": "sparse"}}, "must be a list of values"),
        ({"space": {"policy.learning_rate": {"loguniform": [0, 1]}}}, "low < high"),
        ({"space": {"policy.learning_rate": {"uniform": [0, 1]}}}, "has no grid"),
        ({"space": {"policy.learning_rate": {"normal": [0, 1]}}}, "write one of grid"),
        ({"space": {"seed": [1, 2]}}, "is the sweep's own; use seeds"),
        ({"space": {"reward.density.every": {"grid": [1], "when": {"reward.type": "x"}}}}, "is no other axis"),
        ({"seeds": [1, 1]}, "must be one or more numbers, all different"),
        ({"seeds": []}, "must be one or more numbers"),
        ({"search": {"type": "random"}}, "needs trials: N"),
        ({"sedes": [1]}, "unknown key; a sweep file has name, base"),
        ({"base": "nothing.yaml"}, "no such experiment file"),
        ({"search": {"type": "bayes"}}, "search.type: must be 'grid', 'random' or 'optuna'"),
        ({"space": {"trainer.steps": {"randint": [1.5, 4]}}}, r"randint=\[1.5, 4\]: must be whole numbers"),
        ({"scheduler": {"type": "asha", "grace": 9, "longest": 3}}, "grace=9: it must be at most longest=3"),
        ({"scheduler": {"type": "asha", "reduction": 1}}, "scheduler.reduction: must be greater than or equal"),
        ({"space": CIRCLE}, r"reward\.density\.every: its `when` leads back to itself"),
    ],
)
def test_a_bad_file_is_one_line_a_fault(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_sweep(written(tmp_path, **changes))
    assert "sweep.yaml" in str(error.value)


def test_keys_of_the_command_line_stand_over_the_file(tmp_path: Path) -> None:
    changes = ["trainer.steps=7", "seeds=[5]", "budget.hours=2", "address=auto", "output_dir=elsewhere"]
    sweep = load_sweep(written(tmp_path, overrides={"warm_start": None, "trainer.steps": 3}), changes)
    assert sweep.overrides == {"warm_start": None, "trainer.steps": 7}
    assert (sweep.seeds, sweep.budget.hours, sweep.output_dir) == ((5,), 2.0, "elsewhere")
    (first, _) = trials(sweep)
    assert (first.config.trainer.steps, first.config.cluster.address) == (7, "auto")
    for text, said in {
        "trainer.step=3": "command line: trainer.step=3: unknown; nearest: trainer.steps",
        "cluster.address=auto": "is the sweep's own; use address",
        "seeds": "write section.key=value",
        "space.trainer.steps=[]": "randint or|needs a list with at least one value",
    }.items():
        with pytest.raises(ConfigError, match=said):
            load_sweep(written(tmp_path), [text])


def test_each_bad_point_is_named(tmp_path: Path) -> None:
    space = {
        "discriminator.loss.type": ["bce", "bradley_terry"],
        "discriminator.demonstrations_per_update": [None, 4],
    }
    with pytest.raises(ConfigError) as error:
        trials(load_sweep(written(tmp_path, space=space)))
    assert str(error.value).startswith(
        "point discriminator.loss.type=bradley_terry, discriminator.demonstrations_per_update=4: "
    )
    assert len(str(error.value).splitlines()) == 1


def test_the_shipped_sweeps_have_only_good_points() -> None:
    for file in sorted((ROOT / "experiments/sweeps").glob("*.yaml")):
        sweep = load_sweep(str(file))
        assert examples(sweep) if sweep.search.type == "optuna" else trials(sweep), file
        check_population(sweep, trials(sweep))


def test_a_condition_is_met_only_by_what_counts(tmp_path: Path) -> None:
    space = {
        "trainer.steps": {"grid": [7], "when": {"reward.density.type": "interval"}},
        "reward.density.every": {"grid": [5], "when": {"trainer.steps": 7}},
        "reward.density.type": ["sparse", "interval"],
    }
    made = trials(load_sweep(written(tmp_path, space=space, seeds=[0])))
    assert [item.values for item in made] == [
        {"reward.density.type": "sparse"},
        {"trainer.steps": 7, "reward.density.every": 5, "reward.density.type": "interval"},
    ]
    # an override stands in where the axis of its key does not count
    steps = {"warm_start": None, "trainer.steps": 7, "reward.density.type": "interval"}
    space = {**space, "reward.density.type": ["interval"]}
    space["trainer.steps"] = {"grid": [9], "when": {"eval.prompts": 4}}
    made = trials(load_sweep(written(tmp_path, space=space, seeds=[0], overrides=steps | {"eval.prompts": 8})))
    assert [(item.values.get("reward.density.every"), item.config.trainer.steps) for item in made] == [(5, 7)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"overrides": {"warm_start": None, "eval.at_end": False}},
            r"^eval\.at_end=false: .* set eval\.at_end",
        ),
        ({"metric": "eval/pass_at_16"}, r"^metric=eval/pass_at_16: eval\.k=\[.*\] lacks 16"),
        ({"scheduler": {"type": "asha"}}, r"^eval\.every=0: scheduler\.type=asha"),
    ],
)
def test_a_metric_that_would_never_come_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        trials(load_sweep(written(tmp_path, **changes)))
    assert len(str(error.value).splitlines()) == 1


def test_output_and_name_reach_the_run_as_they_are(tmp_path: Path) -> None:
    odd = str(tmp_path / "a: b # [ü]")
    (made,) = trials(load_sweep(written(tmp_path, output_dir=odd, name="007", seeds=[0], space={})))
    assert (made.config.output_dir, made.config.name) == (odd, f"007/trials/{made.id}")


# --- a real one ------------------------------------------------------------------------------------


def command(file: str, *options: str) -> list[str]:
    return [sys.executable, "launch.py", "sweep", file, *options]


def stopped_from_another_shell(file: str, folder: Path) -> None:
    """Resume the sweep, and stop it in its second trial: that one saves a checkpoint and leaves."""
    second = folder / "trials" / trials(load_sweep(file))[1].id
    process = subprocess.Popen(command(file, "--resume"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 400
    while not list(second.glob("checkpoints/step-*1")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    found = find_sweep(str(folder))
    assert [item.state for item in look(found)] == ["finished", "running"]
    ask_to_stop(found, None)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 130 and "was stopped; go on with --resume" in said, said
    assert [item.state for item in look(found)] == ["finished", "stopped"]
    assert RunFolder(second).holder is None and not (second / "final").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_that_is_killed_then_stopped_goes_on_and_ends_with_a_table(tmp_path: Path) -> None:
    more = ["eval.prompts=4", "discriminator.warmup_max_steps=2", "trainer.steps=6"]
    tiny = dict(text.split("=", 1) for text in [*TINY_AIRL, *more])
    overrides = {key: yaml.safe_load(value) for key, value in tiny.items()}
    overrides |= {"warm_start": None, "placement.cpus_per_actor": 0.25}
    file = written(tmp_path, overrides=overrides, seeds=[0], metric="eval/rerank_at_1", max_concurrent=1)
    folder = tmp_path / "runs" / "sw"
    process = subprocess.Popen(command(file), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 400
    first = folder / "trials" / trials(load_sweep(file))[0].id
    while not (first / "final" / "policy").is_dir():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.5)
    while '"status": "FINISHED"' not in (first / "tracking_spool.jsonl").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = (first / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="is a sweep already"):
        run.sweep(load_sweep(file))
    with pytest.raises(ResumeError, match="contradicts the sweep in metric"):
        run.sweep(
            load_sweep(written(tmp_path, overrides=overrides, seeds=[0], metric="eval/pass_at_1")), resume=True
        )
    file = written(tmp_path, overrides=overrides, seeds=[0], metric="eval/rerank_at_1", max_concurrent=1)
    stopped_from_another_shell(file, folder)
    second = folder / "trials" / trials(load_sweep(file))[1].id
    saved = json.loads((second / "tracking_cursor.json").read_text())["run_id"]
    done = subprocess.run(command(file, "--resume"), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (first / "metrics.jsonl").read_bytes() == before, "a finished trial was run again"
    rows = table(folder)
    assert [row["state"] for row in rows] == ["finished", "finished"]
    assert {row["reward.density.type"] for row in rows} == {"sparse", "dense"}
    best = json.loads((folder / "summary.json").read_text())["best"]
    assert best["eval/rerank_at_1"] == max(float(row["eval/rerank_at_1"]) for row in rows)
    ready = load_config(folder / "best.yaml")
    assert ready.reward.density.type == best["reward.density.type"] and ready.trainer.steps == 6
    client = sqlite(tmp_path / "runs")
    (parent,) = (key for key in mlflow_runs(client) if PARENT not in client.get_run(key).data.tags)
    assert sorted(mlflow_runs(client).values()) == ["FINISHED"] * 3, "a run was left open, or made twice"
    assert saved in mlflow_runs(client), "the stopped trial got another run"
    steps = [row["step"] for row in RunFolder(second).read_metrics() if "policy/loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    below = [client.get_run(key).data for key in mlflow_runs(client) if key != parent]
    assert {run.tags[PARENT] for run in below} == {parent}
    assert {run.tags["rairl.density"] for run in below} == {"sparse", "dense"}
    assert client.get_run(parent).data.metrics["eval/rerank_at_1"] == best["eval/rerank_at_1"]
    assert not list((folder / "trials").glob("*~1")), "an interrupted trial was started anew beside itself"
