"""A GRPO step and an R-AIRL step of ours against TRL's GRPO step: same model, prompts, samples and machine.

Usage: python -m benchmarks.against_trl [--data FOLDER] [--steps 3] [--rounds 1] [--model PATH] [--json FILE]
       [--sides trl grpo airl] [KEY=VALUE ...]

SmolLM2-135M-Instruct, float32, LoRA of rank 16, four GSM8K prompts, four samples of 64 tokens, one optimizer
step. TRL runs in an environment of its own (.venv-trl, made at the first call) that sees our torch and
transformers, so both compute with the same kernels; on a CPU it samples with transformers. Each side runs in
processes of its own, one after the other in every round; its first step is not counted. Printed as JSON:
seconds of each step, ratios of the medians with their extremes, peak resident memory by role. KEY=VALUE are
overrides of our runs.
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

import psutil

from rairl_ray.actors.process_monitor import MARK
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.tasks import make_task
from rairl_ray.engines.sources import resolve_model
from rairl_ray.files import read_json_lines
from rairl_ray.metrics import TIME_STEP

ROOT = Path(__file__).resolve().parents[1]
TRL = "trl==1.16.0"
PROMPTS, SAMPLES, TOKENS, RANK = 4, 4, 64, 16
OURS = [
    "model.policy.dtype=float32",
    f"model.policy.lora.rank={RANK}",
    f"rollout.samples_per_prompt={SAMPLES}",
    f"rollout.max_completion_tokens={TOKENS}",
    f"trainer.prompts_per_step={PROMPTS}",
    "trainer.checkpoint_every=0",
    "trainer.log_rollouts_every=0",
    "policy.kl_coefficient=0",
    "learner.replicas=1",
    "eval.at_end=false",
    "tracking.uri=none",
]
SIDES = {
    "trl": None,
    "grpo": ["algorithm.type=grpo", "reward.type=correctness"],
    "airl": [
        "model.discriminator.dtype=float32",
        "model.discriminator.lora.rank=16",
        "discriminator.warmup_steps=0",
    ],
}


def environment() -> Path:
    """The Python of TRL's environment, made where it is missing."""
    folder = ROOT / ".venv-trl"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        site = next((folder / "lib").glob("python*")) / "site-packages"
        (site / "ours.pth").write_text(f"{Path(psutil.__file__).resolve().parents[1]}\n")
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", TRL], check=True)
    return python


def watched(command: Sequence[str], log: Path, env: dict[str, str]) -> dict[str, float]:
    """Run a command to its end; peak resident megabytes by role (`trl`, or what a run's actors are called)."""
    peaks: dict[str, float] = {}
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=env)
        while process.poll() is None:
            for role, megabytes in _tree(process.pid):
                peaks[role] = max(peaks.get(role, 0.0), megabytes)
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed; its end:\n{log.read_text()[-3000:]}")
    return peaks


def _tree(pid: int) -> list[tuple[str, float]]:
    """(role, resident megabytes) of a process and of all below it."""
    found = []
    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    for one in tree:
        try:
            mark = one.environ().get(MARK)
            role = mark.split("/")[1] if mark else ("driver" if one.pid == pid else "other")
            found.append((role, one.memory_info().rss / 1e6))
        except psutil.Error:
            continue
    return found


def trl_steps(model: str, config: RunConfig, steps: int, folder: Path) -> dict[str, Any]:
    task = make_task(config.data)
    rows = task.train[: PROMPTS * (steps + 2)]
    system = task.system_prompt
    wanted = {
        "model": model, "output": str(folder / "trl"), "steps": steps, "prompts_per_step": PROMPTS,
        "samples_per_prompt": SAMPLES, "completion_tokens": TOKENS, "lora_rank": RANK,
        "prompts": [f"{system}\n\n{row.prompt.question}" if system else row.prompt.question for row in rows],
        "answers": [str(row.prompt.answer) for row in rows],
    }  # fmt: skip
    (folder / "wanted.json").write_text(json.dumps(wanted))
    log = folder / "trl.log"
    command = [str(environment()), str(ROOT / "benchmarks" / "trl_step.py"), str(folder / "wanted.json")]
    peaks = watched(command, log, {**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"})
    told = json.loads([line for line in log.read_text().splitlines() if line.startswith('{"seconds"')][-1])
    return {**told, "peak_megabytes": {"trl": max(peaks.values())}}


def our_steps(side: str, overrides: Sequence[str], steps: int, folder: Path) -> dict[str, Any]:
    words = [
        *OURS,
        *(SIDES[side] or ()),
        *overrides,
        f"trainer.steps={steps}",
        f"output_dir={folder}",
        f"name={side}",
    ]
    command = [sys.executable, "launch.py", "train", "experiments/smollm2_gsm8k.yaml", *words]
    peaks = watched(
        command, folder / f"{side}.log", {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    )
    rows = [row for row in read_json_lines(folder / side / "metrics.jsonl") if row["step"] >= 1]
    phases = {key: [row[key] for row in rows] for key in rows[-1] if key.startswith("time/")}
    lengths = [row["rollout/completion_tokens"] for row in rows]
    return {
        "seconds": phases[TIME_STEP],
        "phases": phases,
        "completion_tokens": lengths,
        "peak_megabytes": peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", help="a folder with train.jsonl and test.jsonl; the hub's GSM8K without it")
    parser.add_argument("--model", help="a folder; SmolLM2-135M-Instruct without it")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    overrides = [*([f"data.path={arguments.data}"] if arguments.data else []), *arguments.overrides]
    if arguments.model:
        overrides.append(f"model.policy.path={arguments.model}")
    config = load_config(ROOT / "experiments/smollm2_gsm8k.yaml", [*OURS, *overrides])
    model = resolve_model(config.model.policy, role="policy", cache_dir=ROOT / "runs" / ".cache", seed=0)
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides}
    for _ in range(arguments.rounds):
        for side in arguments.sides:
            with tempfile.TemporaryDirectory(prefix="bench-") as name:
                made = (
                    trl_steps(model, config, arguments.steps + 1, Path(name))
                    if side == "trl"
                    else our_steps(side, overrides, arguments.steps + 1, Path(name))
                )
            found[side].append(made)
            print(side, json.dumps(made), file=sys.stderr, flush=True)
    counted = {side: [s for made in runs for s in made["seconds"][1:]] for side, runs in found.items()}
    result: dict[str, Any] = {"runs": found, "seconds": counted}
    if "trl" in counted:
        result["trl_over_ours"] = {
            side: {
                "median": statistics.median(counted["trl"]) / statistics.median(values),
                "least": min(counted["trl"]) / max(values),
                "most": max(counted["trl"]) / min(values),
            }
            for side, values in counted.items()
            if side != "trl"
        }
    text = json.dumps(result, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
