"""Which role's rank lives in which bundle: a pure function of the configuration, without Ray.

A run, `plan` and a Tune trial use the same answer. Two layouts:

* colocated: bundle i holds rank i of every role, each with its fraction of the one GPU there (on a CPU
  machine: its `cpus_per_actor`). A tensor-parallel engine takes whole GPUs, so it gets bundles of its own.
* disaggregated: every rank has a bundle of its own.

A bundle holds at most one rank of a role, and a whole GPU: NCCL refuses two ranks of one group on one device
("Duplicate GPU detected"). Groups of different roles may share a device.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import PlacementError

Device = Literal["cpu", "gpu"]

OVER_HALF = 0.5001
"""Share of a GPU that no second rank of the same size fits beside (Ray counts in ten-thousandths)."""


class Slot(NamedTuple):
    """Where one rank lives and what it takes there."""

    bundle: int
    resources: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """What to ask of Ray, and who lives where."""

    bundles: tuple[dict[str, float], ...]
    """Resources of each bundle, as Ray's placement groups take them."""
    strategy: str
    roles: Mapping[str, tuple[Slot, ...]]
    """Role -> slot of each rank. `rollout` has one slot per engine, whatever its tensor parallelism."""
    device: Device

    def total(self, resource: str) -> float:
        """Sum over all bundles."""
        return round(sum(bundle.get(resource, 0.0) for bundle in self.bundles), 4)


def resolve_device(gpus: int) -> Device:
    """The answer to `placement.device: auto` on a cluster with so many GPUs."""
    return "gpu" if gpus > 0 else "cpu"


def local_gpus() -> int:
    """NVIDIA devices of this machine, without loading any driver library."""
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))


def this_machine() -> dict[str, float]:
    """The resources of a private cluster on this machine."""
    gpus, visible = local_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}


def bundles(config: RunConfig, device: str | None = None) -> Plan:
    """The placement of a run.

    Args:
        device: `cpu` or `gpu`; needed where `placement.device` is auto (`resolve_device` answers it).

    Raises:
        PlacementError: auto without an answer; fractions that exceed a GPU.
    """
    device = device or config.placement.device
    if device not in ("cpu", "gpu"):
        raise PlacementError(
            f"placement.device={device}: nobody has said what the machine has; write cpu or gpu"
        )
    needs = {role: _needs(config, role, device) for role in roles(config)}
    own = {"rollout"} if config.rollout.tensor_parallel > 1 else set()
    if config.placement.type == "disaggregated":
        own = set(needs)
    sizes: list[dict[str, float]] = []
    slots: dict[str, tuple[Slot, ...]] = {}
    for role in sorted(own, key=list(needs).index):
        count, resources = needs[role]
        slots[role] = tuple(Slot(len(sizes) + rank, dict(resources)) for rank in range(count))
        sizes += [dict(resources) for _ in range(count)]
    shared = {role: need for role, need in needs.items() if role not in own}
    first = len(sizes)
    for rank in range(max((count for count, _ in shared.values()), default=0)):
        together = [resources for count, resources in shared.values() if rank < count]
        sizes.append(_together(together))
    for role, (count, resources) in shared.items():
        slots[role] = tuple(Slot(first + rank, dict(resources)) for rank in range(count))
    return Plan(
        bundles=tuple(sizes),
        strategy=config.placement.strategy,
        roles={role: slots[role] for role in needs},
        device="gpu" if device == "gpu" else "cpu",
    )


def roles(config: RunConfig) -> tuple[str, ...]:
    """Who takes part. SFT has a rollout engine too: it is evaluated by sampling."""
    return ("rollout", "policy", "discriminator") if config.algorithm.type == "airl" else ("rollout", "policy")


def _needs(config: RunConfig, role: str, device: str) -> tuple[int, dict[str, float]]:
    """(ranks, resources of one rank) of a role."""
    learner, placement, parallel = config.learner, config.placement, config.rollout.tensor_parallel
    ranks = {
        "rollout": 1 if config.algorithm.type == "sft" else config.rollout.replicas,
        "policy": learner.replicas,
        "discriminator": learner.discriminator_replicas or learner.replicas,
    }[role]
    resources = {"CPU": float(placement.cpus_per_actor)}
    if device == "gpu":
        fraction = gpu_fractions(config)[role]
        whole = placement.type == "disaggregated" or (role == "rollout" and parallel > 1)
        resources["GPU"] = float(parallel if role == "rollout" else 1) if whole else fraction
    return ranks, resources


def gpu_fractions(config: RunConfig) -> dict[str, float]:
    """Role -> share of a GPU that one rank takes where roles share it.

    Several SFT ranks are placed by Ray Train, which packs them as tightly as their shares allow: more than
    half a GPU each keeps them apart. The engine then takes what is left.
    """
    placement = config.placement
    fractions = {
        "rollout": placement.rollout_gpu_fraction,
        "policy": placement.policy_gpu_fraction,
        "discriminator": placement.discriminator_gpu_fraction,
    }
    if config.algorithm.type == "sft" and config.learner.replicas > 1:
        fractions["policy"] = max(fractions["policy"], OVER_HALF)
        fractions["rollout"] = min(fractions["rollout"], round(1.0 - fractions["policy"], 4))
    return fractions


def _together(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The bundle that holds all members: their CPUs, and one whole GPU that they share."""
    # Ray counts in ten-thousandths; sums of fractions are rounded to what it can represent.
    bundle = {"CPU": round(sum(member["CPU"] for member in members), 4)}
    taken = round(sum(member.get("GPU", 0.0) for member in members), 4)
    if taken > 1:
        raise PlacementError(
            f"placement: the roles on one GPU take {taken:g} of it; lower placement.rollout_gpu_fraction, "
            "policy_gpu_fraction or discriminator_gpu_fraction, or set placement.type=disaggregated"
        )
    if taken:
        bundle["GPU"] = 1.0
    return bundle


def check_against(plan: Plan, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse a plan that the cluster can never serve, even when idle.

    Args:
        nodes: total resources of each node, as Ray names them; a resource that a node leaves out is 0.

    Raises:
        PlacementError: what is asked for, what there is, and which keys ask for less.
    """
    remedy = "; lower rollout.replicas, learner.replicas or learner.discriminator_replicas"
    one_rank = ", or set placement.device=cpu (a GPU holds one rank of a role, whatever its fraction)"
    for resource, key in (("GPU", one_rank), ("CPU", ", or placement.cpus_per_actor")):
        asked, there = plan.total(resource), sum(node.get(resource, 0.0) for node in nodes)
        if asked > there + 1e-6:
            raise PlacementError(
                f"placement: the run needs {asked:g} {resource}s and the cluster has {there:g}{remedy}{key}"
            )
    for bundle in plan.bundles:
        if not any(_fits(bundle, node) for node in nodes):
            raise PlacementError(f"placement: no node of the cluster holds a bundle of {_said(bundle)}{remedy}")
    if plan.strategy == "STRICT_PACK":
        whole = {name: plan.total(name) for bundle in plan.bundles for name in bundle}
        if not any(_fits(whole, node) for node in nodes):
            raise PlacementError(
                f"placement.strategy=STRICT_PACK: no single node holds {_said(whole)}; write PACK{remedy}"
            )
        return
    free = [dict(node) for node in nodes]
    # First fit, the largest bundles first, so that small ones fill the gaps.
    for bundle in sorted(plan.bundles, key=lambda b: (b.get("GPU", 0.0), b["CPU"]), reverse=True):
        node = next((node for node in free if _fits(bundle, node)), None)
        if node is None:
            raise PlacementError(
                f"placement: the nodes together have enough, but a bundle of {_said(bundle)} fits on none of "
                f"them beside the others{remedy}"
            )
        for name, amount in bundle.items():
            node[name] -= amount


def room(plan: Plan, resources: Mapping[str, float]) -> int:
    """How many such runs idle resources hold at once, by their sums."""
    names = {name for bundle in plan.bundles for name, amount in bundle.items() if amount}
    return min(int(resources.get(name, 0.0) / plan.total(name) + 1e-6) for name in names)


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(name, 0.0) + 1e-6 for name, amount in bundle.items())


def _said(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
