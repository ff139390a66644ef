"""What travels from the policy learner to the rollout engines, and how: one answer for rules and actors."""

from __future__ import annotations

from typing import Literal

from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError

Transport = Literal["object_store", "nccl", "ipc"]
Adapter = Literal["merged", "served"]

KEPT_ADAPTERS = 2
"""Versions of an adapter that vLLM holds at once: the current one and the one before."""


def adapter_of(config: RunConfig) -> Adapter | None:
    """How the policy's adapter gets into the engines; None without one.

    A 4-bit base and SFT (whose adapter comes from disk) leave no base as published to add it to.
    """
    policy, asked = config.model.policy, config.rollout.adapter
    if policy.lora.rank is None:
        return None
    if not config.algorithm.needs.rollouts or (asked == "auto" and policy.quantization != "none"):
        return "served"
    return "merged" if asked == "auto" else asked


def weight_transport(config: RunConfig, device: str) -> Transport:
    """The transport of a run on `device` (`cpu`; anything else is a GPU).

    Served adapters, the Hugging Face engine, replicas that come and go and SFT (whose weights come from disk)
    use the object store.

    Raises:
        ConfigError: a GPU transport was asked for on a machine without one (placement.device=auto).
    """
    asked = config.rollout.weight_transport
    weights = config.rollout.offers.transports and adapter_of(config) != "served"
    if asked in ("nccl", "ipc") and device == "cpu":
        raise ConfigError(
            f"rollout.weight_transport={asked}: moves weights between GPUs, and this run has none; write auto"
        )
    fixed = not config.rollout.elastic  # groups of NCCL and IPC live and end with their first members
    direct = weights and fixed and config.algorithm.needs.rollouts
    if asked == "object_store" or device == "cpu" or not direct:
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
