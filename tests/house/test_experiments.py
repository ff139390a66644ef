"""Every file below experiments/: the rows of the published tables, small diffs, accepted by `plan`."""

from __future__ import annotations

import io
import os
import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from rich.console import Console

from rairl_ray.config.estimate import memory
from rairl_ray.config.load import config_hash, differences, load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.yamlfile import read_document
from rairl_ray.data.tasks import TASKS
from rairl_ray.plan import show_plan

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "experiments"
BASES = sorted((EXPERIMENTS / "base").glob("*.yaml"))
FILES = sorted(path for path in EXPERIMENTS.rglob("*.yaml") if path.parent.name not in ("base", "sweeps"))

BACKBONES = {
    "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-4b": "Qwen/Qwen3-4B-Instruct-2507",
}
TASK_NAMES = ("gsm8k", "medreason", "mmlu_pro")
DENSITIES = ("sparse", "partial", "interval", "dense")
SMALLER = {
    "qwen2.5-3b": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b": "Qwen/Qwen2.5-1.5B-Instruct",
    "llama-3.2-3b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.2-1B-Instruct",
}
"""Discriminators of the first version (docs/method.md 5)."""

ROW = "gsm8k/qwen2.5-3b_partial"
WGAN = {"discriminator.loss.type": "wgan", "discriminator.loss.weight_clip": 0.01}
ABLATIONS: dict[str, tuple[str, dict[str, object]]] = {
    "no_perturbation": (ROW, {"discriminator.perturbations.count": 0}),
    "wgan": (ROW, WGAN),
    "unnormalised": (ROW, {"advantage.normalise": False, "advantage.scale": False}),
    "expert_errors_10": (ROW, {"data.expert_error_rate": 0.1}),
    "expert_errors_25": (ROW, {"data.expert_error_rate": 0.25}),
    "expert_errors_50": (ROW, {"data.expert_error_rate": 0.5}),
    "continued": (
        ROW,
        {
            "model.policy.path": f"runs/{ROW}/final/policy",
            "model.discriminator.path": f"runs/{ROW}/final/reward_model",
            "discriminator.warmup_steps": 0,
        },
    ),
    "frozen_discriminator": (ROW, {"discriminator.updates_per_policy_step": 0}),
    "label_switching": (ROW, {"discriminator.positives": "expert_and_correct"}),
    **{
        f"discriminator_{size}b": (
            "gsm8k/qwen2.5-7b_partial",
            {"model.discriminator.path": f"Qwen/Qwen2.5-{size}B-Instruct"},
        )
        for size in ("0.5", "1.5", "3")
    },
}
"""File below ablations/ -> (the row that it varies, dotted key -> value)."""


@cache
def experiment(name: str) -> RunConfig:
    return load_config(EXPERIMENTS / f"{name}.yaml")


def changes(old: str, new: str) -> dict[str, object]:
    """Dotted key -> new value of everything but the name that differs between two experiments."""
    found = differences(experiment(old), experiment(new))
    return {key: value for key, _, value in found if key != "name"}


def name_of(path: Path) -> str:
    return str(path.relative_to(EXPERIMENTS).with_suffix(""))


def header(path: Path) -> str:
    """The comment at the top of a file, as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:end])


PLANNED = [name for name in map(name_of, FILES) if "/" in name and not name.startswith("demo/")]
"""The rows of the published tables."""


# --- every file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_plan_accepts_every_experiment_on_the_nodes_that_it_names(path: Path) -> None:
    config, said = experiment(name_of(path)), header(path)
    match = re.search(r"(\d+) nodes? of (\d+) GPUs", said)
    on_gpus = config.placement.device == "gpu"
    assert said
    assert (match is not None) == on_gpus
    assert config.data.task in TASKS
    nodes, gpus = (int(match[1]), int(match[2])) if match else (1, 0)
    output = io.StringIO()
    show_plan(config, Console(file=output, width=120), gpus=gpus, nodes=nodes)
    assert f"config hash: {config_hash(config)}" in output.getvalue()
    if on_gpus:
        assert f"takes {nodes * gpus} GPUs" in output.getvalue()


def test_every_run_has_a_folder_of_its_own() -> None:
    runs = [name_of(path) for path in FILES if path.stem != "base"]
    assert [experiment(run).name for run in runs] == runs


def test_every_base_is_commented_and_used() -> None:
    used = set()
    for path in FILES:
        base = read_document(path, str(path)).data.get("base", [])
        for item in [base] if isinstance(base, str) else base:
            used.add(os.path.normpath(path.parent / item))
    assert [path.name for path in BASES if str(path) not in used] == []
    assert all(header(path) for path in BASES)


def test_rows_are_small_diffs() -> None:
    rows = {name: EXPERIMENTS / f"{name}.yaml" for name in PLANNED}
    assert [name for name, path in rows.items() if len(path.read_text().splitlines()) > 12] == []


# --- the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("task", "backbone"), product(TASK_NAMES, BACKBONES))
def test_the_main_table_is_whole(task: str, backbone: str) -> None:
    partial = f"{task}/{backbone}_partial"
    row = experiment(partial)
    assert (row.data.task, row.model.policy.path) == (task, BACKBONES[backbone])
    assert row.model.discriminator.path is None, "the policy's own backbone"
    for density in DENSITIES:
        other = experiment(f"{task}/{backbone}_{density}")
        assert (other.algorithm.type, other.reward.density.type) == ("airl", density)
        assert changes(partial, f"{task}/{backbone}_{density}").keys() <= {"reward.density.type"}
    sft = {"algorithm.type": "sft", "policy.learning_rate": 1e-4, "trainer.prompts_per_step": 128}
    assert changes(partial, f"{task}/{backbone}_sft") == sft
    assert changes(partial, f"{task}/{backbone}_grpo") == {
        "algorithm.type": "grpo",
        "reward.type": "official",
        "policy.learning_rate": 1e-5,
        "placement.policy_gpu_fraction": 0.6,
    }


@pytest.mark.parametrize("task", TASK_NAMES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_changes_the_model_and_what_it_takes_alone(task: str, backbone: str) -> None:
    machine = {"model.policy.path", "learner.zero_stage", "learner.tokens_per_micro_batch"}
    assert changes(f"{task}/qwen2.5-3b_partial", f"{task}/{backbone}_partial").keys() <= machine


def test_a_data_set_changes_the_data_its_negatives_and_its_evaluation_alone() -> None:
    allowed = ("data.", "eval.", "discriminator.perturbations.kinds")
    for task in TASK_NAMES:
        assert all(key.startswith(allowed) for key in changes(ROW, f"{task}/qwen2.5-3b_partial"))


@pytest.mark.parametrize("backbone", SMALLER)
def test_the_first_version_is_whole(backbone: str) -> None:
    airl = experiment(f"v1/{backbone}_airl")
    assert (airl.model.policy.path, airl.model.discriminator.path) == (BACKBONES[backbone], SMALLER[backbone])
    assert (airl.model.policy.lora.rank, airl.model.discriminator.lora.rank) == (128, 32)
    assert airl.policy.learning_rate == (1e-4 if backbone.startswith("llama") else 1e-5)
    assert (airl.rollout.samples_per_prompt, airl.discriminator.perturbations.count) == (16, 2)
    without = changes(f"v1/{backbone}_airl", f"v1/{backbone}_no_perturbation")
    assert without == {"discriminator.perturbations.count": 0}
    assert changes(f"v1/{backbone}_airl", f"v1/{backbone}_wgan") == WGAN
    assert experiment(f"v1/{backbone}_sft").algorithm.type == "sft"
    assert experiment(f"v1/{backbone}_grpo").reward.type == "official"


def test_each_ablation_differs_from_its_row_in_the_keys_that_it_names() -> None:
    files = {path.stem for path in (EXPERIMENTS / "ablations").glob("*.yaml")}
    assert files == set(ABLATIONS)
    for name, (row, expected) in ABLATIONS.items():
        assert changes(row, f"ablations/{name}") == expected, name


# --- settings -------------------------------------------------------------------------------------


def test_the_readmes_example_is_the_row_of_its_backbone() -> None:
    assert changes("gsm8k/qwen2.5-3b_airl", ROW) == {}


def test_the_rows_have_the_papers_settings() -> None:
    config = experiment(ROW)
    assert (config.trainer.steps, config.discriminator.warmup_steps) == (500, 250)
    assert (config.policy.learning_rate, config.discriminator.learning_rate) == (5e-6, 1e-5)
    assert (config.model.policy.lora.rank, config.model.discriminator.lora.rank) == (256, 256)
    assert (config.rollout.samples_per_prompt, config.reward.clip) == (8, (-5.0, 5.0))
    assert (config.rollout.max_completion_tokens, config.data.max_prompt_tokens) == (824, 300)
    assert (config.eval.samples_per_prompt, config.eval.k, config.eval.top_p) == (16, (1, 3, 5, 10), 0.95)


@pytest.mark.parametrize("name", [name for name in PLANNED if name != "ablations/continued"])
def test_the_roles_on_a_gpu_of_80_gb_fit_by_the_estimate(name: str) -> None:
    """vLLM takes its share whatever its cache would like; the learners need what is estimated.

    `continued` starts from another run's result, whose shape nobody knows before; it is that run's.
    """
    config = experiment(name)
    rollout, *learners = memory(config)
    needed = [learner.total for learner in learners]
    engine = config.rollout.memory_share * 80e9
    assert None not in needed
    assert engine + sum(total or 0 for total in needed) < 80e9
    weights = (rollout.parts["weights"] or 0) + (rollout.parts["adapter"] or 0)
    assert 0 < weights < 0.75 * engine, "room for a key-value cache"
