"""A discriminator that starts from a saved reward: to learn on, or to stay as it is (frozen, foreign)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from rairl_ray.algorithms.warmup import frozen
from rairl_ray.config.rules import show
from rairl_ray.config.schema import Density, RunConfig
from rairl_ray.config.variants import HEADS
from rairl_ray.data.rows import is_hub_id
from rairl_ray.engines.artifacts import RewardSettings, read_settings
from rairl_ray.engines.sources import PYPI_PREFIX
from rairl_ray.errors import ConfigError
from rairl_ray.files import REWARD_FILE
from rairl_ray.rewards.source import reward_folder

LEARN_ON = "discriminator.updates_per_policy_step=1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedStart:
    """Where the discriminator's weights (and an implicit head's reference) come from."""

    folder: Path
    settings: RewardSettings
    frozen: bool

    def describe(self) -> str:
        """A line for events.log."""
        state = "it stays as it is" if self.frozen else "it learns on"
        return (
            f"the discriminator starts from the saved reward {self.folder} ({self.settings.head} head, "
            f"version {self.settings.discriminator_version}): {state}"
        )


def saved_start(config: RunConfig) -> SavedStart | None:
    """The saved reward that `model.discriminator.path` names; None where it names an ordinary model.

    Raises:
        ModelError: a run without a reward.
        ConfigError: the configuration contradicts `reward.json`.
    """
    folder = _folder(config)
    settings = None if folder is None else read_settings(folder)
    if folder is None or settings is None:
        return None
    start = SavedStart(folder=folder, settings=settings, frozen=frozen(config.discriminator))
    check_start(config, start)
    return start


def _folder(config: RunConfig) -> Path | None:
    model = config.model.discriminator
    if model.path is None or not config.algorithm.needs.discriminator or model.path.startswith(PYPI_PREFIX):
        return None
    local = Path(model.path).expanduser()
    if local.exists() or (Path(config.output_dir) / model.path).exists():
        ordinary = any((local / name).is_file() for name in ("config.json", "adapter_config.json"))
        if ordinary and not (local / REWARD_FILE).is_file():
            return None
        return reward_folder(model.path, config.output_dir)
    if not is_hub_id(model.path):
        return None
    try:
        hf_hub_download(model.path, REWARD_FILE, revision=model.revision)
    except (OSError, HfHubHTTPError, HFValidationError):
        return None
    return reward_folder(model.path, config.output_dir, model.revision)


def check_start(config: RunConfig, start: SavedStart) -> None:
    """A frozen reward is used as it was saved; one that learns on keeps its head, all else is a warning.

    Raises:
        ConfigError: one line with every key, both values and the remedy.
    """
    file = start.folder / REWARD_FILE
    fixed = list(_fixed(config, start.settings))
    free = list(_free(config, start.settings))
    if start.frozen and free:
        fixed += free
        remedy = f"write the saved values, or let it learn on ({LEARN_ON})"
    else:
        remedy = "write the saved values, or start from another model (model.discriminator.path)"
    if fixed:
        verb = "is frozen and " if start.frozen else ""
        raise ConfigError(f"{file}: the reward {verb}was saved with {_listed(fixed)}; {remedy}")
    if free:
        _log.warning("%s: the reward learns on, but was saved with %s", file, _listed(free))


Difference = tuple[str, Any, Any]
"""A key, its value in reward.json, its value in the configuration."""


def _fixed(config: RunConfig, saved: RewardSettings) -> Iterator[Difference]:
    """What saved weights can never be used with."""
    discriminator, model = config.discriminator, config.model.discriminator
    if discriminator.head != saved.head:
        yield "discriminator.head", saved.head, discriminator.head
    elif HEADS[saved.head].own_output and discriminator.loss.needs.potential:
        # The export of an `airl` head keeps g alone, so even such a reward has no potential h.
        without = "bce (one output: the reward g, without the potential h)"
        yield "discriminator.loss.type", without, discriminator.loss.type
    if HEADS[saved.head].reference and model.quantization != "none":
        # The reference is not quantised: the log-ratio would be that of the rounding.
        yield "model.discriminator.quantization", "none", model.quantization


def _free(config: RunConfig, saved: RewardSettings) -> Iterator[Difference]:
    """What a reward that learns on may have otherwise, and a frozen one may not."""
    model, reward, density = (
        config.model.discriminator,
        config.reward,
        Density.model_validate(saved.density),
    )
    if HEADS[saved.head].reference and config.discriminator.beta != saved.beta:
        yield "discriminator.beta", saved.beta, config.discriminator.beta
    if reward.density.type != density.type:
        yield "reward.density.type", density.type, reward.density.type
    if density.needs.every and reward.density.every != density.every:
        yield "reward.density.every", density.every, reward.density.every
    if reward.temperature != saved.temperature:
        yield "reward.temperature", saved.temperature, reward.temperature
    if reward.clip != saved.clip:
        yield "reward.clip", saved.clip, reward.clip
    if (saved.dtype, model.dtype) == ("float32", "bfloat16"):
        yield "model.discriminator.dtype", saved.dtype, model.dtype
    if not HEADS[saved.head].reference and model.quantization != "none":
        yield "model.discriminator.quantization", "none", model.quantization
    if model.chat_template is not None:
        yield "model.discriminator.chat_template", None, model.chat_template


def _listed(differences: list[Difference]) -> str:
    return ", ".join(f"{key}={show(saved)} (configuration: {show(now)})" for key, saved, now in differences)
