"""The environment of one learner rank; must be set before `deepspeed` is imported.

Standard library and torch only, so that an actor can call it first.
"""

from __future__ import annotations

import os

import torch


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
        values["OMP_NUM_THREADS"] = threads
        torch.set_num_threads(threads)  # the variable alone comes too late once torch is imported
    os.environ.update({name: str(value) for name, value in values.items()})
