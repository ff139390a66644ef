"""Where the steps of a finished run went: median seconds and share of every phase in its metrics.jsonl.

Usage: python -m benchmarks.step_shares RUN_FOLDER [RUN_FOLDER ...] [--skip 1] [--json FILE]

The first `--skip` steps warm up and are not counted. Shares are of a step, in the median over steps, and of all
steps together. `time/other` is what no phase claimed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rairl_ray.errors import UserError
from rairl_ray.files import read_json_lines
from rairl_ray.metrics import TIME_STEP


def shares(folder: Path, skip: int) -> dict[str, Any]:
    """Phase -> median, smallest and largest seconds a step, and its share; the longest phase first."""
    file = folder / "metrics.jsonl"
    if not file.is_file():
        raise UserError(f"{folder}: has no metrics.jsonl; name the folder of a run")
    steps = {row["step"]: row for row in read_json_lines(file) if TIME_STEP in row}  # a resumed step's last row
    rows = list(steps.values())[skip:]
    if not rows:
        raise UserError(f"{file}: has {len(steps)} timed steps, and --skip={skip} leaves none")
    whole = sum(row[TIME_STEP] for row in rows)
    names = {name for row in rows for name in row if name.startswith("time/")}
    seconds = {name: [row.get(name, 0.0) for row in rows] for name in names}
    found = {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "share": statistics.median(v / row[TIME_STEP] for v, row in zip(values, rows, strict=True)),
            "share_of_all": sum(values) / whole,
        }
        for name, values in sorted(seconds.items(), key=lambda item: -sum(item[1]))
    }
    return {"run": str(folder), "steps": len(rows), "phases": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--skip", type=int, default=1)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    try:
        result = [shares(run, arguments.skip) for run in arguments.runs]
    except UserError as error:
        sys.exit(str(error))
    for run in result:
        print(f"{run['run']}, {run['steps']} steps")
        for name, row in run["phases"].items():
            seconds = f"{row['median']:9.3f} s ({row['min']:.3f} to {row['max']:.3f})"
            print(f"  {name:20} {seconds} {row['share']:7.1%} of a step, {row['share_of_all']:.1%} of all")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
