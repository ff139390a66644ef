"""`launch.py transfer`: every policy's samples, and every domain's injected errors, under every reward.

Each policy is sampled once, in its own run folder; what is there already is used again. A cell has the metrics
of an evaluation (reranking, calibration) and of localisation on the policy's domain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rairl_ray import metrics as names
from rairl_ray.config.load import load_config
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.files import json_text, write_atomic
from rairl_ray.rewards.source import reward_folder
from rairl_ray.runfolder import TRANSFER_PREFIX, Summary, read_summary
from rairl_ray.trainer.outputs import AtHand, at_hand
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs.evaluate import evaluate
from rairl_ray.verbs.job import remove, sole_owner
from rairl_ray.verbs.localisation_cases import injected_cases, summarise, values_of_case
from rairl_ray.verbs.localise import scored_units
from rairl_ray.verbs.target import NO_REWARD, Target, find_target

SHOWN = (
    names.EVAL_PASS_AT_1,
    names.EVAL_RERANK_AT_1,
    names.CALIBRATION_AUROC,
    names.LOCALISATION_STEP_ACCURACY,
)
SAMPLES = f"{TRANSFER_PREFIX}samples"


def transfer(
    policies: Sequence[str],
    rewards: Sequence[str],
    overrides: Sequence[str] = (),
    display: Display | None = None,
) -> int:
    """Evaluate a matrix of finished runs; leaves transfer.json in OUTPUT/NAME (`name=`, else `transfer`).

    Raises:
        UserError: no policy or no reward named, one that is not there, two of one name.
    """
    if not policies or not rewards:
        raise ConfigError(
            "transfer: needs runs on both sides; write `transfer POLICY_RUN ... --reward RUN ...`"
        )
    of, by = list(map(_name, policies)), list(map(_name, rewards))
    if len(set(of)) < len(of) or len(set(by)) < len(by):
        raise ConfigError("transfer: two runs of one name; rename one, or name each once")
    display = display or Display("transfer", 1)
    with at_hand([*policies, *rewards], overrides, display.note) as here:
        sides = dict(zip(of, here.runs, strict=False)), dict(zip(by, here.runs[len(of) :], strict=True))
        return _transferred(*sides, here, display)


def _transferred(
    policies: Mapping[str, str], rewards: Mapping[str, str], here: AtHand, display: Display
) -> int:
    """Args: policies, rewards: name in the matrix -> run."""
    named = load_config(None, [text for text in here.overrides if text.startswith(("output_dir=", "name="))])
    passed = [text for text in here.overrides if not text.startswith("name=")]
    targets = {
        name: find_target(text, [*passed, f"eval.reward={NO_REWARD}"]) for name, text in policies.items()
    }
    folders = {name: reward_folder(text, named.output_dir) for name, text in rewards.items()}
    target = Path(named.output_dir) / ("transfer" if named.name == "run" else named.name)
    target.mkdir(parents=True, exist_ok=True)
    here.keep(target)
    for of in targets.values():
        for name in (SAMPLES, *(f"{TRANSFER_PREFIX}{reward}" for reward in rewards)):
            here.keep(of.folder.evaluations / name)
    display.note(f"transfer folder: {target}")
    cells: list[dict[str, Any]] = []
    with sole_owner(target), cluster(next(iter(targets.values())).config):
        for policy, of in targets.items():
            text = policies[policy]
            evaluate(text, [*passed, f"eval.reward={NO_REWARD}", f"eval.name={SAMPLES}"])
            samples = of.folder.evaluations / SAMPLES / "rows.jsonl"
            for reward, folder in folders.items():
                metrics = _reranked(text, of, samples, reward, folder, passed)
                metrics |= _localised(of, folder, target, display)
                cells.append({"policy": policy, "reward": reward, "metrics": metrics})
    matrix = {"policies": list(targets), "rewards": list(folders), "cells": cells}
    write_atomic(target / "transfer.json", json_text(matrix, indent=1) + "\n")
    display.table("policy x reward", _table(cells), ("policy", "reward", *SHOWN))
    display.finish([f"matrix: {target / 'transfer.json'}", f"figure and table: launch.py report {target}"])
    return 0


def _name(text: str) -> str:
    """A run's name as the matrix shows it."""
    text = text.partition("?")[0]  # of a URI
    return text.strip("/").removesuffix("/final/reward_model").removesuffix("/final/policy").split("/")[-1]


def _reranked(
    text: str, of: Target, samples: Path, reward: str, folder: Path, overrides: Sequence[str]
) -> Summary:
    name = f"{TRANSFER_PREFIX}{reward}"
    mode = "eval.mode=pregenerated_policy_and_reward"
    evaluate(text, [*overrides, mode, f"eval.input={samples}", f"eval.reward={folder}", f"eval.name={name}"])
    return read_summary(of.folder.evaluations / name / "summary.json")


def _localised(of: Target, folder: Path, target: Path, display: Display) -> Summary:
    """Injected errors of the policy's domain; nothing where it has none."""
    try:
        cases = injected_cases(of.config)
    except DataError:
        return {}
    remove(target / "scores")  # of another cell, where an earlier process was killed
    units = scored_units(of.config, folder, cases, target, display)
    remove(target / "scores")
    (target / "source.jsonl").unlink()
    values = [values_of_case(case, row) for case, row in zip(cases, units, strict=True)]
    return summarise(cases, values, of.config)


def _table(cells: Sequence[dict[str, Any]]) -> list[dict[str, object]]:
    return [
        {
            "policy": cell["policy"],
            "reward": cell["reward"],
            **{name: cell["metrics"][name]["value"] for name in SHOWN if name in cell["metrics"]},
        }
        for cell in cells
    ]
