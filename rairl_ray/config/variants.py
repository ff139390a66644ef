"""What each variant asks of the rest of the system: one table a `type`, read by rules, actors and strategies.

Their mathematics and machines are tables of the same names in `algorithms/`, `engines/` and `actors/`.
`complete` holds every table to the schema's values, at import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel


@dataclass(frozen=True, kw_only=True)
class DensityNeeds:
    """What `reward.density.type` reads."""

    every: bool = False
    """`reward.density.every`, which means nothing to the others."""


@dataclass(frozen=True, kw_only=True)
class LossNeeds:
    """What `discriminator.loss.type` needs besides the units' logits."""

    policy_logprobs: bool = False
    """log pi of each unit under the learner's newest policy."""
    potential: bool = False
    """A second output of the head, where that has one: the potential of the state in front of each unit."""
    pairs: bool = False
    """All traces of a prompt in one micro-batch: it compares them with each other."""
    bound: bool = False
    """A penalty or clip: it has no minimum by itself."""


@dataclass(frozen=True, kw_only=True)
class HeadNeeds:
    """What `discriminator.head` needs, and what it can be asked."""

    reference: bool = False
    """A frozen copy of the model, which its logits compare with: they add up over a trace (`level: trace`)."""
    input_gradient: bool = False
    """It can be differentiated by its input embeddings (`gradient_penalty`)."""
    own_output: bool = False
    """An output layer of its own in the place of the language model's."""


@dataclass(frozen=True, kw_only=True)
class AdvantageNeeds:
    """What `advantage.type` needs."""

    others: bool = False
    """Other samples of the prompt, whatever `normalise` and `scale` say."""


@dataclass(frozen=True, kw_only=True)
class ErrorNeeds:
    """What a kind of error (`discriminator.perturbations.kinds`, `eval.localisation_kinds`) needs."""

    data: bool = False
    """More of the row than its expert: options to choose from, or wrong chains that the data ships."""


@dataclass(frozen=True, kw_only=True)
class EngineOffers:
    """What `rollout.engine` can do beyond sampling and scoring, and where it ends."""

    sleep: bool = False
    """It can give a GPU's memory back (`rollout.sleep`)."""
    tensor_parallel: bool = False
    """It can split a model over GPUs."""
    transports: bool = False
    """Full weights can reach it by NCCL and CUDA IPC."""
    own_cache: bool = False
    """It takes `rollout.memory_share` of a GPU, or `rollout.cpu_cache_gib`, when it starts."""
    lora_ranks: tuple[int, ...] | None = None
    """The values that it takes for the largest rank of the adapters that it serves; None: any."""
    cpu_head_sizes: tuple[int, ...] | None = None
    """Sizes of an attention head on a CPU; None: any."""
    float32_adapters: bool = True
    """An adapter on a GPU may be in float32."""


@dataclass(frozen=True, kw_only=True)
class AlgorithmNeeds:
    """What a run of `algorithm.type` consists of."""

    discriminator: bool = False
    """It learns its reward."""
    rollouts: bool = True
    """Each step samples the policy."""
    experts: bool = False
    """It learns from expert traces."""
    answers: bool = False
    """Its reward is the task's own grade."""
    reward: str = "discriminator"
    """`reward.type` where nothing names it."""


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The only values that vLLM takes for the largest rank that it serves."""

ALGORITHMS = {
    "airl": AlgorithmNeeds(discriminator=True, experts=True),
    "grpo": AlgorithmNeeds(answers=True, reward="correctness"),
    "sft": AlgorithmNeeds(rollouts=False, experts=True),
}
ENGINES = {
    "vllm": EngineOffers(
        sleep=True,
        tensor_parallel=True,
        transports=True,
        own_cache=True,
        lora_ranks=VLLM_RANKS,
        cpu_head_sizes=(32, 64, 80, 96, 112, 128, 192, 256),
        float32_adapters=False,
    ),
    "hf": EngineOffers(),
}
DENSITIES = {
    "sparse": DensityNeeds(),
    "partial": DensityNeeds(),
    "interval": DensityNeeds(every=True),
    "dense": DensityNeeds(),
}
"""In the order of tables and figures."""
LOSSES = {
    "bce": LossNeeds(),
    "wgan": LossNeeds(bound=True),
    "bradley_terry": LossNeeds(pairs=True),
    "airl": LossNeeds(policy_logprobs=True, potential=True),
}
HEADS = {
    "scalar": HeadNeeds(input_gradient=True, own_output=True),
    "implicit": HeadNeeds(reference=True),
}
ADVANTAGES = {
    "sequence": AdvantageNeeds(),
    "discounted": AdvantageNeeds(),
    "loo": AdvantageNeeds(others=True),
}
ERRORS = {
    "operator": ErrorNeeds(),
    "numbers": ErrorNeeds(),
    "propagated_error": ErrorNeeds(),
    "answer": ErrorNeeds(),
    "swap_answer": ErrorNeeds(),
    "choice": ErrorNeeds(data=True),
    "corrupted": ErrorNeeds(data=True),
}


def complete(name: str, table: Mapping[str, object], section: type[BaseModel], key: str) -> None:
    """Hold a table to the values that the schema allows.

    name: the table's, in full. key: the field of `section` whose values are the table's keys.
    Raises ImportError where only one of the two knows a value.
    """
    known = choices(section.model_fields[key].annotation)
    if missing := sorted(known - table.keys()):
        raise ImportError(f"{name} has no entry {missing[0]!r}, which {section.__name__}.{key} allows; add one")
    if unknown := sorted(table.keys() - known):
        raise ImportError(
            f"{name} has an entry {unknown[0]!r}, which {section.__name__}.{key} does not allow; add it to the "
            "Literal there"
        )


def choices(annotation: Any) -> set[str]:
    """The words of the Literals in a type."""
    inside = get_args(annotation)
    return {word for word in inside if isinstance(word, str)}.union(*map(choices, inside))
