"""Everything that can be found wrong before an actor or a GPU is taken: data, models, tokenizers, placement."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rairl_ray.config.rules import check, check_output
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.config.windows import window_of
from rairl_ray.data.prompt_length import fit_prompt_length
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import make_task
from rairl_ray.data.tasks.base import Task, TaskRules
from rairl_ray.data.tasks.generated import GeneratedSplit
from rairl_ray.engines.artifacts import system_prompt_of
from rairl_ray.engines.models import missing_packages, resolve_model
from rairl_ray.engines.sources import end_tokens, read_config
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.rewards.reading import TraceReader
from rairl_ray.trainer.contract import check_contract
from rairl_ray.trainer.expert_errors import counted_errors, with_expert_errors
from rairl_ray.trainer.saved_start import SavedStart, saved_start
from rairl_ray.types import Demonstration, Trace

PROBED_EXPERTS = 500
"""Expert traces whose length is looked at before the start."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run needs besides machines."""

    config: RunConfig
    task: Task
    policy_path: str
    discriminator_path: str
    policy_renderer: Renderer
    reader: TraceReader
    start: SavedStart | None = None
    """The saved reward that the discriminator starts from; None: an ordinary model."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the data, which every step's row repeats."""


def prepare(config: RunConfig) -> Prepared:
    """Check the whole configuration against data and models.

    Raises:
        UserError: one line naming file, key, value and remedy.
    """
    check(config)
    check_output(config)
    task = make_task(config.data, config.seed)
    policy_path, policy_renderer = open_policy(config, task)
    start = saved_start(config)
    discriminator_path, renderer = open_discriminator(config, task, start, policy_path)
    reader = TraceReader(renderer, config.reward.density, policy_renderer.fingerprint)
    check_window(config, policy_path, config.model.policy, "model.policy")
    task = usable_rows(task, policy_renderer, config)
    check_expert_lengths(task, policy_renderer, config)
    if config.algorithm.needs.discriminator:
        check_discriminator_window(config, task, discriminator_path, reader, start)
    return Prepared(
        config=config,
        task=task,
        policy_path=policy_path,
        discriminator_path=discriminator_path,
        policy_renderer=policy_renderer,
        reader=reader,
        start=start,
        facts=counted_errors(task) if config.algorithm.needs.experts else {},
    )


def open_policy(config: RunConfig, rules: Task | TaskRules, strict: bool = True) -> tuple[str, Renderer]:
    """The policy's folder or hub id, and how it reads prompts.

    Args:
        strict: refuse what the round trip of `contract` finds.

    Raises:
        ModelError: one line.
    """
    path = resolve_model(config.model.policy, role="policy", cache_dir=_cache(config), seed=config.seed)
    renderer = policy_renderer_of(path, rules, config)
    if strict:
        check_contract(f"model.policy ({path})", renderer, *model_facts(path, config.model.policy))
    return path, renderer


def open_discriminator(
    config: RunConfig, rules: Task | TaskRules, start: SavedStart | None, policy_path: str, strict: bool = True
) -> tuple[str, Renderer]:
    """The discriminator's folder or hub id (the policy's, unless it has its own), and how it reads prompts.

    Arguments and errors as of `open_policy`.
    """
    model = discriminator_model(config, start)
    path = (
        policy_path
        if model.path is None and model.build is None
        else resolve_model(model, role="discriminator", cache_dir=_cache(config), seed=config.seed)
    )
    renderer = discriminator_renderer(path, rules, config, start)
    if strict:
        check_contract(f"model.discriminator ({path})", renderer, *model_facts(path, model))
    return path, renderer


def model_facts(path: str, model: Model) -> tuple[dict[str, Any], tuple[int, ...]]:
    """A model's `config.json` and the end tokens of its generation config."""
    return read_config(path, model.revision), end_tokens(path, model.revision)


def _cache(config: RunConfig) -> Path:
    return Path(config.output_dir) / ".cache" / "models"


def check_machine(config: RunConfig, device: str) -> None:
    """What only the cluster (`placement.device: auto`) and the installation tell, before actors start.

    Raises:
        UserError: a rule that the device breaks, or a package that a model asks for and this machine lacks.
    """
    check(config, f"on this cluster ({device})", device)
    roles = ("policy", "discriminator") if config.algorithm.needs.discriminator else ("policy",)
    for role in roles:
        for key, value, package in missing_packages(getattr(config.model, role)):
            raise ConfigError(f"model.{role}.{key}={value}: needs the package {package}; pip install {package}")


def discriminator_model(config: RunConfig, start: SavedStart | None) -> Model:
    """The discriminator's model section as it is read, with the folder of a saved reward in the place of what
    names that."""
    model = config.model.read_discriminator
    return model if start is None else model.model_copy(update={"path": str(start.folder)})


def check_window(config: RunConfig, path: str, model: Model, key: str) -> None:
    """Prompt and completion must fit the model's positions."""
    key_and_window = window_of(read_config(path, model.revision))
    needed = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    if key_and_window is not None and needed > key_and_window[1]:
        said, window = key_and_window
        raise ConfigError(
            f"{path}: {key} has a window of {window} tokens ({said}), but data.max_prompt_tokens="
            f"{config.data.max_prompt_tokens} + rollout.max_completion_tokens="
            f"{config.rollout.max_completion_tokens} = {needed}; lower one of the two"
        )


def check_discriminator_window(
    config: RunConfig, task: Task, path: str, reader: TraceReader, start: SavedStart | None
) -> None:
    """What the policy may write and what experts have written must fit the discriminator's positions.

    Its tokenizer may be another one: samples are counted in the policy's tokens, experts in its own.

    Raises:
        ConfigError: the window is smaller than the policy's.
        DataError: an expert is longer.
    """
    model = discriminator_model(config, start)
    check_window(config, path, model, "model.discriminator")
    found = window_of(read_config(path, model.revision))
    for row in [task.train[i] for i in range(min(PROBED_EXPERTS, len(task.train)))] if found else []:
        tokens = reader.read(Trace(prompt=row.prompt, text=row.completion or "")).tokens
        length = len(tokens.prompt_ids) + len(tokens.completion_ids)
        if found and length > found[1]:
            raise DataError(
                f"{path}: model.discriminator has a window of {found[1]} tokens ({found[0]}), but the expert "
                f"of {row.prompt.id} has {length} with its prompt; leave that row out, or take another model"
            )


def usable_rows(task: Task, renderer: Renderer, config: RunConfig) -> Task:
    """The task without rows that this run cannot use: too long a prompt, or no expert where one is needed.

    `data.expert_error_rate` corrupts a share of the demonstrations that are left.

    Raises:
        DataError: there is nothing to train on, or `data.on_bad_row` is `fail` and a prompt is too long.
    """
    limit, on_bad_row = config.data.max_prompt_tokens, config.data.on_bad_row
    if not len(task.train):
        raise DataError(
            f"data.task={task.name}: the data has evaluation problems alone and nothing to train on; "
            "give data.path a folder with a training split, or set data.train_split to data.eval_split"
        )
    train = with_experts(task) if config.algorithm.needs.experts else task.train
    usable = replace(
        task,
        train=fit_prompt_length(train, renderer, limit, on_bad_row),
        eval=fit_prompt_length(task.eval, renderer, limit, on_bad_row),
    )
    return with_expert_errors(usable, config.data.expert_error_rate)


def policy_renderer_of(path: str, task: Task | TaskRules, config: RunConfig) -> Renderer:
    """How the policy reads prompts: its tokenizer, the configured or the task's own system prompt."""
    tokenizer = load_tokenizer(path, config.model.policy, role="policy")
    return Renderer(tokenizer, _system_prompt(task, config), config.data.system_role)


def discriminator_renderer(
    path: str, task: Task | TaskRules, config: RunConfig, start: SavedStart | None
) -> Renderer:
    """How the discriminator reads prompts: as the policy does, or as the saved reward of its start did."""
    tokenizer = load_tokenizer(path, discriminator_model(config, start), role="discriminator")
    settings = None if start is None else start.settings
    return Renderer(
        tokenizer, *system_prompt_of(settings, _system_prompt(task, config), config.data.system_role)
    )


def _system_prompt(task: Task | TaskRules, config: RunConfig) -> str:
    return task.system_prompt if config.data.system_prompt is None else config.data.system_prompt


def with_experts(task: Task) -> Sequence[Demonstration]:
    """The training rows that have an expert trace, which airl and sft learn from.

    Raises:
        DataError: when there is none.
    """
    if isinstance(task.train, GeneratedSplit):
        return task.train
    rows = [row for row in task.train if row.completion is not None]
    if not rows:
        raise DataError(
            f"data.task={task.name}: the training data has no expert chains of thought, which algorithm.type "
            "airl and sft need; set data.demonstrations to a file of them, or use algorithm.type=grpo"
        )
    if len(rows) < len(task.train):
        _log.warning(
            "data: %d of %d training rows have no expert and are left out",
            len(task.train) - len(rows),
            len(task.train),
        )
    return rows


def check_expert_lengths(task: Task, renderer: Renderer, config: RunConfig) -> None:
    """Warn where experts are longer than the policy may write: the discriminator could then tell by length.

    Nothing is cut: training and scoring read whole traces (docs/method.md 8, defect 6).
    """
    if not config.algorithm.needs.experts:
        return
    rows = [task.train[i] for i in range(min(PROBED_EXPERTS, len(task.train)))]
    traces = [Trace(prompt=row.prompt, text=row.completion or "") for row in rows]
    lengths = [len(renderer.tokenize(trace, same_tokenizer=True).completion_ids) for trace in traces]
    limit = config.rollout.max_completion_tokens
    longer = sum(length > limit for length in lengths)
    if longer:
        _log.warning(
            "data: %d of the first %d experts have more than rollout.max_completion_tokens=%d tokens "
            "(longest %d): samples of the policy will be cut where experts are not",
            longer, len(lengths), limit, max(lengths),
        )  # fmt: skip
