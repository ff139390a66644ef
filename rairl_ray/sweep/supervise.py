"""One trial under Ray Tune: a run in a process of its own, watched through its run folder.

The run joins the sweep's cluster and reserves its own placement group; Tune decides when it starts and whether
it is stopped early. Its folder is the truth: a finished one is not run again, an interrupted one resumes from
its own newest checkpoint, whatever Tune's snapshot remembers.
"""

from __future__ import annotations

import ctypes
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

from rairl_ray.runfolder import RunFolder, read_summary

POLL_SECONDS = 1.0
STOP_SECONDS = 120.0
"""How long a run that was told to stop may take for its checkpoint."""
OUTPUT = "output.log"
_PR_SET_PDEATHSIG = 1
_KEPT = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR")


def run_trial(spec: dict[str, Any]) -> None:
    """Tune's function trainable. `spec`: folder, base, overrides, metric, cwd.

    Raises:
        RuntimeError: the run failed (the last line that it printed), or its metric is nowhere.
    """
    folder = RunFolder(spec["folder"])
    if not finished(folder):
        folder.root.mkdir(parents=True, exist_ok=True)
        with open(folder.root / OUTPUT, "ab") as output:
            process = subprocess.Popen(
                _command(spec, folder), cwd=spec["cwd"], stdout=output, stderr=subprocess.STDOUT,
                env=_environment(), preexec_fn=_end_with_parent,
            )  # fmt: skip
            try:
                for row in _rows(folder, process):
                    if spec["metric"] in row:
                        tune.report({spec["metric"]: row[spec["metric"]], "step": row["step"]})
            finally:
                _end(process)
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {last_line(folder.root / OUTPUT)}")
    values = final_values(folder)
    if spec["metric"] not in values:
        raise RuntimeError(f"metric={spec['metric']} is not in the final evaluation: {', '.join(values)}")
    tune.report({**values, "step": -1})


def finished(folder: RunFolder) -> bool:
    """Whether a run has ended with its final policy and evaluation."""
    return folder.final_policy.is_dir() and (folder.evaluations / "final" / "summary.json").is_file()


def final_values(folder: RunFolder) -> dict[str, float]:
    """Metric -> value of the final evaluation."""
    summary = read_summary(folder.evaluations / "final" / "summary.json")
    return {name: entry["value"] for name, entry in summary.items()}


def last_line(file: Path) -> str:
    """The last thing a run said."""
    lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:500] if lines else "nothing was printed"


def _command(spec: dict[str, Any], folder: RunFolder) -> list[str]:
    address = ray.get_runtime_context().gcs_address
    command = [
        sys.executable,
        "-m",
        "launch",
        "train",
        spec["base"],
        *spec["overrides"],
        f"cluster.address={address}",
    ]
    return [*command, "--resume", str(folder.root)] if folder.config.is_file() else command


def _environment() -> dict[str, str]:
    """Ours, without what Ray sets for this worker alone."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") or key in _KEPT}
    for key in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        ours.pop(key, None)
    return ours


def _rows(folder: RunFolder, process: subprocess.Popen[bytes]) -> Iterator[dict[str, float]]:
    """New rows of metrics.jsonl while the run is on."""
    seen = len(folder.read_metrics())
    while True:
        ended = process.poll() is not None
        rows = folder.read_metrics()
        yield from rows[seen:]
        seen = max(seen, len(rows)) if len(rows) >= seen else len(rows)
        if ended:
            return
        time.sleep(POLL_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a run that still is to save and leave; then end it."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _end_with_parent() -> None:
    """The kernel sends SIGTERM when this worker dies in any way: no run outlives its sweep."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
