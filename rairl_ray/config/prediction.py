"""How long a run takes on GPUs, predicted from floating-point operations and bytes; nothing is measured.

A step's phases come one after the other (rollouts that run ahead overlap with the rest). What a learner does is
bound by operations, what an engine decodes by the bytes of weights and cache that each token reads:

    learner     2 N a token forward, twice that backward, twice again where checkpointing repeats the forward;
                with LoRA the backward pass has no gradients of the frozen weights
    engine      prefill 2 N a token; one decoding step reads all weights and every sequence's cache, or computes
                2 N a sequence, whichever takes longer

with N the parameters of a pass (Kaplan et al., 2020, section 2.1; attention over positions is left out, which
these lengths allow). The assumptions are numbers of `Assumptions`, and `plan` prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rairl_ray.config.estimate import BYTES, Shape, models_of, shape_of, work
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.config.transport import adapter_of


@dataclass(frozen=True)
class Assumptions:
    """A GPU of the H200 class, and which share of its peaks a phase reaches."""

    name: str = "H200-class"
    flops: float = 989e12
    """bfloat16 operations a second, dense."""
    bandwidth: float = 4.8e12
    """Bytes a second from memory."""
    learner_share: float = 0.40
    """Of `flops`, while a learner computes."""
    prefill_share: float = 0.40
    decode_share: float = 0.60
    """Of `bandwidth`, while an engine decodes."""
    link: float = 50e9
    """Bytes a second from a learner to an engine."""
    filled: float = 1.0
    """Share of `rollout.max_completion_tokens` that a completion has; 1: the upper limit."""

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.flops / 1e12:.0f} TFLOP/s and {self.bandwidth / 1e12:.1f} TB/s, of which "
            f"learners reach {self.learner_share:.0%}, prefill {self.prefill_share:.0%}, decoding "
            f"{self.decode_share:.0%}; weights travel at {self.link / 1e9:.0f} GB/s; "
            "prompts and completions at their limits"
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one step by phase, and hours in all. What a run evaluates counts in `hours` alone."""

    rollout: float
    score: float
    discriminator: float
    policy: float
    sync: float
    overlapped: bool
    """Rollouts of later steps are sampled while the learners train."""
    hours: float
    gpu_hours: float

    @property
    def step(self) -> float:
        learning = self.score + self.discriminator + self.policy + self.sync
        return max(self.rollout, learning) if self.overlapped else self.rollout + learning


def predict(config: RunConfig, gpus: float, policy: Model | None = None) -> Prediction | None:
    """None for a run without GPUs, or with a model whose shape is unknown.

    Args:
        gpus: what the placement holds, for the whole run.
        policy: the policy's model where a warm start gives it.
    """
    model, reader = models_of(config, policy)
    shape, scoring = shape_of(model), shape_of(reader)
    if gpus <= 0 or shape is None or (config.algorithm.needs.discriminator and scoring is None):
        return None
    assumed, todo = Assumptions(), work(config)
    steps, learner = config.trainer.steps, config.learner
    row = _Row(config, assumed)
    one_policy = _train_seconds(shape, model, row.tokens, assumed) / learner.replicas
    if config.policy.kl_coefficient > 0:
        one_policy += _forward_seconds(shape, row.tokens, assumed) / learner.replicas
    score = discriminator = warm_up = 0.0
    if config.algorithm.needs.discriminator and scoring is not None:
        ranks = learner.discriminator_ranks
        reference = config.discriminator.head_needs.reference
        score = _forward_seconds(scoring, row.tokens, assumed) / ranks
        update = _train_seconds(scoring, reader, row.labelled_tokens, assumed) / ranks
        update += _forward_seconds(scoring, row.labelled_tokens, assumed) / ranks if reference else 0.0
        updates = config.discriminator.updates_per_policy_step
        discriminator, warm_up = update * updates, update * (todo.discriminator_updates - steps * updates)
    sft, samples = not config.algorithm.needs.rollouts, todo.samples_per_step
    rollout = 0.0 if sft else _rollout_seconds(shape, model, config, samples, assumed)
    sync = 0.0 if sft else _synced_bytes(config, shape, model) / assumed.link
    found = Prediction(
        rollout=rollout, score=score, discriminator=discriminator, policy=one_policy, sync=sync,
        overlapped=config.trainer.max_staleness_steps > 0, hours=0.0, gpu_hours=0.0,
    )  # fmt: skip
    evaluations = int(config.eval.at_start) + int(config.eval.at_end)
    evaluations += (steps - 1) // config.eval.every if config.eval.every else 0
    evaluated = _rollout_seconds(
        shape, model, config, config.eval.prompts * config.eval.samples_per_prompt, assumed
    )
    hours = (steps * found.step + warm_up + evaluations * evaluated) / 3600
    return replace(found, hours=hours, gpu_hours=hours * gpus)


class _Row:
    """Tokens that learners read in a step."""

    def __init__(self, config: RunConfig, assumed: Assumptions) -> None:
        prompts = config.trainer.prompts_per_step
        sft = not config.algorithm.needs.rollouts
        completion = config.rollout.max_completion_tokens * assumed.filled
        prompt = config.data.max_prompt_tokens
        samples = 1 if sft else config.rollout.samples_per_prompt
        shared = config.learner.rows == "packed"
        self.tokens = prompts * (prompt * (1 if shared else samples) + samples * completion)
        read = samples + 1 + config.discriminator.perturbations.count  # an expert and its copies
        self.labelled_tokens = prompts * (prompt * (1 if shared else read) + read * completion)


def _forward_seconds(shape: Shape, tokens: float, assumed: Assumptions) -> float:
    return 2 * shape.parameters * tokens / (assumed.flops * assumed.learner_share)


def _train_seconds(shape: Shape, model: Model, tokens: float, assumed: Assumptions) -> float:
    passes = 2 if model.lora.rank else 3
    return _forward_seconds(shape, tokens, assumed) * (passes + int(model.gradient_checkpointing))


def _rollout_seconds(
    shape: Shape, model: Model, config: RunConfig, samples: int, assumed: Assumptions
) -> float:
    """Replicas share the samples; each decodes as many at once as it may."""
    rollout, size = config.rollout, BYTES[model.dtype]
    replicas, length = rollout.least_replicas, int(rollout.max_completion_tokens * assumed.filled)
    own = max(1, -(-samples // replicas))
    at_once = min(own, rollout.max_sequences)
    context = config.data.max_prompt_tokens + length // 2
    weights = shape.parameters * size
    read = (weights + shape.cache_bytes(context * at_once, size)) / (assumed.bandwidth * assumed.decode_share)
    computed = 2 * shape.parameters * at_once / (assumed.flops * assumed.prefill_share)
    decoding = length * max(read, computed) * -(-own // at_once)
    prefill = (
        2 * shape.parameters * own * config.data.max_prompt_tokens / (assumed.flops * assumed.prefill_share)
    )
    return (decoding + prefill) / rollout.tensor_parallel


def _synced_bytes(config: RunConfig, shape: Shape, model: Model) -> int:
    sent = {None: shape.parameters, "merged": shape.changed_parameters(model.lora)}
    parameters = sent.get(adapter_of(config), shape.lora_parameters(model.lora))
    return parameters * BYTES[model.dtype]
