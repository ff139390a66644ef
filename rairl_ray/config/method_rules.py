"""Rules about data, reward, discriminator, advantages and sampling. `rules.check` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rairl_ray.config.schema import RunConfig
from rairl_ray.config.variants import ERRORS

Problems = Iterator[tuple[str, str]]

GENERATED_TASKS = ("arithmetic", "countdown")


def data_source(config: RunConfig) -> Problems:
    data = config.data
    if data.task == "jsonl" and data.path is None:
        yield "data.task", "needs a file or hub id; set data.path"
    if data.task in GENERATED_TASKS and data.path is not None:
        yield (
            "data.path",
            f"data.task={data.task} makes its own problems; set data.task=jsonl or data.path=null",
        )
    if data.task == "jsonl" and data.fields.demonstration is None and data.demonstrations is None:
        if config.algorithm.needs.experts:
            yield (
                "data.fields.demonstration",
                f"algorithm.type={config.algorithm.type} learns from experts; name their column or set "
                "data.demonstrations=FILE",
            )
        elif config.advantage.expert != "none":
            yield (
                "advantage.expert",
                "needs expert traces; set data.fields.demonstration or data.demonstrations=FILE",
            )


def difficulty(config: RunConfig) -> Problems:
    arithmetic = config.data.arithmetic
    if arithmetic.operands_min > arithmetic.operands_max:
        yield (
            "data.arithmetic.operands_min",
            f"exceeds data.arithmetic.operands_max={arithmetic.operands_max}; swap them",
        )
    if not arithmetic.operators:
        yield "data.arithmetic.operators", "is empty; write a list such as ['+', '-']"


def gold_answers(config: RunConfig) -> Problems:
    """What compares with gold answers needs a column of them (learning from experts alone does not)."""
    if config.data.task != "jsonl" or config.data.fields.answer is not None:
        return
    remedy = "needs gold answers; set data.fields.answer"
    if config.algorithm.needs.answers:
        yield "algorithm.type", remedy
    if not config.algorithm.needs.discriminator:
        return
    if config.discriminator.positives == "expert_and_correct":
        yield "discriminator.positives", f"{remedy} or discriminator.positives=expert"
    if config.reward.outcome_weight > 0:
        yield "reward.outcome_weight", f"{remedy} or reward.outcome_weight=0"
    if config.discriminator.warmup_gate_auroc is not None:
        yield "discriminator.warmup_gate_auroc", f"{remedy} or discriminator.warmup_gate_auroc=null"


def reward(config: RunConfig) -> Problems:
    kind, needs, algorithm = config.reward.type, config.algorithm.needs, config.algorithm.type
    if needs.discriminator and kind != "discriminator":
        yield (
            "reward.type",
            f"algorithm.type={algorithm} learns its reward; write reward.type=discriminator or "
            "algorithm.type=grpo",
        )
    if needs.answers and kind == "discriminator":
        yield (
            "reward.type",
            f"algorithm.type={algorithm} has no discriminator; write reward.type=correctness or official",
        )
    if kind != "discriminator" and needs.answers and config.reward.outcome_weight > 0:
        yield "reward.outcome_weight", f"would count correctness twice with reward.type={kind}; set it to 0"
    clip = config.reward.clip
    if clip is not None and clip[0] >= clip[1]:
        yield "reward.clip", "the lower bound must be less than the upper; write [lower, upper] such as [-5, 5]"


def discriminator_loss(config: RunConfig) -> Problems:
    head, loss = config.discriminator.head_needs, config.discriminator.loss
    if loss.level == "trace" and not head.reference:
        yield "discriminator.loss.level", "needs discriminator.head=implicit; set it or write unit"
    if loss.gradient_penalty > 0 and not head.input_gradient:
        yield (
            "discriminator.loss.gradient_penalty",
            "needs discriminator.head=scalar; set it to 0 and use discriminator.loss.weight_clip",
        )
    if loss.gradient_penalty > 0 and config.learner.zero_stage == 3:
        yield (
            "discriminator.loss.gradient_penalty",
            "differentiates twice, and ZeRO-3 has released the weights by then; set learner.zero_stage=2",
        )
    bounds = (loss.drift_penalty, loss.gradient_penalty, loss.weight_clip)
    if loss.needs.bound and not any(bounds):
        control = "gradient_penalty=10" if head.input_gradient else "drift_penalty=0.1"
        yield (
            "discriminator.loss.type",
            f"is unbounded without a Lipschitz control; set discriminator.loss.{control} "
            "(or discriminator.loss.weight_clip)",
        )


def pairs(config: RunConfig) -> Problems:
    discriminator = config.discriminator
    if not discriminator.loss.needs.pairs:
        return
    kind = discriminator.loss.type
    if discriminator.demonstrations_per_update is not None:
        yield (
            "discriminator.demonstrations_per_update",
            f"{kind} compares traces of one prompt: its experts are the step's own; set it to null",
        )
    if discriminator.replay.share > 0:
        yield (
            "discriminator.replay.share",
            f"{kind} compares traces of one prompt, not of past ones; set it to 0",
        )


def perturbations(config: RunConfig) -> Problems:
    """`count: 0` is the ablation without perturbations: label and kinds then say nothing."""
    settings, key = config.discriminator.perturbations, "discriminator.perturbations"
    if settings.count:
        yield from _error_kinds(config, f"{key}.kinds", settings.kinds, f"{key}.count=0")


def _error_kinds(config: RunConfig, key: str, kinds: Sequence[str], off: str) -> Problems:
    if not kinds:
        yield key, f"is empty; name kinds or set {off}"
    elif all(ERRORS[kind].data for kind in kinds) and config.data.task in GENERATED_TASKS:
        yield key, f"need options or corrupted chains, which data.task={config.data.task} has not; add operator"


def replay(config: RunConfig) -> Problems:
    settings = config.discriminator.replay
    if settings.share > 0 and settings.capacity == 0:
        yield "discriminator.replay.share", "needs a buffer; set discriminator.replay.capacity"


def warmup(config: RunConfig) -> Problems:
    settings = config.discriminator
    most, least = settings.warmup_max_steps, settings.warmup_steps
    if most is not None and most < least:
        yield "discriminator.warmup_max_steps", f"is less than discriminator.warmup_steps={least}; raise it"
    if settings.warmup_gate_auroc is not None and least == 0 and not most:
        yield "discriminator.warmup_gate_auroc", "has no steps to wait in; set discriminator.warmup_max_steps"
    pool, step = (
        settings.warmup_pool_prompts,
        settings.warmup_prompts_per_step or config.trainer.prompts_per_step,
    )
    if pool is not None and pool < step:
        yield (
            "discriminator.warmup_pool_prompts",
            f"is less than the {step} prompts of one warm-up update; raise it or lower "
            "discriminator.warmup_prompts_per_step",
        )


def group_size(config: RunConfig) -> Problems:
    if not config.algorithm.needs.rollouts:
        return
    samples, advantage = config.rollout.samples_per_prompt, config.advantage
    relative = advantage.normalise or advantage.scale or advantage.needs.others
    if samples + advantage.expert_copies(samples) < 2 and relative:
        yield (
            "rollout.samples_per_prompt",
            f"advantage.type={advantage.type} compares the samples of a prompt and one alone has advantage 0; "
            "raise it to 2 or more",
        )


def policy(config: RunConfig) -> Problems:
    cap = config.policy.tis_cap
    if cap is not None and cap < 1:
        yield "policy.tis_cap", "would shrink even on-policy tokens; write 1 or more, or null"


def sampling(config: RunConfig) -> Problems:
    if config.rollout.temperature == 0 and config.algorithm.needs.rollouts:
        yield (
            "rollout.temperature",
            "samples of a prompt would all be equal; write a temperature above 0, such as 1",
        )
    if config.eval.temperature == 0 and config.eval.samples_per_prompt > 1:
        yield (
            "eval.temperature",
            f"eval.samples_per_prompt={config.eval.samples_per_prompt} greedy samples would all be equal; "
            "raise it or set eval.samples_per_prompt=1",
        )


def pass_at_k(config: RunConfig) -> Problems:
    if not config.eval.k:
        yield "eval.k", "is empty; write a list such as [1, 3, 5]"
    elif max(config.eval.k) > config.eval.samples_per_prompt:
        yield (
            "eval.k",
            f"{max(config.eval.k)} exceeds eval.samples_per_prompt={config.eval.samples_per_prompt}; "
            "raise that or drop it",
        )


def localisation(config: RunConfig) -> Problems:
    if config.eval.localisation_readout == "threshold" and config.eval.localisation_threshold is None:
        yield "eval.localisation_readout", "needs a number to compare with; set eval.localisation_threshold"
    if config.eval.localisation_traces:
        kinds = config.eval.localisation_kinds
        yield from _error_kinds(config, "eval.localisation_kinds", kinds, "eval.localisation_traces=0")


METHOD_RULES: tuple[Callable[[RunConfig], Problems], ...] = (
    data_source,
    difficulty,
    gold_answers,
    reward,
    discriminator_loss,
    pairs,
    perturbations,
    replay,
    warmup,
    group_size,
    policy,
    sampling,
    pass_at_k,
    localisation,
)
