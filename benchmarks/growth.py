"""How rollouts, learners' updates and scoring grow with samples, lengths, group size, model size and ranks.

Usage: python -m benchmarks.growth [--largest 7.3M|28M|106M] [--axes samples completion group model ranks]
       [--rounds 3] [--threads 2] [--json FILE] [--markdown FILE]

One axis at a time goes up from the same middle: 32 samples (8 prompts of 64 tokens, 4 completions of 64 each)
of a 1.7M model with random weights, all of them trained. `group`: the 32 samples are of fewer prompts;
`ranks`: one and two processes of DeepSpeed, one thread each. Growth is the slope of log seconds over log size
through medians, in brackets the smallest and largest slope of single rounds; 1 is linear. Rollouts are
vLLM's. The largest model, 106M, has the blocks of SmolLM2-135M.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shared import ROOT, SIZES, BareActor, Traces, finish, free_port, make_model, told
from rairl_ray.engines.environment import compute_environment
from rairl_ray.engines.rollout_engine import EngineOptions, GenerationRequest, SamplingSettings
from rairl_ray.engines.vllm_engine import VllmEngine, vllm_environment

VOCABULARY = 512
MIDDLE = Traces(8, 4, 64, 64, VOCABULARY)
MODEL = "1.7M"
LEARNERS = ("policy", "discriminator")
PHASES = ("rollout", "policy", "discriminator", "score")


def points(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is measured: an axis, its size, the model and the traces."""
    models = list(SIZES)[: list(SIZES).index(arguments.largest) + 1]
    samples = MIDDLE.prompts * MIDDLE.group
    traces: dict[str, dict[float, tuple[str, Traces]]] = {
        "samples": {n: (MODEL, replace(MIDDLE, prompts=n // MIDDLE.group)) for n in (16, 32, 64, 128)},
        "completion": {n: (MODEL, replace(MIDDLE, completion=n)) for n in (32, 64, 128, 256)},
        "group": {n: (MODEL, replace(MIDDLE, group=n, prompts=samples // n)) for n in (2, 4, 8, 16)},
        "model": {SIZES[name].parameters(VOCABULARY): (name, MIDDLE) for name in models},
    }
    return [
        {"axis": axis, "size": size, "model": model, "traces": asdict(one)}
        for axis, sizes in traces.items()
        if axis in arguments.axes
        for size, (model, one) in sizes.items()
    ]


def timed(work: Callable[[int], Any], rounds: int) -> list[float]:
    """Seconds of each round, which `work` is told; one before them, number 0, is not counted."""
    found = []
    for number in range(rounds + 1):
        started = time.perf_counter()
        work(number)
        found.append(time.perf_counter() - started)
    return found[1:]


def rollouts(spec: Mapping[str, Any]) -> list[dict[str, list[float]]]:
    """vLLM's engine in this process, with other prompts each round."""
    found, engine, opened = [], None, None
    for point in spec["points"]:
        if opened != point["model"]:
            if engine is not None:
                engine.close()
            opened = point["model"]
            engine = open_engine(spec["folders"][opened])
        assert engine is not None
        found.append({"rollout": timed(partial(sample, engine, Traces(**point["traces"])), spec["rounds"])})
    return found


def open_engine(path: str) -> VllmEngine:
    """An engine that nothing stops before a completion's limit."""
    options = EngineOptions(
        model_path=path, eos_id=0, max_prompt_tokens=64, max_completion_tokens=256, max_sequences=128
    )
    engine = VllmEngine(options, lambda ids: "")
    params = engine._params
    engine._params = lambda **settings: params(**{**settings, "stop_token_ids": []})
    engine.mark_synced(0)
    return engine


def sample(engine: VllmEngine, traces: Traces, round_: int) -> None:
    requests = [
        GenerationRequest(prompt_ids=ids, seed=100 * row + number)
        for row, ids in enumerate(traces.prompt_ids(round_))
        for number in range(traces.group)
    ]
    made = engine.generate(requests, SamplingSettings(max_tokens=traces.completion))
    assert sum(len(one.token_ids) for one in made) == traces.tokens


def learner(spec: Mapping[str, Any]) -> list[dict[str, list[float]]]:
    """One rank of a learner: its updates, and the discriminator's scoring."""
    import torch

    torch.set_num_threads(spec["threads"])
    found: list[dict[str, list[float]]] = []
    actor, opened = None, None
    for point in spec["points"]:
        if opened != point["model"]:
            if actor is not None:
                actor.close()
            opened, role = point["model"], spec["role"]
            place = {"rank": spec["rank"], "world": spec["world"], "port": spec["port"]}
            actor = BareActor(role, spec["folders"][opened], {"lora": None}, **place)
        assert actor is not None
        traces = Traces(**point["traces"])
        if spec["role"] == "policy":
            found.append({"policy": timed(again(actor.update(traces.sampled())), spec["rounds"])})
        else:
            update, score = actor.update(traces.labelled()), actor.score(traces.labelled())
            both = {"discriminator": update, "score": score}
            found.append({phase: timed(again(work), spec["rounds"]) for phase, work in both.items()})
    return found


def again(work: Callable[[], Any]) -> Callable[[int], Any]:
    """The same in every round."""
    return lambda _round: work()


def measure(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Every point with the seconds of each phase."""
    # in the order of their models, so that each is opened once
    wanted = sorted(points(arguments), key=lambda point: list(SIZES).index(point["model"]))
    names = {MODEL, *(point["model"] for point in wanted)}
    folders = {name: make_model(folder / name, SIZES[name], VOCABULARY) for name in names}
    spec = {"points": wanted, "rounds": arguments.rounds, "folders": folders}
    rows = []
    if wanted:
        (folder / "rollout.json").write_text(json.dumps({**spec, "role": "rollout"}))
        environment = vllm_environment(device="cpu", threads=arguments.threads)
        parts = [told("benchmarks.growth", [f"--spec={folder / 'rollout.json'}"], environment)["found"]]
        parts += [ranks(spec, role, 1, arguments.threads, folder) for role in LEARNERS]
        rows = [{**point, "seconds": joined(found)} for point, *found in zip(wanted, *parts, strict=True)]
    if "ranks" in arguments.axes:
        middle = {"axis": "ranks", "size": 1, "model": MODEL, "traces": asdict(MIDDLE)}
        for world in (1, 2):
            found = [ranks({**spec, "points": [middle]}, role, world, 1, folder)[0] for role in LEARNERS]
            rows.append({**middle, "size": world, "seconds": joined(found)})
    return rows


def joined(parts: Sequence[Mapping[str, list[float]]]) -> dict[str, list[float]]:
    return {phase: seconds for part in parts for phase, seconds in part.items()}


def ranks(spec: Mapping[str, Any], role: str, world: int, threads: int, folder: Path) -> Any:
    """Start the ranks of a learner; what rank 0 measured."""
    port, environment = free_port(), compute_environment("cpu", threads)
    files = []
    for rank in range(world):
        files.append(folder / f"{role}{rank}.json")
        place = {"role": role, "rank": rank, "world": world, "port": port, "threads": threads}
        files[-1].write_text(json.dumps({**spec, **place}))
    command = [sys.executable, "-m", "benchmarks.growth"]
    others = [
        subprocess.Popen(
            [*command, f"--spec={file}"], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.DEVNULL
        )
        for file in files[1:]
    ]
    try:
        return told("benchmarks.growth", [f"--spec={files[0]}"], environment)["found"]
    finally:
        for other in others:
            other.kill()
            other.wait()


def slope(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Of log seconds over log size, by least squares."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def exponents(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Axis -> phase -> sizes, median seconds, and the growth through them and through each round."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        ours = sorted((row for row in rows if row["axis"] == axis), key=lambda row: row["size"])
        sizes = [row["size"] for row in ours]
        for phase in (phase for phase in PHASES if phase in ours[0]["seconds"]):
            rounds = [row["seconds"][phase] for row in ours]
            medians = [statistics.median(values) for values in rounds]
            each = [slope(sizes, values) for values in zip(*rounds, strict=True)]
            found.setdefault(axis, {})[phase] = {
                "sizes": sizes, "seconds": medians, "exponent": slope(sizes, medians),
                "exponent_min": min(each), "exponent_max": max(each),
            }  # fmt: skip
    return found


def table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The same for people, in Markdown."""
    lines = [
        "| with | sizes | phase | median seconds | growth (smallest to largest) |",
        "|---|---|---|---|---|",
    ]
    for axis, phases in found.items():
        for phase, fit in phases.items():
            sizes = ", ".join(f"{size:,}" for size in fit["sizes"])
            seconds = ", ".join(f"{value:.3g}" for value in fit["seconds"])
            growth = f"{fit['exponent']:.2f} ({fit['exponent_min']:.2f} to {fit['exponent_max']:.2f})"
            lines.append(f"| {axis} | {sizes} | {phase} | {seconds} | {growth} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    axes = ("samples", "completion", "group", "model", "ranks")
    parser.add_argument("--largest", choices=list(SIZES), default="28M")
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", default="")
    parser.add_argument("--markdown", default="")
    parser.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.spec:
        spec = json.loads(arguments.spec.read_text())
        print(json.dumps({"found": rollouts(spec) if spec["role"] == "rollout" else learner(spec)}))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments, Path(folder))
    found = exponents(rows)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "markdown", "spec")}
    if arguments.markdown:
        Path(arguments.markdown).write_text(table(found))
    print(table(found))
    finish({"settings": settings, "growth": found, "rows": rows}, arguments.json)


if __name__ == "__main__":
    main()
