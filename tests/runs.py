"""Tiny real runs for the end-to-end tests: seconds on a laptop, every engine real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]

TINY = [
    "model.policy.build.hidden_size=64",
    "model.policy.build.layers=1",
    "model.policy.build.heads=2",
    "model.policy.build.intermediate_size=64",
    "rollout.engine=hf",
    "rollout.samples_per_prompt=4",
    "rollout.max_completion_tokens=40",
    "trainer.prompts_per_step=4",
    "trainer.steps=2",
    "trainer.checkpoint_every=1",
    "trainer.log_rollouts_every=1",
    "eval.prompts=8",
    "eval.samples_per_prompt=4",
    "eval.k=[1,4]",
    "eval.localisation_traces=8",
    "eval.bootstrap=50",
    "data.eval_limit=16",
    "placement.threads_per_actor=1",
]
"""Overrides that make any demo experiment tiny.

One thread each: a product of matrices may round otherwise on another number of threads, and two tests at once
have no more than two cores.
"""

TINY_AIRL = [
    *TINY,
    "discriminator.warmup_steps=2",
    "discriminator.warmup_pool_prompts=8",
    "discriminator.warmup_prompts_per_step=4",
    "discriminator.warmup_gate_auroc=null",
]
BACKGROUND = "RAIRL_BACKGROUND"
"""A variable by which the processes of one command of `launch_background` are known."""


def launch(
    *arguments: str, timeout: float = 600, environment: Mapping[str, str] = os.environ
) -> subprocess.CompletedProcess[str]:
    """`python launch.py ARGUMENTS` in a process of its own (see tests/warm), from the project's root."""
    return subprocess.run(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**environment, "MLFLOW_DISABLE_TELEMETRY": "true"},
    )


def launch_background(*arguments: str) -> subprocess.Popen[str]:
    """The same without waiting, in a process group of its own so that it can be killed whole."""
    return subprocess.Popen(
        [sys.executable, "launch.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", BACKGROUND: uuid.uuid4().hex},
    )


def inheriting(accepts: Callable[[Mapping[str, str]], bool]) -> list[psutil.Process]:
    """Processes of this machine whose first environment is accepted, by number; a zombie has none.

    The only way to find forks (tests/warm), which are no children of what started them.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if accepts(process.environ()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def descendants(pid: int) -> list[int]:
    """Process ids below one of `launch_background`, forks included."""
    try:
        started = psutil.Process(pid)
        mark = started.environ()[BACKGROUND]
        children = {child.pid for child in started.children(recursive=True)}
    except psutil.NoSuchProcess:
        return []
    marked = {process.pid for process in inheriting(lambda has: has.get(BACKGROUND) == mark)}
    return sorted((children | marked) - {pid})


def kill_hard(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
