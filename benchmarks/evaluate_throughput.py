"""`evaluate` against a bare vLLM loop: the same requests on the same machine, in turns, several rounds.

Usage: python -m benchmarks.evaluate_throughput [--model PATH] [--prompts N] [--samples N] [--rounds N]

Both sides run vLLM with equal arguments in a process of their own. Counted is the time from the first request
to the last answer, without loading the model. Ours includes chunks, decoding, JSON lines and Ray Data.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rairl_ray.actors.chunks import Line, map_file, rows_of, split
from rairl_ray.actors.sampling import STREAM, SampleLines
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.tasks import make_task, task_rules
from rairl_ray.engines.models import resolve_model
from rairl_ray.engines.vllm_engine import vllm_environment
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs.machines import engine_pool

ROOT = Path(__file__).resolve().parents[1]


class TimedSamples(SampleLines):
    """Notes when its first call began and when each ended."""

    def __init__(self, clock: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._clock = Path(clock)

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        started = time.time()
        made = super().__call__(lines)
        with self._clock.open("a") as file:
            file.write(f"{started} {time.time()}\n")
        return made


def settings(arguments: argparse.Namespace) -> RunConfig:
    overrides = [
        f"eval.samples_per_prompt={arguments.samples}",
        f"eval.prompts={arguments.prompts}",
        f"data.eval_limit={arguments.prompts}",
        "eval.k=[1]",
    ]
    if arguments.model:
        overrides += [f"model.policy.path={arguments.model}", "model.policy.build=null"]
    return load_config(ROOT / "experiments/demo/base.yaml", overrides)


def problems(config: RunConfig) -> list[dict[str, Any]]:
    items = make_task(config.data, 0).eval[: config.eval.prompts]
    return [{"prompt_id": item.prompt.id, "question": item.prompt.question} for item in items]


def ours(config: RunConfig, path: str, folder: Path) -> tuple[int, float]:
    """(tokens, seconds) of the pool that `evaluate` uses."""
    source, clock = folder / "source.jsonl", folder / "clock"
    source.write_text("".join(json.dumps(row) + "\n" for row in problems(config)))
    chunks = split(source, max(1, 4 * config.rollout.max_sequences // config.eval.samples_per_prompt))
    made = {
        "clock": str(clock),
        "config": config,
        "policy_path": path,
        "device": "cpu",
        "system_prompt": task_rules(config.data).system_prompt,
    }
    map_file(source, chunks, folder / "parts", TimedSamples, made, engine_pool(config))
    times = [[float(number) for number in line.split()] for line in clock.read_text().splitlines()]
    seconds = max(end for _, end in times) - min(start for start, _ in times)
    return sum(row["tokens"] for row in rows_of(folder / "parts", chunks)), seconds


def bare(arguments: argparse.Namespace, path: str) -> tuple[int, float]:
    """(tokens, seconds) of one `LLM.generate` over all requests, in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.evaluate_throughput", "--bare", path]
    command += ["--prompts", str(arguments.prompts), "--samples", str(arguments.samples)]
    command += ["--model", arguments.model] if arguments.model else []
    environment = {**os.environ, **vllm_environment(device="cpu", threads=os.cpu_count() or 1)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    answer = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    return answer["tokens"], answer["seconds"]


def bare_loop(config: RunConfig, path: str) -> None:
    """The bare side's own process: vLLM's API and nothing else."""
    import vllm

    from rairl_ray.actors.rollout import sampling_seed
    from rairl_ray.data.rendering import Renderer, load_tokenizer
    from rairl_ray.engines.rollout_engine import engine_options
    from rairl_ray.engines.vllm_engine import llm_arguments
    from rairl_ray.types import Prompt

    renderer = Renderer(load_tokenizer(path, config.model.policy), task_rules(config.data).system_prompt)
    options = engine_options(config, model_path=path, eos_id=renderer.eos_id, device="cpu")
    llm = vllm.LLM(**llm_arguments(options))
    prompts, params = [], []
    for row in problems(config):
        ids = list(renderer.prompt_ids(Prompt(id=row["prompt_id"], question=row["question"])))
        for sample in range(config.eval.samples_per_prompt):
            prompts.append({"prompt_token_ids": ids})
            params.append(
                vllm.SamplingParams(
                    temperature=config.eval.temperature,
                    top_p=config.eval.top_p,
                    max_tokens=config.rollout.max_completion_tokens,
                    ignore_eos=True,
                    stop_token_ids=[renderer.eos_id],
                    logprobs=0,
                    detokenize=False,
                    seed=sampling_seed(config.seed, STREAM, row["prompt_id"], sample),
                )
            )
    started = time.time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.time() - started
    print(json.dumps({"tokens": sum(len(o.outputs[0].token_ids) for o in outputs), "seconds": seconds}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="")
    parser.add_argument("--bare", default="")
    arguments = parser.parse_args()
    config = settings(arguments)
    if arguments.bare:
        bare_loop(config, arguments.bare)
        return
    rounds = []
    with tempfile.TemporaryDirectory() as temporary, cluster(config):
        cache = Path(temporary) / "models"
        path = resolve_model(config.model.policy, role="policy", cache_dir=cache, seed=0)
        for number in range(arguments.rounds):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            theirs, mine = bare(arguments, path), ours(config, path, folder)
            assert theirs[0] == mine[0], "the two sides sampled different tokens"
            rounds.append({"bare": theirs[0] / theirs[1], "evaluate": mine[0] / mine[1]})
            print({**rounds[-1], "ratio": rounds[-1]["evaluate"] / rounds[-1]["bare"]}, flush=True)
    ratios = [row["evaluate"] / row["bare"] for row in rounds]
    result = {
        "tokens_per_second": rounds,
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    print(json.dumps(result))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
