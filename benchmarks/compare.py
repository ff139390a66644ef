"""Compare the ratios of benchmark results with those that the repository keeps, and show what fell.

Usage: python -m benchmarks.compare [FOLDER] [--keep] [--fall 0.1]

FOLDER (build/bench) holds the JSON files that `make bench` or `make bench-quick` wrote. Every ratio in them is
a line: file, name, the kept value, the new one, and the change; one that is worse by more than `--fall` begins
with FELL. `--keep` writes the ratios to benchmarks/kept.json instead. Seconds are not compared: they depend on
the machine, ratios of two sides that take turns in one run less so. The exit code is 0 either way, since two
cores are noisy: what fell is to be measured again, and then looked into.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared import ROOT

KEPT = ROOT / "benchmarks" / "kept.json"
LESS_IS_BETTER = ("sync_over_copy", "sync_over_unmerged", "last_over_first")


def ratios(value: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(dotted name, value) of every ratio in a result: `ratio_median`, or what is named A_over_B."""
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        name = f"{path}.{key}" if path else key
        if key == "ratio_median":
            yield path or "ratio", float(inner)
        elif "_over_" in name and isinstance(inner, int | float) and key not in ("min", "max", "least", "most"):
            yield name.removesuffix(".median"), float(inner)
        else:
            yield from ratios(inner, name)


def results(folder: Path) -> dict[str, float]:
    """`FILE:RATIO` -> value, of all JSON files of a folder."""
    return {
        f"{file.stem}:{name}": round(value, 4)
        for file in sorted(folder.glob("*.json"))
        for name, value in ratios(json.loads(file.read_text()))
    }


def compared(now: Mapping[str, float], kept: Mapping[str, float], fall: float) -> Iterator[str]:
    """One line a ratio."""
    for name, value in now.items():
        before = kept.get(name)
        if before is None:
            yield f"new   {name}: {value:.3g}"
            continue
        change = value / before - 1.0
        worse = change if any(word in name for word in LESS_IS_BETTER) else -change
        yield f"{'FELL ' if worse > fall else 'held '} {name}: {before:.3g} -> {value:.3g} ({change:+.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--fall", type=float, default=0.1)
    arguments = parser.parse_args()
    now = results(arguments.folder)
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    if arguments.keep:
        KEPT.write_text(json.dumps(dict(sorted({**kept, **now}.items())), indent=1) + "\n")
        return
    for line in compared(now, kept, arguments.fall):
        print(line)


if __name__ == "__main__":
    main()
