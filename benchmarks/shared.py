"""What several benchmarks share: random models of the Llama shape and traces, learners without Ray, spreads."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rairl_ray.actors.discriminator import DiscriminatorActor
from rairl_ray.actors.learner import LearnerActor, shard
from rairl_ray.actors.policy import PolicyActor
from rairl_ray.algorithms.discriminator_losses import Totals
from rairl_ray.config.load import from_dict
from rairl_ray.config.schema import RunConfig
from rairl_ray.keys import keyed_generator
from rairl_ray.types import DiscriminatorSample, PolicySample

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Size:
    """A model of Llama's shape; the head size is 64 and the embeddings are tied."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int

    def parameters(self, vocabulary: int) -> int:
        attention = 2 * self.hidden * 64 * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return vocabulary * self.hidden + self.layers * block + self.hidden


SIZES = {
    "0.5M": Size(128, 2, 2, 2, 352),
    "1.7M": Size(256, 2, 4, 4, 704),
    "7.3M": Size(384, 4, 6, 6, 1056),
    "28M": Size(576, 8, 9, 3, 1536),
    "106M": Size(576, 30, 9, 3, 1536),
}
"""By the parameters they have with 512 tokens; the last has the blocks of SmolLM2-135M."""


def make_model(folder: Path, size: Size, vocabulary: int) -> str:
    """The folder of a model with random weights in float32, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=size.hidden, intermediate_size=size.intermediate,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.kv_heads,
        head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@dataclass(frozen=True)
class Traces:
    """`prompts` random prompts with `group` completions each, all of one length."""

    prompts: int
    group: int
    prompt: int
    completion: int
    vocabulary: int

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return self.prompts * self.group * self.completion

    def prompt_ids(self, round_: int = 0) -> list[tuple[int, ...]]:
        random = keyed_generator("benchmark prompts", round_)
        return [tuple(random.integers(0, self.vocabulary, self.prompt).tolist()) for _ in range(self.prompts)]

    def labelled(self) -> list[DiscriminatorSample]:
        """Half of them positive, up to 8 units each, and what an implicit head's reference says."""
        random = keyed_generator("benchmark completions", 0)
        units = min(8, self.completion)
        ends = np.linspace(0, self.completion, units + 1).astype(np.int64)
        return [
            DiscriminatorSample(
                prompt_ids=prompt,
                completion_ids=tuple(random.integers(0, self.vocabulary, self.completion).tolist()),
                unit_tokens=ends[1:] - 1,
                unit_starts=ends[:-1],
                positive=sample % 2 == 0,
                pair_id=row,
                reference_logprobs=np.full(self.completion, -6.0, np.float32),
            )
            for row, prompt in enumerate(self.prompt_ids())
            for sample in range(self.group)
        ]

    def sampled(self) -> list[PolicySample]:
        """The same traces with advantages of either sign."""
        return [
            PolicySample(
                prompt_ids=one.prompt_ids,
                completion_ids=one.completion_ids,
                advantages=np.full(self.completion, 1.0 if one.positive else -1.0, np.float32),
                sampling_logprobs=one.reference_logprobs,
            )
            for one in self.labelled()
        ]


class BareActor:
    """One rank of a learner as its actor is, in this process and without Ray: updates and scores."""

    def __init__(
        self, role: str, path: str, words: Mapping[str, Any], *, rank: int = 0, world: int = 1, port: int = 0
    ) -> None:
        self.config = learner_config(path, words)
        kind: Any = PolicyActor if role == "policy" else DiscriminatorActor
        self.actor: LearnerActor = kind(rank, self.config, path, 0, "cpu")
        self.world = world
        reason = self.actor.open(("127.0.0.1", port or free_port()), world, 1_000_000)
        assert reason is None, reason

    def batches(self, samples: Sequence[Any]) -> list[list[Any]]:
        """This rank's micro-batches, as the workers' group splits them."""
        tokens = self.config.learner.tokens_per_micro_batch
        plan = shard(samples, self.world, tokens, packed=self.actor.packed)[self.actor.rank]
        return [[samples[i] for i in part] for part in plan]

    def update(self, samples: Sequence[Any]) -> Callable[[], Any]:
        """One optimizer update on the samples, to be called any number of times."""
        batches, actor = [self.batches(samples)], self.actor
        if isinstance(actor, PolicyActor):
            totals = [(sum(len(sample.completion_ids) for sample in samples), len(samples))]
            return lambda: actor.update(batches, totals)
        assert isinstance(actor, DiscriminatorActor)
        counted = label_totals(samples)
        return lambda: actor.update(batches, counted)

    def score(self, samples: Sequence[DiscriminatorSample]) -> Callable[[], Any]:
        batches, actor = [self.batches(samples)], self.actor
        assert isinstance(actor, DiscriminatorActor)
        return lambda: actor.score(batches)

    def close(self) -> None:
        self.actor.engine.destroy()


def label_totals(samples: Sequence[DiscriminatorSample]) -> Totals:
    positive = [sample for sample in samples if sample.positive]
    negative = [sample for sample in samples if not sample.positive]
    return Totals(
        positive_units=sum(len(sample.unit_tokens) for sample in positive),
        negative_units=sum(len(sample.unit_tokens) for sample in negative),
        positive_traces=len(positive),
        negative_traces=len(negative),
        pairs=0,
    )


def learner_config(path: str, words: Mapping[str, Any]) -> RunConfig:
    """A run's configuration with an implicit head, in float32; `words`: further sections."""
    model = {"path": path, "lora": {"rank": words.get("lora")}}
    return from_dict(
        {
            "algorithm": {"type": "airl"},
            "model": {"policy": model, "discriminator": model},
            "policy": {"kl_coefficient": 0.0, "learning_rate": 1e-5},
            "discriminator": {"head": "implicit", "loss": {"level": "trace"}, "learning_rate": 1e-5},
            "learner": {"zero_stage": words.get("zero_stage", 1)},
            "placement": {"device": "cpu"},
        }
    )


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def told(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
    """What the last line of another Python module says in JSON; its other output goes where ours goes."""
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, env={**own, **environment}, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{module} {' '.join(arguments)[:200]} ended with {done.returncode}\n{done.stdout[-3000:]}"
        )
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def finish(result: Mapping[str, Any], file: str) -> None:
    """Print the result, and write it where a file is named."""
    print(json.dumps(result))
    if file:
        Path(file).write_text(json.dumps(result, indent=1) + "\n")
