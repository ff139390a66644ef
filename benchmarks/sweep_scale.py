"""What a sweep costs beside its trials: memory, starts, snapshots and restores against the number of trials.

Usage: python -m benchmarks.sweep_scale [--trials 25 50 100] [--finished 100 300 1000] [--nodes 8] [--seconds 5]
       [--json FILE]

Trials are stand-ins that only wait and then leave the folder of a finished run, the one place for a fake here:
everything else is the sweep itself (launch.py's own `sweep`, Ray Tune, run folders) on a simulated cluster of
`--nodes` nodes of 8 GPUs each (processes of one machine; the GPUs are numbers). Each trial takes a node, as the
experiments for 8 GPUs do. Prints one JSON object: per size the driver's memory, the seconds a slot stands empty
between two trials, the share of the bound that was used (all slots busy, or the longest trial), the time
of Tune's snapshots, and the time in which `--resume` restores and ends a sweep of so many finished trials; and
each growth as `value ~ trials ** exponent`.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.tune.execution.tune_controller import TuneController
from rich.console import Console

from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.display import Display
from rairl_ray.files import REWARD_FILE
from rairl_ray.keys import keyed_random
from rairl_ray.runfolder import RunFolder, write_summary
from rairl_ray.sweep import run, supervise
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import sweep_folder, trial_folder, trials

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "experiments/gsm8k/qwen2.5-3b_partial.yaml"
METRIC = "eval/pass_at_1"
STAND_IN = """
import os, shutil, sys, time
folder, template, seconds = sys.argv[1:]
with open(folder + ".begin", "w") as file: file.write(str(time.time()))
time.sleep(float(seconds))
shutil.copytree(template, folder)
with open(folder + ".end", "w") as file: file.write(str(time.time()))
"""


def stand_in(config: dict[str, Any]) -> None:
    """Tune's trainable here: what watches a trial is real, the trial's own process waits."""

    def command(spec: dict[str, Any], folder: RunFolder) -> list[str]:
        folder.root.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads((folder.root.parents[1] / "bench.json").read_text())
        length = settings["seconds"] * keyed_random("length", folder.root.name).lognormvariate(0.0, 0.5)
        return [sys.executable, "-S", "-c", STAND_IN, str(folder.root), settings["template"], str(length)]

    supervise._command = command
    supervise.run_trial(config["spec"])


def sweep_of(folder: Path, size: int) -> SweepFile:
    """A sweep of `size` trials, one a seed."""
    text = {
        "name": "scale", "base": str(BASE), "output_dir": str(folder), "metric": METRIC,
        "seeds": list(range(size)), "space": {"reward.density.type": ["sparse"]},
        "overrides": {"tracking.uri": "none"},
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(json.dumps(text))
    return load_sweep(str(folder / "sweep.yaml"))


def finished_folder(folder: Path, config: RunConfig) -> None:
    """What a finished run of this configuration leaves, as far as a sweep looks at it."""
    made = RunFolder(folder)
    made.create()
    made.write_config(dump_yaml(config))
    made.final_policy.mkdir(parents=True)
    made.final_reward_model.mkdir()
    (made.final_reward_model / REWARD_FILE).touch()
    write_summary(made.evaluation("final") / "summary.json", {METRIC: {"value": 0.5}})


@contextmanager
def snapshots() -> Iterator[list[float]]:
    """Seconds of each snapshot that Tune takes meanwhile."""
    taken: list[float] = []
    real = TuneController.save_to_dir

    def timed(self: TuneController, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return real(self, *arguments, **named)
        finally:
            taken.append(time.perf_counter() - begin)

    TuneController.save_to_dir = timed
    try:
        yield taken
    finally:
        TuneController.save_to_dir = real


def quiet(file: SweepFile) -> Display:
    return Display(file.name, 0, console=Console(file=io.StringIO()))


def measure(size: int, slots: int, seconds: float) -> dict[str, float]:
    """One sweep of stand-ins."""
    with tempfile.TemporaryDirectory() as place, snapshots() as taken:
        folder = Path(place)
        file = sweep_of(folder, size)
        sweep_folder(file).mkdir()
        finished_folder(folder / "template", load_config(BASE))
        settings = {"template": str(folder / "template"), "seconds": seconds}
        (sweep_folder(file) / "bench.json").write_text(json.dumps(settings))
        before, start = psutil.Process().memory_info().rss, time.time()
        run.sweep(file, display=quiet(file))
        spans = []
        for item in trials(file):
            name = str(trial_folder(file, item.id))
            spans.append([float(Path(f"{name}.{end}").read_text()) for end in ("begin", "end")])
        lengths = [end - begin for begin, end in spans]
        wall = max(end for _, end in spans) - min(begin for begin, _ in spans)
        # Work that all slots share evenly; a trial's own slot is empty from its end to its successor's begin.
        bound = max(sum(lengths) / slots, max(lengths))
        return {
            "trials": size,
            "driver_megabytes": (psutil.Process().memory_info().rss - before) / 1e6,
            "first_trial_after_seconds": min(begin for begin, _ in spans) - start,
            "empty_seconds_per_trial": (wall * slots - sum(lengths)) / size,
            "share_of_bound": bound / wall,
            "snapshots": len(taken),
            "snapshot_seconds": statistics.median(taken),
        }


def restore(size: int) -> dict[str, float]:
    """`--resume` of a sweep all of whose trials have finished: everything is read, nothing runs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        file = sweep_of(folder, size)
        sweep_folder(file).mkdir()
        (sweep_folder(file) / run.SAVED).write_text(file.model_dump_json())
        for item in trials(file):
            finished_folder(trial_folder(file, item.id), item.config)
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        assert run.sweep(file, resume=True, display=quiet(file)) == 0
        spent = time.perf_counter() - start
        grown = (psutil.Process().memory_info().rss - before) / 1e6
        return {"trials": size, "seconds": spent, "driver_megabytes": grown}


def exponent(rows: Sequence[dict[str, float]], name: str) -> float | None:
    """Slope of log(value) over log(trials); None where it says nothing."""
    points = [(math.log(row["trials"]), math.log(row[name])) for row in rows if row[name] > 0]
    if len(points) < 2:
        return None
    slope, _ = statistics.linear_regression(*zip(*points, strict=True))
    return round(slope, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--finished", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="median length of a trial")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    run.trainable = stand_in
    restored = [restore(size) for size in arguments.finished]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(arguments.nodes):
        cluster.add_node(num_cpus=64, num_gpus=8, object_store_memory=10**8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        swept = [measure(size, arguments.nodes, arguments.seconds) for size in arguments.trials]
    finally:
        ray.shutdown()
        cluster.shutdown()
    growth = {
        **{name: exponent(swept, name) for name in ("driver_megabytes", "snapshot_seconds")},
        **{f"restore_{name}": exponent(restored, name) for name in ("seconds", "driver_megabytes")},
    }
    text = json.dumps({"sweeps": swept, "restores": restored, "growth": growth}, indent=1)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
