"""The actors of a verb that reads or samples: how many, how large, and with what environment."""

from __future__ import annotations

from typing import Literal

import ray

from rairl_ray.actors.chunks import Pool
from rairl_ray.actors.placement import resolve_device
from rairl_ray.actors.rollout_actor import rollout_environment
from rairl_ray.config.schema import RunConfig
from rairl_ray.engines.environment import compute_environment, threads_of
from rairl_ray.errors import PlacementError


def torch_device(config: RunConfig) -> Literal["cpu", "cuda"]:
    """Where models go on the connected cluster."""
    asked = config.placement.device
    if asked == "auto":
        asked = resolve_device(int(ray.cluster_resources().get("GPU", 0)))
    return "cuda" if asked == "gpu" else "cpu"


def engine_pool(config: RunConfig) -> Pool:
    """Rollout engines: at most `rollout.replicas`, each with `rollout.tensor_parallel` whole GPUs."""
    device = torch_device(config)
    environment = rollout_environment(config, device)
    timeouts = config.timeouts
    return _pool(
        config, "rollout.replicas", config.rollout.most_replicas, float(config.rollout.tensor_parallel),
        environment, timeouts.start_seconds + timeouts.rollout_seconds,
    )  # fmt: skip


def reward_pool(config: RunConfig) -> Pool:
    """Saved reward models: `learner.discriminator_replicas` (or `replicas`) of them, a GPU each."""
    environment = compute_environment(torch_device(config), threads_of(config, "reward"))
    timeouts = config.timeouts
    return _pool(
        config, "learner.discriminator_replicas",
        config.learner.discriminator_ranks, 1.0, environment,
        timeouts.start_seconds + timeouts.score_seconds,
    )  # fmt: skip


def _pool(
    config: RunConfig, key: str, actors: int, gpus: float, environment: dict[str, str], seconds: float
) -> Pool:
    """As many of the wanted actors as the cluster holds at once.

    Raises:
        PlacementError: it does not hold one.
    """
    needs = {"CPU": config.placement.cpus_per_actor, "GPU": gpus if torch_device(config) == "cuda" else 0.0}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items() if amount)
        for node in nodes
    )
    if room == 0:
        raise PlacementError(
            f"placement: no node of the cluster holds an actor of {needs}; lower placement.cpus_per_actor or "
            f"rollout.tensor_parallel, or set placement.device=cpu ({key}={actors})"
        )
    return Pool(
        actors=min(actors, room),
        cpus=needs["CPU"],
        gpus=needs["GPU"],
        environment=environment,
        silence_seconds=seconds,
    )
