"""`score` against a bare vLLM loop that reads the same traces: an implicit reward needs both of its models to.

Usage: python -m benchmarks.score_throughput REWARD_FOLDER FILE.jsonl [--rounds N] [--json FILE]

Ours reads with torch and gives the rewards of units; vLLM is asked for the log-probability of every token
under the trained model, then under its reference (`prompt_logprobs`). Counted is the time from the first trace
to the last answer, without loading a model, on both sides in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rairl_ray.config.schema import Eval, Model
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.artifacts import REFERENCE_FOLDER, REWARD_FILE
from rairl_ray.engines.vllm_engine import vllm_environment
from rairl_ray.rewards.lines import ScoreLines, trace_of_line

ROOT = Path(__file__).resolve().parents[1]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def tokens_of(folder: Path, file: Path) -> list[list[int]]:
    """Prompt and completion ids of every row, as the reward reads them."""
    settings = json.loads((folder / REWARD_FILE).read_text())
    renderer = Renderer(load_tokenizer(str(folder), Model()), settings["system_prompt"] or "")
    read = [renderer.tokenize(trace_of_line(row, 0), same_tokenizer=False) for row in rows_of(file)]
    return [[*tokens.prompt_ids, *tokens.completion_ids] for tokens in read]


def ours(folder: Path, file: Path) -> None:
    """One side's own process: what an actor of `score` does with each of its chunks."""
    from rairl_ray.actors.chunks import Line
    from rairl_ray.verbs.score import LINES_PER_CHUNK

    lines = [Line(number, row) for number, row in enumerate(rows_of(file), start=1)]
    scorer = ScoreLines(folder, Eval())
    scorer(lines[:8])
    started = time.time()
    for first in range(0, len(lines), LINES_PER_CHUNK):
        scorer(lines[first : first + LINES_PER_CHUNK])
    print(json.dumps({"seconds": time.time() - started}))


def bare(folder: Path, file: Path) -> None:
    """The other side's own process: vLLM's API and nothing else, one model after the other."""
    import vllm

    prompts = [{"prompt_token_ids": ids} for ids in tokens_of(folder, file)]
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts) + 1
    seconds = 0.0
    for model in (folder, folder / REFERENCE_FOLDER):
        llm = vllm.LLM(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=longest,
            enforce_eager=True,
            kv_cache_memory_bytes=2**30,
            max_num_seqs=256,
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            max_num_batched_tokens=8192,
            seed=0,
        )
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False)
        llm.generate(prompts[:8], params, use_tqdm=False)
        started = time.time()
        llm.generate(prompts, params, use_tqdm=False)
        seconds += time.time() - started
        llm.llm_engine.engine_core.shutdown()
    print(json.dumps({"seconds": seconds}))


def side(name: str, folder: str, file: str) -> float:
    command = [sys.executable, "-m", "benchmarks.score_throughput", folder, file, "--side", name]
    environment = {**os.environ, **vllm_environment(device="cpu", threads=os.cpu_count() or 1)}
    if name == "ours":
        threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **threads}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return float(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="")
    parser.add_argument("--side", default="")
    arguments = parser.parse_args()
    folder, file = Path(arguments.folder).resolve(), Path(arguments.file).resolve()
    if arguments.side:
        (ours if arguments.side == "ours" else bare)(folder, file)
        return
    tokens = sum(map(len, tokens_of(folder, file)))
    rounds = []
    for _ in range(arguments.rounds):
        seconds = {name: side(name, str(folder), str(file)) for name in ("bare", "ours")}
        rounds.append({name: tokens / spent for name, spent in seconds.items()})
        print({**rounds[-1], "ratio": rounds[-1]["ours"] / rounds[-1]["bare"]}, flush=True)
    ratios = [row["ours"] / row["bare"] for row in rounds]
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
