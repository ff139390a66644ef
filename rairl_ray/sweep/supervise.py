"""One trial under Ray Tune: a run in a process of its own, watched through its run folder.

The run joins the sweep's cluster and reserves its own placement group; Tune decides when it starts and whether
it is stopped early. Its folder is the truth: a finished one is not run again, an interrupted one resumes from
its own newest checkpoint, whatever Tune's snapshot remembers, and a population's member (population.py) goes
on in its newest fork. The log lies outside that folder, which the run itself makes.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rairl_ray.actors.draining import Drained, draining_nodes
from rairl_ray.files import not_shared, unseen
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.points import newest_run, override
from rairl_ray.sweep.remote import asked_elsewhere, on_this_node, send_log
from rairl_ray.sweep.result import final_values, finished

POLL_SECONDS = 1.0
STOP_SECONDS = 120.0
"""How long a run that Tune stops may take for its checkpoint."""
ASKED_SECONDS = 1800.0
"""The same for one that a person stops: the step is finished first."""
ENDED = -1
"""`step` of a trial's last report, which holds its final evaluation."""
REPORT = "report"
"""Number of the report, counted over the whole run whatever process made it; the last one has none."""
WHY = "why"
"""In the last report of a trial that did not run: the reason. There is no log that the sweep could read."""
_PR_SET_PDEATHSIG = 1
_KEPT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")


def trainable(config: dict[str, Any]) -> None:
    """What Tune's worker calls. It stands here because a worker imports the module that it comes from."""
    run_trial(config["spec"])


def run_trial(spec: dict[str, Any]) -> None:
    """One trial to its end; `spec` is what `sweep/run.py` says of it.

    A run that fails is started again `failures` times and goes on from its newest checkpoint; after that the
    trial ends without a final evaluation. Tune sees a failure only where it loses the worker that does this, or
    where its node is being drained: then the run saves, and Tune starts the trial elsewhere. A metric that the
    final evaluation lacks is reported as NaN; the sweep's end says so. Where one of the files `stops` exists
    (stopping.py), the run saves and leaves, or does not start.
    """
    if problem := _not_here(spec):
        tune.report({**dict.fromkeys(spec["metrics"], math.nan), "step": ENDED, WHY: problem})
        return
    spec = on_this_node(spec)
    folder, failures, code = _newest(spec), 0, 0
    # A run that has ended without all of it having arrived in a bucket is resumed, which uploads the rest.
    while not ((finished(folder) and not (code and spec.get("remote"))) or _asked(spec)):
        code = _run(spec, folder)
        before, folder = folder, _newest(spec)
        if folder.root != before.root:
            continue
        if code == 0 or _asked(spec):
            break
        if _drained():
            rows = folder.read_metrics()
            raise Drained([ray.get_runtime_context().get_node_id()], int(rows[-1]["step"]) if rows else 0)
        failures += 1
        if failures > spec["failures"]:
            break
    values = final_values(folder) if finished(folder) else {}
    tune.report({**dict.fromkeys(spec["metrics"], math.nan), **values, "step": ENDED})


def _not_here(spec: dict[str, Any]) -> str:
    """Why the trial cannot run on this node, where its folder would be on another disk than the sweep's."""
    above = Path(spec["folder"]).parents[1]
    if spec.get("remote") or not unseen([above]):
        return ""
    return str(not_shared("output_dir", above, ray.util.get_node_ip_address()))


def _newest(spec: dict[str, Any]) -> RunFolder:
    """Where the run goes on; another folder once a population has made a fork for it."""
    return RunFolder(newest_run(Path(spec["folder"])))


def _run(spec: dict[str, Any], folder: RunFolder) -> int:
    """One process of the trial from its start to its end, its rows reported to Tune; the exit code."""
    log = Path(spec["log"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        process = subprocess.Popen(
            _command(spec, folder), cwd=spec["cwd"], stdout=output, stderr=subprocess.STDOUT,
            env=_environment(), preexec_fn=_end_with_parent,
        )  # fmt: skip
        try:
            for report in _reports(folder, process, spec):
                tune.report(report)
        finally:
            _end(process, ASKED_SECONDS if _asked(spec) or _drained() else STOP_SECONDS)
            send_log(spec)
    return process.returncode


def _command(spec: dict[str, Any], folder: RunFolder) -> list[str]:
    address = override("cluster.address", ray.get_runtime_context().gcs_address)
    started, made = folder.config.is_file(), folder.root != Path(spec["folder"]).absolute()
    if started and (made or spec["fork"]):
        words = [str(folder.config), *([override("output_dir", spec["remote"])] if spec.get("remote") else [])]
    else:
        words = [*(["--fork", spec["fork"]] if spec["fork"] else [spec["base"]]), *spec["overrides"]]
    command = [sys.executable, "-m", "launch", "train", *words, address]
    return [*command, "--resume", str(folder.root)] if started else command


def _environment() -> dict[str, str]:
    """Ours, without what Ray sets for this worker alone."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key in _KEPT}
    for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        ours.pop(key, None)
    return ours


def _drained() -> bool:
    """Whether the node of this process is about to go."""
    return ray.is_initialized() and ray.get_runtime_context().get_node_id() in draining_nodes()


def _asked(spec: dict[str, Any]) -> bool:
    return any(Path(stop).exists() for stop in spec["stops"]) or asked_elsewhere(spec)


def _reports(
    folder: RunFolder, process: subprocess.Popen[bytes], spec: dict[str, Any]
) -> Iterator[dict[str, float]]:
    """The first metric in new rows of metrics.jsonl, while the run is on and is not to end."""
    metric, seen = spec["metrics"][0], len(folder.read_metrics())
    while True:
        ended = process.poll() is not None
        rows = folder.read_metrics()
        # A run that went back to a checkpoint makes the rows after it again.
        seen = min(seen, len(rows))
        number = sum(metric in row for row in rows[:seen])
        for row in rows[seen:]:
            if metric in row:
                number += 1
                yield {metric: row[metric], "step": row["step"], REPORT: number}
                if _newest(spec).root != folder.root:
                    return
        seen = len(rows)
        if ended or _asked(spec) or _drained():
            return
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Ask a run that still is to save and leave; then end it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """The kernel sends SIGTERM when this worker dies in any way: no run outlives its sweep."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
