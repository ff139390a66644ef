"""What `evaluate` is asked about: an experiment file, a finished run, a model folder or a hub id."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rairl_ray.config import rules
from rairl_ray.config.load import COMMAND_LINE, load_config
from rairl_ray.config.schema import Lora, Model, RunConfig
from rairl_ray.data.rows import is_hub_id
from rairl_ray.errors import ModelError
from rairl_ray.files import REWARD_FILE
from rairl_ray.rewards.source import reward_folder
from rairl_ray.runfolder import RunFolder

RUN_PLACES = (".", "final", "final/policy", "final/reward_model")
"""Places of a run that stand for the whole of it."""
NO_REWARD = "none"
"""Value of `eval.reward` that leaves samples without a score."""


@dataclass(frozen=True)
class Target:
    """A policy, the reward that scores it, and where its evaluations go."""

    config: RunConfig
    """Its `model.policy` is the policy to evaluate."""
    folder: RunFolder
    reward: Path | None
    """Folder of the reward model; None where nothing scores."""
    policy_version: int | None
    """Policy updates behind the weights, where a run of ours made them."""

    @property
    def is_run(self) -> bool:
        """Whether its folder is a run's, and not one that holds evaluations alone."""
        return bool(self.policy_version)


def find_target(text: str, overrides: Sequence[str]) -> Target:
    """Resolve what a user wrote.

    - a YAML file: the model that its run starts from (`model.policy`), untrained;
    - a run folder, or a run's name below `output_dir`: its final policy and its learned reward;
    - a model folder or hub id: that model, with the settings of the overrides (`data.task=...`).

    Raises:
        UserError: nothing there, an unfinished run, a configuration that contradicts itself.
    """
    if Path(text).suffix in (".yaml", ".yml"):
        return _of_file(text, overrides)
    output_dir = load_config(None, [o for o in overrides if o.startswith("output_dir=")]).output_dir
    places = [Path(text).expanduser(), Path(output_dir) / text]
    for place in places:
        root = next((above for above in (place, *place.parents) if _is_run(above)), None)
        if root is not None and place.exists():
            if place.relative_to(root).as_posix() not in RUN_PLACES:
                raise ModelError(
                    f"{text}: lies in the run {root}, of which only final/policy can be evaluated; give the run"
                )
            return _of_run(root, overrides)
    if not places[0].is_dir() and not is_hub_id(text):
        looked = " and ".join(str(place) for place in places)
        raise ModelError(
            f"{text}: neither a run folder (looked for config.yaml in {looked}), nor a model folder, nor a "
            "hub id; give a YAML file, a run, a model folder or a hub id"
        )
    return _of_model(text, overrides)


def _is_run(place: Path) -> bool:
    return (place / "config.yaml").is_file() and (
        (place / "metrics.jsonl").is_file() or (place / "final").is_dir()
    )


def _of_file(text: str, overrides: Sequence[str]) -> Target:
    config = load_config(text, overrides)
    folder = Path(config.output_dir) / "models" / config.name
    return Target(config, RunFolder(folder), _reward(config), 0)


def _of_run(root: Path, overrides: Sequence[str]) -> Target:
    folder = RunFolder(root)
    if not any((folder.final_policy / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"{root}: the run has no final/policy (it is not finished); finish it with `train --resume {root}`"
        )
    config = load_config(folder.config, overrides)
    policy = plain_policy(config.model.policy, str(folder.final_policy))
    config = config.model_copy(update={"model": config.model.model_copy(update={"policy": policy})})
    reward = _reward(config)
    if config.eval.reward is None and (folder.final_reward_model / REWARD_FILE).is_file():
        reward = folder.final_reward_model
    updates = config.trainer.steps
    if config.algorithm.needs.rollouts:
        updates *= config.policy.minibatches_per_step
    return Target(config, folder, reward, updates)


def _of_model(text: str, overrides: Sequence[str]) -> Target:
    path = str(Path(text).expanduser().resolve()) if Path(text).expanduser().is_dir() else text
    config = load_config(None, [f"model.policy.path={path}", *overrides])
    # Only sampling and grading are wanted: the rules of GRPO ask for no discriminator and no experts.
    checked = config.model_copy(update={"algorithm": config.algorithm.model_copy(update={"type": "sft"})})
    rules.check(checked, COMMAND_LINE)
    name = re.sub(r"[^\w.-]+", "-", text).strip("-.") if config.name == "run" else config.name
    return Target(config, RunFolder(Path(config.output_dir) / "models" / name), _reward(config), None)


def _reward(config: RunConfig) -> Path | None:
    if config.eval.reward in (None, NO_REWARD):
        return None
    return reward_folder(config.eval.reward, config.output_dir)


def plain_policy(model: Model, path: str) -> Model:
    """The section of a final policy: weights from `path`, whose adapter is merged into its base."""
    return model.model_copy(
        update={"path": path, "build": None, "revision": None, "lora": Lora(), "quantization": "none"}
    )
