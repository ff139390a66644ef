"""The environment of processes that compute: of any before it starts, of a learner rank before DeepSpeed.

Standard library alone until a rank is set up, so that an actor can call it first and `plan` can ask it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rairl_ray.config.schema import RunConfig

ComputingRole = Literal["rollout", "policy", "discriminator", "reward"]
"""Of an actor; `reward` is a saved reward model that a verb reads with."""


def threads_of(config: RunConfig, role: ComputingRole) -> int:
    """Compute threads of ONE actor of a role: `placement.threads_per_actor`, or all cores of this machine.

    A learner's ranks share them: two ranks with all cores each would only trade places. Both learners have
    those of the one with more ranks.
    """
    threads = config.placement.threads_per_actor or os.cpu_count() or 1
    if role in ("rollout", "reward"):
        return threads
    learner = config.learner
    return max(1, threads // max(learner.replicas, learner.discriminator_ranks))


def compute_environment(device: str, threads: int) -> dict[str, str]:
    """Variables of a process that computes with so many threads; they count from its start.

    On a CPU roles take turns on the same cores, so a thread without work must sleep at once. GNU's OpenMP,
    which torch brings, spins instead, and where others want the cores a barrier then takes seconds
    (docs/performance.md). Intel's is preloaded where it is installed, GNU's told to sleep elsewhere; what the
    user set stays. Left alone, Intel's binds every process that one with it forks to a single core.
    """
    variables = {
        "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    if device != "cpu":
        return variables
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.exists():
        preloaded = os.environ.get("LD_PRELOAD", "")
        if "libiomp5" not in preloaded:
            variables["LD_PRELOAD"] = f"{openmp}:{preloaded}".rstrip(":")
        variables["KMP_BLOCKTIME"] = os.environ.get("KMP_BLOCKTIME", "1")
        variables["KMP_AFFINITY"] = os.environ.get("KMP_AFFINITY", "none")
    elif "GOMP_SPINCOUNT" not in os.environ:
        variables["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    return variables


def openmp_of(variables: Mapping[str, str]) -> str:
    """What a CPU process with these variables of `compute_environment` computes with, for people."""
    if "KMP_BLOCKTIME" in variables:
        return f"Intel's, KMP_BLOCKTIME={variables['KMP_BLOCKTIME']}"
    if "OMP_WAIT_POLICY" in variables:
        return f"GNU's (no libiomp5.so in {sys.prefix}/lib), OMP_WAIT_POLICY={variables['OMP_WAIT_POLICY']}"
    return f"GNU's (no libiomp5.so in {sys.prefix}/lib), GOMP_SPINCOUNT={os.environ['GOMP_SPINCOUNT']}"


def setup_environment(
    rank: int, world_size: int, master_addr: str, master_port: int, device: str, threads: int | None = None
) -> None:
    """Set what DeepSpeed and torch.distributed read from the environment of this process.

    `device` is "cpu" or "cuda"; `threads` bounds the compute threads of a CPU rank. Every rank sees only
    its own device (Ray hides the others), so the local rank is always 0.
    """
    values = {
        "RANK": rank,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": world_size,
        "LOCAL_SIZE": world_size,
        "MASTER_ADDR": master_addr,
        "MASTER_PORT": master_port,
        "DS_ACCELERATOR": "cuda" if device.startswith("cuda") else "cpu",
    }
    if device.startswith("cuda"):
        # whatever the machine's environment says: a collective past its deadline ends the process
        values |= {"TORCH_NCCL_ASYNC_ERROR_HANDLING": 1, "TORCH_NCCL_BLOCKING_WAIT": 0}
    if threads is not None:
        import torch

        values["OMP_NUM_THREADS"] = threads
        torch.set_num_threads(threads)  # the variable alone comes too late once torch is imported
    os.environ.update({name: str(value) for name, value in values.items()})
