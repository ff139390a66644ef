"""How full weights travel from the policy learner to the rollout engines: one answer for rules and actors."""

from __future__ import annotations

from typing import Literal

from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError

Transport = Literal["object_store", "nccl", "ipc"]


def weight_transport(config: RunConfig, device: str) -> Transport:
    """The transport of a run on `device` (`cpu`; anything else is a GPU).

    Adapters, the Hugging Face engine, replicas that come and go and SFT (whose weights come from disk) use the
    object store.

    Raises:
        ConfigError: a GPU transport was asked for on a machine without one (placement.device=auto).
    """
    asked = config.rollout.weight_transport
    full = config.rollout.offers.transports and config.model.policy.lora.rank is None
    if asked in ("nccl", "ipc") and device == "cpu":
        raise ConfigError(
            f"rollout.weight_transport={asked}: moves weights between GPUs, and this run has none; write auto"
        )
    fixed = not config.rollout.elastic  # groups of NCCL and IPC live and end with their first members
    if (
        asked == "object_store"
        or device == "cpu"
        or not (full and fixed)
        or not config.algorithm.needs.rollouts
    ):
        return "object_store"
    if asked != "auto":
        return asked
    if engines_own_gpus(config):
        return "nccl"
    return "ipc" if learner_beside_every_engine(config) else "object_store"


def engines_own_gpus(config: RunConfig) -> bool:
    """No engine shares its GPU with a learner. NCCL refuses two ranks on one GPU."""
    return config.placement.type == "disaggregated" or config.rollout.tensor_parallel > 1


def learner_beside_every_engine(config: RunConfig) -> bool:
    """Each engine's GPU holds a policy rank too, whose memory it can open (CUDA IPC)."""
    return not engines_own_gpus(config) and config.rollout.most_replicas <= config.learner.replicas
