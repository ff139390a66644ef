"""Memory of `score`'s path against the number of rows: driver and actor, 10 thousand to 1 million.

Usage: python -m benchmarks.lines_memory [--rows 10000 100000 1000000] [--json FILE]

The reward is left out (an actor that only adds a number stands in for it), since its memory is one batch's
whatever the file. All else is `score`'s: the check of every line, chunks, Ray Data, parts, the joined output.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from rairl_ray.actors.chunks import Line, Pool, map_file, rows_of, split
from rairl_ray.config.schema import RunConfig
from rairl_ray.files import write_json_lines
from rairl_ray.rewards.lines import check_line
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs.score import LINES_PER_CHUNK

ROOT = Path(__file__).resolve().parents[1]


class Constant:
    """Adds a score, and the memory of its process."""

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        used = psutil.Process().memory_info().rss
        return [{**line.values, "reward_model_score": 0.0, "rss": used} for line in lines]


def one(rows: int) -> None:
    """One size, in a process of its own: its peak is this size's."""
    with tempfile.TemporaryDirectory() as temporary:
        source, parts, output = (Path(temporary) / name for name in ("in.jsonl", "parts", "out.jsonl"))
        text = "<think>\n" + "3+5=8\n" * 50 + "</think>\n<answer>\n8\n</answer>"
        with source.open("w") as file:
            for number in range(rows):
                file.write(json.dumps({"id": number, "prompt": "3+5=?", "completion": text}) + "\n")
        with cluster(RunConfig()):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            chunks = split(source, LINES_PER_CHUNK, lambda line: check_line(line.values))
            map_file(source, chunks, parts, Constant, {}, Pool(actors=1, cpus=0.5))
            actor = 0

            def kept() -> Any:
                nonlocal actor
                for row in rows_of(parts, chunks):
                    actor = max(actor, row.pop("rss"))
                    yield row

            assert write_json_lines(output, kept()) == rows
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"rows": rows, "driver_mb": peak // 1024, "driver_growth_mb": (peak - before) // 1024,
                          "actor_mb": actor // 2**20}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--one", type=int, default=0)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    if arguments.one:
        one(arguments.one)
        return
    results = []
    for rows in arguments.rows:
        command = [sys.executable, "-m", "benchmarks.lines_memory", "--one", str(rows)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        results.append(json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{"))))
        print(results[-1], flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
