"""Our rollout engine against a bare vLLM loop for the same requests: tokens a second, side by side.

Usage: python -m benchmarks.rollout_throughput [--models demo smollm2] [--prompts 8] [--samples 8] [--prompt 64]
       [--tokens 64] [--rounds 5] [--threads 2] [--actor] [--json FILE]

`ours` is the engine that the rollout actor opens (`open_engine`), asked in this process; `bare` is a `vllm.LLM`
with the same settings of model and machine, but without what only weight syncs need, and the same prompts,
SamplingParams and seeds; `unasked` is `bare` without log-probabilities; `actor` is the rollout actor itself
behind Ray (a process and an engine more). `same_tokens` is the share of completions that ours and bare have
alike. Prompts are random tokens, other ones in each round. `demo` is the demo's shape with random weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from benchmarks.shared import ROOT, Traces, finish, spread
from rairl_ray.actors.rollout_actor import RolloutActor, open_engine, rollout_environment
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.engines.models import resolve_model
from rairl_ray.engines.rollout_engine import GenerationRequest, SamplingSettings
from rairl_ray.engines.vllm_engine import llm_arguments, vllm_environment

MODELS = {
    "demo": ("experiments/demo/airl.yaml", ["warm_start=null", "model.policy.build.max_length=8192"]),
    "smollm2": ("experiments/smollm2_gsm8k.yaml", []),
}
ONLY_OURS = ("worker_extension_cls", "weight_transfer_config", "logprobs_mode")
"""Arguments of `vllm.LLM` that a bare loop has no use for."""


def config_of(name: str, arguments: argparse.Namespace) -> RunConfig:
    file, words = MODELS[name]
    return load_config(
        ROOT / file,
        [
            *words,
            f"data.max_prompt_tokens={arguments.prompt}",
            f"rollout.max_completion_tokens={arguments.tokens}",
            f"rollout.max_sequences={arguments.prompts * arguments.samples}",
            f"placement.threads_per_actor={arguments.threads}",
        ],
    )


class Comparison:
    """Both engines over one model, and the actor where it is asked for."""

    def __init__(self, name: str, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, config = arguments, config_of(name, arguments)
        path = resolve_model(config.model.policy, role="policy", cache_dir=folder, seed=0)
        # Before vLLM is here, as for a run.
        self.actor = actor_of(config, path) if arguments.actor else None
        import vllm

        self.engine: Any = open_engine(config, path, "cpu")
        self.engine.mark_synced(0)
        self.options = cast(Any, self.engine)._options
        settings = {key: value for key, value in llm_arguments(self.options).items() if key not in ONLY_OURS}
        self.llm: Any = vllm.LLM(**settings)
        self.params = vllm.SamplingParams
        self.sampling = SamplingSettings(max_tokens=arguments.tokens)
        vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.traces = Traces(
            arguments.prompts, arguments.samples, arguments.prompt, arguments.tokens, vocabulary
        )

    def requests(self, round_: int) -> list[GenerationRequest]:
        return [
            GenerationRequest(prompt_ids=ids, seed=1000 * row + sample)
            for row, ids in enumerate(self.traces.prompt_ids(round_))
            for sample in range(self.traces.group)
        ]

    def ours(self, requests: list[GenerationRequest]) -> list[Any]:
        made = self.engine.generate(requests, self.sampling)
        return [one.token_ids for one in made]

    def bare(self, requests: list[GenerationRequest], **wanted: Any) -> list[Any]:
        stops = sorted({self.options.eos_id, *self.options.stop_ids})
        params = [
            self.params(
                seed=request.seed, temperature=1.0, top_p=1.0, max_tokens=self.sampling.max_tokens,
                ignore_eos=True, stop_token_ids=stops, detokenize=False,
                **(wanted or {"logprobs": 0, "flat_logprobs": True}),
            )
            for request in requests
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": list(request.prompt_ids)} for request in requests]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def through_actor(self, requests: list[GenerationRequest]) -> list[Any]:
        import ray

        assert self.actor is not None
        made, _, _ = ray.get(self.actor.generate.remote(requests, self.sampling))
        return [one.token_ids for one in made]

    def parts(self, requests: list[GenerationRequest]) -> dict[str, float]:
        """Seconds of one more call of ours: vLLM's, the texts', and all the rest (parameters, Generations)."""
        inner, decode, found = self.engine._run, self.engine._decode, {"vllm": 0.0, "texts": 0.0}

        def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                started = time.perf_counter()
                answer = work(*args)
                found[name] += time.perf_counter() - started
                return answer

            return run

        self.engine._run, self.engine._decode = watched("vllm", inner), watched("texts", decode)
        started = time.perf_counter()
        self.ours(requests)
        whole = time.perf_counter() - started
        self.engine._run, self.engine._decode = inner, decode
        return {**found, "rest": whole - sum(found.values()), "whole": whole}

    def measure(self) -> dict[str, Any]:
        sides: dict[str, Callable[[list[GenerationRequest]], list[Any]]] = {
            "ours": self.ours,
            "bare": self.bare,
            "unasked": lambda requests: self.bare(requests, logprobs=None),
        }
        if self.actor is not None:
            sides["actor"] = self.through_actor
        rates: list[dict[str, float]] = []
        same = total = 0
        for number in range(self.arguments.rounds + 1):
            requests, rate, made = self.requests(number), {}, {}
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                started = time.perf_counter()
                made[name] = sides[name](requests)
                rate[name] = sum(map(len, made[name])) / (time.perf_counter() - started)
            same += sum(one == other for one, other in zip(made["ours"], made["bare"], strict=True))
            total += len(requests)
            if number:  # the first of each is not counted
                rates.append(rate)
                print({**rate, "ratio": rate["ours"] / rate["bare"]}, file=sys.stderr, flush=True)
        return {
            "tokens_per_second": {name: spread([row[name] for row in rates]) for name in sides},
            **{f"{name}_over_bare": spread([row[name] / row["bare"] for row in rates]) for name in sides
               if name != "bare"},
            "same_tokens": same / total,
            "tokens_a_round": sum(map(len, made["ours"])),
            "parts_of_ours": self.parts(self.requests(-1)),
        }  # fmt: skip

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()
        self.llm = None
        self.engine.close()


def actor_of(config: RunConfig, path: str) -> Any:
    """The rollout actor as a run starts it, on a Ray of its own."""
    import ray

    if not ray.is_initialized():
        ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    environment = {"env_vars": rollout_environment(config, "cpu")}
    kind: Any = ray.remote(RolloutActor)
    actor = kind.options(num_cpus=0, runtime_env=environment).remote(0, config, path, "cpu")
    ray.get(actor.open.remote())
    ray.get(actor.serve_disk_weights.remote())
    return actor


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--actor", action="store_true")
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0":  # vLLM reads its settings at import
        environment = {**os.environ, **vllm_environment(device="cpu", threads=arguments.threads)}
        command = [sys.executable, "-m", "benchmarks.rollout_throughput", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    models = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            found = Comparison(name, arguments, Path(folder))
            models[name] = found.measure()
            found.close()
    settings = {key: value for key, value in vars(arguments).items() if key != "json"}
    finish({"settings": settings, "models": models}, arguments.json)


if __name__ == "__main__":
    main()
