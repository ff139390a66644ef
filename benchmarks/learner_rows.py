"""A learner's forward and backward pass over padded rows (a prompt for each sample) and packed ones, in turn.

Usage: python -m benchmarks.learner_rows [--head policy|implicit|scalar] [--prompt 250] [--completion 62]
       [--group 4] [--groups 2] [--spread 0] [--rounds 7] [--threads 2] [--json FILE]

The model has the shape of SmolLM2-135M with random weights and a LoRA adapter of rank 16. `--spread 0.5` draws
completion lengths between half of `--completion` and all of it, so that padded rows have padding.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, LlamaConfig

from rairl_ray.data.batching import DiscriminatorTensors, discriminator_tensors
from rairl_ray.engines.heads import ImplicitModel, LogprobModel, ScalarModel
from rairl_ray.keys import keyed_generator
from rairl_ray.types import DiscriminatorSample

VOCABULARY = 49152


def module_of(head: str) -> Any:
    """A head over SmolLM2-135M's shape with LoRA 16 on all linear layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
        tie_word_embeddings=True, attn_implementation="sdpa",
    )  # fmt: skip
    scalar = head == "scalar"
    kind = AutoModelForTokenClassification if scalar else AutoModelForCausalLM
    if scalar:
        config.classifier_dropout = 0.0
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=names)
    model = get_peft_model(kind.from_config(config).train(), adapter)
    if scalar:
        return ScalarModel(model)
    return ImplicitModel(model, 0.5) if head == "implicit" else LogprobModel(model)


def samples_of(arguments: argparse.Namespace) -> list[DiscriminatorSample]:
    """`groups` prompts with `group` completions each."""
    random = keyed_generator("learner rows")
    samples = []
    for group in range(arguments.groups):
        prompt = tuple(random.integers(0, VOCABULARY, arguments.prompt).tolist())
        for _ in range(arguments.group):
            shortest = round(arguments.completion * (1 - arguments.spread))
            size = int(random.integers(shortest, arguments.completion + 1))
            completion = tuple(random.integers(0, VOCABULARY, size).tolist())
            ends = np.arange(size)
            samples.append(
                DiscriminatorSample(
                    prompt_ids=prompt,
                    completion_ids=completion,
                    unit_tokens=ends,
                    unit_starts=ends,
                    positive=False,
                    pair_id=group,
                )
            )
    return samples


def answer(module: Any, batch: DiscriminatorTensors) -> torch.Tensor:
    """[B, T] what the head says of every completion token, padding at 0."""
    if isinstance(module, ScalarModel):
        units = (batch.input_ids, batch.attention_mask, batch.unit_positions)
        return module(*units, packing=batch.packing)[0] * batch.unit_mask
    targets = (batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids)
    return module(*targets, packing=batch.packing) * batch.completion_mask


def once(module: Any, samples: list[DiscriminatorSample], packed: bool) -> tuple[float, torch.Tensor]:
    """Seconds of one forward and backward pass, making its tensors included; and what the head said."""
    module.zero_grad()
    started = time.perf_counter()
    values = answer(module, discriminator_tensors(samples, 0, packed=packed))
    values.mean().backward()
    return time.perf_counter() - started, values.detach()


def tokens_of(samples: list[DiscriminatorSample]) -> dict[str, int]:
    """Tokens that a layer sees under either kind of rows, padding included."""
    batch = discriminator_tensors(samples, 0, packed=True)
    assert batch.packing is not None
    return {"padded": batch.input_ids.numel(), "packed": len(batch.packing.source)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--head", choices=("policy", "implicit", "scalar"), default="policy")
    parser.add_argument("--prompt", type=int, default=250)
    parser.add_argument("--completion", type=int, default=62)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--spread", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    module, samples = module_of(arguments.head), samples_of(arguments)
    said = [once(module, samples, packed)[1] for packed in (False, True)]  # the first of each is not counted
    seconds: list[dict[str, float]] = []
    for _ in range(arguments.rounds):
        seconds.append({name: once(module, samples, name == "packed")[0] for name in ("padded", "packed")})
        print({**seconds[-1], "ratio": seconds[-1]["padded"] / seconds[-1]["packed"]}, flush=True)
    ratios = [row["padded"] / row["packed"] for row in seconds]
    result = {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "tokens": tokens_of(samples),
        "seconds": seconds,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ratio_of_fastest": min(row["padded"] for row in seconds) / min(row["packed"] for row in seconds),
        "largest_difference": float((said[0] - said[1]).abs().max()),
    }
    print(json.dumps(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
