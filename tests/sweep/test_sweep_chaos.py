"""Sweeps on a cluster whose parts are killed at random moments: their tables are those of undisturbed ones."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from rairl_ray import metrics as names
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.ledger import PARENT
from rairl_ray.sweep.points import newest_folder, sweep_folder, trial_folder
from rairl_ray.sweep.stopping import trial_ids
from tests.inprocess import differing, rows_in
from tests.local_cluster import SeparateNodes, separate_nodes
from tests.runs import ROOT, TINY_AIRL
from tests.sweeps import table, written
from tests.tracked import history, sqlite
from tests.tracked import runs as mlflow_runs

PLACES = ("actor", "run", "watcher", "node", "drain", "driver", "head")
STEPS = 20
SEED = 7
"""Keys the order of the kills, their moments and their victims."""
SECONDS = 900.0

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc")


def file_of(folder: Path, nodes: SeparateNodes, **changes: Any) -> str:
    more = ["eval.prompts=4", "discriminator.warmup_max_steps=2", f"trainer.steps={STEPS}"]
    more += ["trainer.prompts_per_step=12", "rollout.max_completion_tokens=60"]  # a second or so a step
    tiny = dict(text.split("=", 1) for text in [*TINY_AIRL, *more])
    overrides = {key: yaml.safe_load(value) for key, value in tiny.items()}
    overrides |= {"warm_start": None, "placement.cpus_per_actor": 0.25, "placement.threads_per_actor": 1}
    folder.mkdir()
    settings = {"seeds": [0], "metric": "eval/rerank_at_1", "failures": {"max_per_trial": 9}, **changes}
    return written(folder, overrides=overrides, address=nodes.address, **settings)


class Chaos:
    """One sweep in which each of `places` is killed once, at a random step and moment within it."""

    def __init__(self, file: str, nodes: SeparateNodes, places: tuple[str, ...]) -> None:
        self.path, self.nodes, self.file = file, nodes, load_sweep(file)
        self.random = random.Random(SEED)
        self.places = self.random.sample(places, len(places))
        self.moment = self.random.randint(1, 3)
        """Steps of all trials at which the next one is killed."""
        self.done: list[tuple[int, str]] = []

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        self.log = open(Path(self.path).with_name("driver.log"), "ab")  # noqa: SIM115
        command = [sys.executable, "launch.py", "sweep", self.path, *options]
        return subprocess.Popen(command, cwd=ROOT, stdout=self.log, stderr=self.log, env=self.nodes.environment)

    def run(self) -> None:
        """Run the sweep to its end, whatever is killed meanwhile."""
        deadline = time.monotonic() + SECONDS
        driver = self.start()
        while True:
            assert time.monotonic() < deadline, self.said()
            code = driver.poll()
            if code is not None:
                assert code == 0, self.said()
                return
            if self.places and self.steps() >= self.moment:
                time.sleep(self.random.random())
                if self.strike(self.places[0], driver):
                    self.done.append((self.moment, self.places.pop(0)))
                    self.moment = self.steps() + self.random.randint(1, 2)
                    if driver.poll() is not None:
                        driver = self.start("--resume")
            time.sleep(0.1)

    def steps(self) -> int:
        """Policy steps of all trials so far."""
        found = (RunFolder(newest_folder(self.file, name)).read_metrics() for name in trial_ids(self.file))
        return sum(max((int(row["step"]) for row in rows), default=0) for rows in found)

    def strike(self, place: str, driver: subprocess.Popen[bytes]) -> bool:
        """Kill; False where there is nothing to kill at this moment."""
        if place == "driver":
            driver.kill()
            driver.wait()
            return True
        if place == "head":
            self.nodes.call("down")
            driver.kill()
            driver.wait()
            self.nodes.call("up", "2", "--cpus", "1")
            return True
        if place == "drain":
            self.nodes.drain(self.random.choice([0, 1]))
            self.nodes.begin("add")
            return True
        if place == "node":
            self.nodes.call("kill", str(self.random.choice([1, 2])))
            self.nodes.begin("add")
            return True
        victims = [process for process in self.nodes.processes() if self.is_a(place, process)]
        if not victims:
            return False
        self.random.choice(victims).kill()
        return True

    def is_a(self, place: str, process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            words = process.cmdline()
            if place == "actor":
                return " ".join(words).startswith(("ray::RolloutActor", "ray::PolicyActor", "ray::Discrim"))
            runs = [process] if place == "run" else process.children()
            return any(run.cmdline()[1:4] == ["-m", "launch", "train"] for run in runs)
        return False

    def said(self) -> str:
        logs = [Path(self.path).with_name("driver.log"), *sweep_folder(self.file).glob("logs/*")]
        return "\n".join([str(self.done), *(f"{log}: {log.read_text()[-1500:]}" for log in logs)])


def assert_same_end(chaos: Chaos, calm: Chaos) -> None:
    """Tables, rows and MLflow's runs are those of the undisturbed sweep, each step once."""
    folder, other = sweep_folder(chaos.file), sweep_folder(calm.file)
    assert table(folder) == table(other)
    client = sqlite(Path(chaos.file.output_dir))
    runs = mlflow_runs(client)
    trials = {client.get_run(run).data.tags.get("rairl.trial"): run for run in runs}
    assert set(runs.values()) == {"FINISHED"} and len(runs) == len(trial_ids(chaos.file)) + 1
    for name in trial_ids(chaos.file):
        rows = rows_in(RunFolder(trial_folder(chaos.file, name)))
        assert [row["step"] for row in rows if names.POLICY_LOSS in row] == list(range(1, STEPS + 1))
        assert not differing(rows, rows_in(RunFolder(trial_folder(calm.file, name))))
        for metric in (names.POLICY_LOSS, names.DISCRIMINATOR_LOSS, names.EVAL_PASS_AT_1):
            expected = [(int(row["step"]), row[metric]) for row in rows if metric in row]
            assert history(client, trials[name], metric) == expected, f"{name}: {metric}"
        assert PARENT in client.get_run(trials[name]).data.tags
    assert not list(folder.glob("trials/*~1")), "an interrupted trial was started anew beside itself"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sweep_whose_parts_are_killed_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    with separate_nodes(2, "--cpus", "1") as nodes:
        calm = Chaos(file_of(tmp_path / "calm", nodes), nodes, ())
        calm.run()
        chaos = Chaos(file_of(tmp_path / "chaos", nodes), nodes, PLACES)
        chaos.run()
        print(chaos.done)
        assert len(chaos.done) == len(PLACES), chaos.said()
        assert_same_end(chaos, calm)


@pytest.mark.slow
@pytest.mark.cluster
def test_what_optuna_draws_does_not_change_with_what_is_killed(tmp_path: Path) -> None:
    space = {"reward.density.type": {"choice": ["sparse", "dense", "partial"]}}
    searched = {"search": {"type": "optuna", "seed": 0}, "trials": 3, "max_concurrent": 1, "space": space}
    with separate_nodes(2, "--cpus", "1") as nodes:
        calm = Chaos(file_of(tmp_path / "calm", nodes, **searched), nodes, ())
        calm.run()
        chaos = Chaos(file_of(tmp_path / "chaos", nodes, **searched), nodes, ("watcher", "driver", "node"))
        chaos.run()
        print(chaos.done)
        assert len(chaos.done) == 3, chaos.said()
        assert (sweep_folder(chaos.file) / "points.jsonl").read_text() == (
            sweep_folder(calm.file) / "points.jsonl"
        ).read_text()
        assert_same_end(chaos, calm)
