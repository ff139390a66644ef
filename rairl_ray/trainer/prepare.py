"""Everything that can be found wrong before an actor or a GPU is taken: data, models, tokenizers, placement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rairl_ray.config.rules import check, check_output
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import make_task
from rairl_ray.data.tasks.base import Task
from rairl_ray.engines.models import materialise
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.trainer.labelling import TraceReader
from rairl_ray.types import Demonstration

CHECKED_PROMPTS = 20_000
"""Prompts whose length is checked before the start; generated tasks have bounded lengths anyway."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs besides machines."""

    config: RunConfig
    task: Task
    policy_path: str
    discriminator_path: str
    policy_renderer: Renderer
    reader: TraceReader


def prepare(config: RunConfig) -> Prepared:
    """Check the whole configuration against data and models.

    Raises:
        UserError: one line naming file, key, value and remedy.
    """
    check(config)
    check_output(config)
    task = make_task(config.data, config.seed)
    cache = Path(config.output_dir) / ".cache" / "models"
    policy_path = materialise(config.model.policy, role="policy", cache_dir=cache, seed=config.seed)
    discriminator = discriminator_model(config)
    discriminator_path = (
        policy_path
        if discriminator.path is None and discriminator.build is None
        else materialise(discriminator, role="discriminator", cache_dir=cache, seed=config.seed)
    )
    system_prompt = task.system_prompt if config.data.system_prompt is None else config.data.system_prompt

    def renderer(path: str, model: Model, role: str) -> Renderer:
        return Renderer(load_tokenizer(path, model, role=role), system_prompt, config.data.system_role)

    policy_renderer = renderer(policy_path, config.model.policy, "policy")
    reader = TraceReader(
        renderer(discriminator_path, discriminator, "discriminator"),
        config.reward.density,
        policy_renderer.fingerprint,
    )
    check_window(config, policy_path, "model.policy")
    check_prompts(task.train, policy_renderer, config, "train")
    check_prompts(task.eval, policy_renderer, config, "eval")
    if config.algorithm.type != "grpo":
        check_experts(task)
    return Prepared(
        config=config,
        task=task,
        policy_path=policy_path,
        discriminator_path=discriminator_path,
        policy_renderer=policy_renderer,
        reader=reader,
    )


def discriminator_model(config: RunConfig) -> Model:
    """The discriminator's model section, with the policy's revision and template where it shares its path."""
    model = config.model.discriminator
    if model.path is None and model.build is None:
        policy = config.model.policy
        return model.model_copy(
            update={"revision": policy.revision, "chat_template": model.chat_template or policy.chat_template}
        )
    return model


def check_window(config: RunConfig, path: str, key: str) -> None:
    """Prompt and completion must fit the model's positions."""
    file = Path(path) / "config.json"
    if not file.is_file():
        return  # a hub id: its window is checked by the engine that opens it
    window = json.loads(file.read_text()).get("max_position_embeddings")
    needed = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if window is not None and needed > window:
        raise ConfigError(
            f"{path}: {key} has a window of {window} tokens, but data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens} + rollout.max_completion_tokens="
            f"{config.rollout.max_completion_tokens} = {needed}; lower one of the two"
        )


def check_prompts(items: Sequence[Demonstration], renderer: Renderer, config: RunConfig, split: str) -> None:
    """No prompt may be longer than `data.max_prompt_tokens`: it would be cut silently or fail much later."""
    limit = config.data.max_prompt_tokens
    generated = config.data.task in ("arithmetic", "countdown")
    for index in range(min(len(items), 512 if generated else CHECKED_PROMPTS)):
        length = len(renderer.prompt_ids(items[index].prompt))
        if length > limit:
            raise DataError(
                f"data ({split}): prompt {items[index].prompt.id} has {length} tokens, more than "
                f"data.max_prompt_tokens={limit}; raise the limit or remove the row"
            )


def check_experts(task: Task) -> None:
    if not len(task.train) or task.train[0].completion is None:
        raise DataError(
            f"data.task={task.name}: the training data has no expert chains of thought, which algorithm.type "
            "airl and sft need; set data.demonstrations to a file of them, or use algorithm.type=grpo"
        )
