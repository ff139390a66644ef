"""A real population on a cluster whose parts are killed: forks of real checkpoints, and every step once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from rairl_ray.config.load import load_config, read_saved
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.lineage import Exploit, lineage, newest_exploits, planned_exploits
from rairl_ray.sweep.points import newest_folder, sweep_folder, trial_folder, trials
from tests.local_cluster import separate_nodes
from tests.runs import TINY_AIRL
from tests.sweep.test_sweep_chaos import Chaos
from tests.sweeps import table, written
from tests.tracked import runs as mlflow_runs
from tests.tracked import sqlite

RATE, STEPS = "policy.learning_rate", 9


def small_population(folder: Path, address: str) -> str:
    more = ["eval.prompts=4", "eval.every=1", "discriminator.warmup_max_steps=2", f"trainer.steps={STEPS}"]
    tiny = dict(text.split("=", 1) for text in [*TINY_AIRL, *more])
    overrides = {key: yaml.safe_load(value) for key, value in tiny.items()}
    overrides |= {"warm_start": None, "placement.cpus_per_actor": 0.1}
    return written(
        folder, overrides=overrides, seeds=[0], trials=3, search={"type": "random"}, scheduler={"type": "pbt"},
        space={RATE: {"loguniform": [1e-4, 1e-2]}}, metric="eval/completion_tokens",
        failures={"max_per_trial": 3}, address=address,
    )  # fmt: skip


class PopulationChaos(Chaos):
    """The driver is killed while a fork runs."""

    before: tuple[Exploit, ...] = ()

    def strike(self, place: str, driver: subprocess.Popen[bytes]) -> bool:
        if place == "driver":
            if not any(RunFolder(newest_folder(self.file, row.member)).holder for row in lineage(self.file)):
                return False
            self.before = tuple(lineage(self.file))
        return super().strike(place, driver)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc")
def test_a_real_population_whose_parts_are_killed_goes_on_from_its_forks(tmp_path: Path) -> None:
    with separate_nodes(2, "--cpus", "1") as nodes:
        text = small_population(tmp_path, nodes.address)
        chaos = PopulationChaos(text, nodes, ("driver", "watcher", "run", "actor", "node"))
        chaos.run()
        print(chaos.done)
        assert len(chaos.done) == 5, chaos.said()
        assert_whole(chaos.file, list(chaos.before))


def assert_whole(file: SweepFile, before: list[Exploit]) -> None:
    """Every member has each step once, its forks are its donors' runs, and MLflow has one run a member."""
    rows = lineage(file)
    assert before and rows[: len(before)] == before
    print(*planned_exploits(file), sep="\n")
    now = newest_exploits(file)
    for item in trials(file):
        folder = RunFolder(newest_folder(file, item.id))
        steps = [row["step"] for row in folder.read_metrics() if "policy/loss" in row]
        assert steps == [*range(1, STEPS + 1)], "a step is lost, or there twice"
        rate = read_saved(folder.config).policy.learning_rate
        assert rate == (now[item.id].values if item.id in now else item.values)[RATE]
    first = rows[0]
    fork, donor = (RunFolder(trial_folder(file, name)) for name in (first.member, first.donor))
    inherited = RunFolder(fork.root / "forks" / "1").read_metrics()
    assert [row for row in inherited if row["step"] <= first.from_step] == [
        row for row in donor.read_metrics() if row["step"] <= first.from_step
    ], "up to the checkpoint it is the donor's"
    assert [row["state"] for row in table(sweep_folder(file))] == ["finished"] * 3
    best = load_config(sweep_folder(file) / "best.yaml")
    assert best.policy.learning_rate in [float(row[RATE]) for row in table(sweep_folder(file))]
    client = sqlite(Path(file.output_dir))
    states = sorted(mlflow_runs(client).values())
    assert "RUNNING" not in states and states.count("FINISHED") == 4, "three members and the sweep"
    tags = [client.get_run(key).data.tags for key in mlflow_runs(client)]
    assert {tag.get("rairl.trial") for tag in tags} == {None, *(item.id for item in trials(file))}
