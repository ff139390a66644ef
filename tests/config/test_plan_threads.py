"""What `plan` says about threads is what actors are started with: both ask `engines.environment`."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from rich.console import Console

from rairl_ray.actors.learner import learner_environment
from rairl_ray.actors.rollout_actor import rollout_environment
from rairl_ray.config.load import load_config
from rairl_ray.engines.environment import threads_of
from rairl_ray.plan import show_plan
from tests.runs import ROOT

RANKS = ["learner.replicas=3", "learner.discriminator_replicas=2"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Twelve cores and no Intel OpenMP; where its library would lie."""
    for name in ("LD_PRELOAD", "KMP_BLOCKTIME", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib" / "libiomp5.so"


def said(device: str, *words: str) -> str:
    output = io.StringIO()
    config = load_config(ROOT / "experiments/demo/airl.yaml", [f"placement.device={device}", *words])
    show_plan(config, Console(file=output, width=100))
    return next(line for line in output.getvalue().splitlines() if line.startswith("compute threads"))


@pytest.mark.parametrize(
    ("words", "rollout", "learners"),
    [([], 12, 4), (["placement.threads_per_actor=7"], 7, 2), (["placement.threads_per_actor=1"], 1, 1)],
)
def test_plan_and_the_actors_agree(words: list[str], rollout: int, learners: int) -> None:
    """Ranks of a learner share an actor's threads, both learners as many as the one with more ranks."""
    line = said("cpu", *RANKS, *words)
    assert (
        f": rollout {rollout}, policy {learners} in each of 3, discriminator {learners} in each of 2 (" in line
    )
    config = load_config(ROOT / "experiments/demo/airl.yaml", [*RANKS, *words])
    assert rollout_environment(config, "cpu")["OMP_NUM_THREADS"] == str(rollout)
    assert learner_environment(config, "policy", "cpu")["OMP_NUM_THREADS"] == str(learners)
    assert learner_environment(config, "discriminator", "cpu")["MKL_NUM_THREADS"] == str(learners)
    assert threads_of(config, "reward") == rollout  # a saved reward's actors are no ranks


def test_plan_names_the_openmp(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"GNU's (no libiomp5.so in {machine.parent}), OMP_WAIT_POLICY=PASSIVE" in said("cpu")
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    assert "GOMP_SPINCOUNT=1000" in said("cpu") and "PASSIVE" not in said("cpu")
    machine.touch()
    assert "OpenMP: Intel's, KMP_BLOCKTIME=1" in said("cpu")
    monkeypatch.setenv("KMP_BLOCKTIME", "50")
    assert "OpenMP: Intel's, KMP_BLOCKTIME=50" in said("cpu")


def test_on_gpus_only_learners_are_told_their_threads() -> None:
    line = said("gpu")
    assert ": policy 12, discriminator 12 (this machine has 12 cores" in line and "OpenMP" not in line
