"""Which role's rank lives in which bundle: a pure function of the configuration, without Ray.

A run, `plan` and a Tune trial use the same answer. Two layouts:

* colocated: bundle i holds rank i of every role, each with its fraction of the one GPU there (on a CPU
  machine: its `cpus_per_actor`). A tensor-parallel engine takes whole GPUs, so it gets bundles of its own.
* disaggregated: every rank has a bundle of its own. With `placement.strategy: SPREAD_ROLLOUTS` a learner's
  ranks share one (on GPUs: one for each `gpus_per_node` of them), which Ray never splits over nodes.

No two ranks of a role share a GPU: NCCL refuses two ranks of one group on one device ("Duplicate GPU
detected"). Groups of different roles may share a device.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rairl_ray.config.labels import matches, said
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import PlacementError

Device = Literal["cpu", "gpu"]

SPREAD_ROLLOUTS = "SPREAD_ROLLOUTS"
"""`placement.strategy` that Ray does not have: it has one for all bundles of a group."""

OVER_HALF = 0.5001
"""Share of a GPU that no second rank of the same size fits beside (Ray counts in ten-thousandths)."""


class Node(NamedTuple):
    """A node as placement sees it."""

    resources: Mapping[str, float]
    """All it has, as Ray names it; a resource left out is 0."""
    labels: Mapping[str, str] | None = None
    """None: nobody knows them (a hypothetical node, one that an autoscaler may bring), and any may be asked."""

    def has(self, selector: Mapping[str, str]) -> bool:
        """Whether a bundle with this label selector may be here."""
        return self.labels is None or matches(selector, self.labels)

    def holds(self, bundle: Mapping[str, float], selector: Mapping[str, str]) -> bool:
        """Whether an idle node like this serves the bundle."""
        return self.has(selector) and _fits(bundle, self.resources)


class Slot(NamedTuple):
    """Where one rank lives and what it takes there."""

    bundle: int
    resources: dict[str, float]


@dataclass(frozen=True)
class PlacementPlan:
    """What to ask of Ray, and who lives where."""

    bundles: tuple[dict[str, float], ...]
    """Resources of each bundle, as Ray's placement groups take them."""
    strategy: str
    """`placement.strategy`; what Ray is told is `rays_strategy`."""
    roles: Mapping[str, tuple[Slot, ...]]
    """Role -> slot of each rank. `rollout` has one slot per engine, whatever its tensor parallelism."""
    device: Device
    selectors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Role -> the label selector of `placement.labels`; roles without one may be anywhere."""
    spare: int = 0
    """Rollout replicas beyond these that may join while the run is on, each in `spare_bundle`."""

    @property
    def labels(self) -> tuple[dict[str, str], ...]:
        """Label selector of each bundle: those of all roles in it, which agree (`placement_rules.labels`)."""
        found: tuple[dict[str, str], ...] = tuple({} for _ in self.bundles)
        for role, selector in self.selectors.items():
            for slot in self.roles.get(role, ()):
                found[slot.bundle].update(selector)
        return found

    @property
    def rays_strategy(self) -> str:
        """Where bundles shall be, in Ray's words; a learner that stays together is one bundle by then."""
        return "SPREAD" if self.strategy == SPREAD_ROLLOUTS else self.strategy

    @property
    def spare_bundle(self) -> dict[str, float]:
        """What a replica takes that joins: it shares its GPUs with nobody."""
        own = self.roles["rollout"][0].resources
        return {name: float(math.ceil(amount)) if name == "GPU" else amount for name, amount in own.items()}

    def total(self, resource: str) -> float:
        """Sum over all bundles."""
        return round(sum(bundle.get(resource, 0.0) for bundle in self.bundles), 4)


def resolve_device(gpus: int) -> Device:
    """The answer to `placement.device: auto` on a cluster with so many GPUs."""
    return "gpu" if gpus > 0 else "cpu"


def local_gpus() -> int:
    """NVIDIA devices of this machine, without loading any driver library."""
    return sum(path.name[6:].isdigit() for path in Path("/dev").glob("nvidia*"))


def this_machine() -> Node:
    """What a private cluster on this machine has. Ray labels its GPUs' type, which is not known before."""
    gpus, visible = local_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return Node({"CPU": float(os.cpu_count() or 1), "GPU": float(gpus)}, None if gpus else {})


def total_gpus(nodes: Sequence[Node]) -> int:
    """GPUs of all nodes."""
    return int(sum(node.resources.get("GPU", 0.0) for node in nodes))


def present_or_promised(config: RunConfig, alive: Sequence[Node]) -> list[Node]:
    """The nodes to plan with: those alive, or what an autoscaling cluster may grow to (`cluster.grows_to`)."""
    largest = config.cluster.grows_to
    if largest is None:
        return list(alive)
    return [Node({"CPU": largest.cpus, "GPU": float(largest.gpus)}) for _ in range(largest.nodes)]


def bundles(config: RunConfig, device: str | None = None) -> PlacementPlan:
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
        most = _ranks_a_bundle(config, role, device)
        slots[role] = tuple(Slot(len(sizes) + rank // most, dict(resources)) for rank in range(count))
        sizes += [_times(resources, min(most, count - first)) for first in range(0, count, most)]
    shared = {role: need for role, need in needs.items() if role not in own}
    first = len(sizes)
    for rank in range(max((count for count, _ in shared.values()), default=0)):
        together = [resources for count, resources in shared.values() if rank < count]
        sizes.append(_together(together))
    for role, (count, resources) in shared.items():
        slots[role] = tuple(Slot(first + rank, dict(resources)) for rank in range(count))
    return PlacementPlan(
        bundles=tuple(sizes),
        strategy=config.placement.strategy,
        roles={role: slots[role] for role in needs},
        device="gpu" if device == "gpu" else "cpu",
        selectors={role: asked for role in needs if (asked := config.placement.labels.of(role))},
        spare=0
        if not config.algorithm.needs.rollouts
        else config.rollout.most_replicas - config.rollout.least_replicas,
    )


def roles(config: RunConfig) -> tuple[str, ...]:
    """Who takes part. SFT has a rollout engine too: it is evaluated by sampling."""
    learned = ("discriminator",) if config.algorithm.needs.discriminator else ()
    return ("rollout", "policy", *learned)


def _ranks_a_bundle(config: RunConfig, role: str, device: str) -> int:
    """How many ranks of a role that shares with nobody live in one bundle. SFT's are placed by Ray Train."""
    learner = role != "rollout" and config.algorithm.needs.rollouts
    if not learner or config.placement.strategy != SPREAD_ROLLOUTS:
        return 1
    return config.placement.gpus_per_node if device == "gpu" else sys.maxsize


def _times(resources: Mapping[str, float], count: int) -> dict[str, float]:
    return {name: round(amount * count, 4) for name, amount in resources.items()}


def _needs(config: RunConfig, role: str, device: str) -> tuple[int, dict[str, float]]:
    """(ranks, resources of one rank) of a role."""
    learner, placement, parallel = config.learner, config.placement, config.rollout.tensor_parallel
    ranks = {
        "rollout": config.rollout.least_replicas if config.algorithm.needs.rollouts else 1,
        "policy": learner.replicas,
        "discriminator": learner.discriminator_ranks,
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
    if not config.algorithm.needs.rollouts and config.learner.replicas > 1:
        fractions["policy"] = max(fractions["policy"], OVER_HALF)
        fractions["rollout"] = min(fractions["rollout"], round(1.0 - fractions["policy"], 4))
    return fractions


def _together(processes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The bundle that holds all actors: their CPUs, and one whole GPU that they share."""
    # Ray counts in ten-thousandths; sums of fractions are rounded to what it can represent.
    bundle = {"CPU": round(sum(process["CPU"] for process in processes), 4)}
    taken = round(sum(process.get("GPU", 0.0) for process in processes), 4)
    if taken > 1:
        raise PlacementError(
            f"placement: the roles on one GPU take {taken:g} of it; lower placement.rollout_gpu_fraction, "
            "policy_gpu_fraction or discriminator_gpu_fraction, or set placement.type=disaggregated"
        )
    if taken:
        bundle["GPU"] = 1.0
    return bundle


def check_against(plan: PlacementPlan, nodes: Sequence[Node]) -> None:
    """Refuse a plan that the cluster can never serve, even when idle.

    Raises:
        PlacementError: what is asked for, what there is, and which keys ask for less.
    """
    _check_labels(plan, nodes)
    remedy = "; lower rollout.replicas, learner.replicas or learner.discriminator_replicas"
    one_rank = ", or set placement.device=cpu (a GPU holds one rank of a role, whatever its fraction)"
    for resource, key in (("GPU", one_rank), ("CPU", ", or placement.cpus_per_actor")):
        asked, there = plan.total(resource), sum(node.resources.get(resource, 0.0) for node in nodes)
        if asked > there + 1e-6:
            raise PlacementError(
                f"placement: the run needs {asked:g} {resource}s and the cluster has {there:g}{remedy}{key}"
            )
    if plan.strategy == SPREAD_ROLLOUTS:
        key = "set placement.gpus_per_node" if plan.device == "gpu" else "write placement.strategy=PACK"
        remedy += f", or {key} (SPREAD_ROLLOUTS keeps that many ranks of a learner on one node)"
    for bundle, selector in zip(plan.bundles, plan.labels, strict=True):
        if not any(node.holds(bundle, selector) for node in nodes):
            raise PlacementError(
                f"placement: no node of the cluster{_having(selector)} holds a bundle of "
                f"{_said(bundle)}{remedy}"
            )
    _, missed = _first_fit(plan, nodes)
    if missed is None:
        return
    bundle, selector = missed
    if plan.strategy == "STRICT_PACK":
        raise PlacementError(
            f"placement.strategy=STRICT_PACK: no single node{_having(selector)} holds {_said(bundle)}; write "
            f"PACK{remedy}"
        )
    raise PlacementError(
        f"placement: the nodes{_having(selector)} together have enough, but a bundle of "
        f"{_said(bundle)} fits on none of them beside the others{remedy}"
    )


def _first_fit(
    plan: PlacementPlan, nodes: Sequence[Node]
) -> tuple[list[Node], tuple[dict[str, float], dict[str, str]] | None]:
    """The nodes with what a run leaves of them, and the first bundle that fits on none, with its labels.

    Bundles with the fewest nodes come first, then the largest, so that small ones fill the gaps. STRICT_PACK is
    one bundle of all.
    """
    asked_for = [(bundle, [labels]) for bundle, labels in zip(plan.bundles, plan.labels, strict=True)]
    if plan.strategy == "STRICT_PACK":
        asked_for = [({name: plan.total(name) for bundle in plan.bundles for name in bundle}, [*plan.labels])]

    def urgency(asked: tuple[dict[str, float], list[dict[str, str]]]) -> tuple[float, float, float]:
        bundle, selectors = asked
        choices = sum(all(map(node.has, selectors)) for node in nodes)
        return choices, -bundle.get("GPU", 0.0), -bundle["CPU"]

    free = [*nodes]
    for bundle, selectors in sorted(asked_for, key=urgency):
        good = (i for i, node in enumerate(free) if all(node.holds(bundle, one) for one in selectors))
        index = next(good, None)
        if index is None:
            return free, (bundle, {key: value for one in selectors for key, value in one.items()})
        left = {name: amount - bundle.get(name, 0.0) for name, amount in free[index].resources.items()}
        free[index] = free[index]._replace(resources=left)
    return free, None


def _check_labels(plan: PlacementPlan, nodes: Sequence[Node]) -> None:
    """Refuse labels that no node has; where nobody knows a node's labels nothing can be said."""
    if any(node.labels is None for node in nodes):
        return
    for role, selector in plan.selectors.items():
        for key, value in selector.items():
            if not any(node.has({key: value}) for node in nodes):
                raise PlacementError(
                    f"placement.labels.{role}: no node has {key}={value}; {_labels_of(nodes)}; change the "
                    f"key, or start nodes with it (ray start --labels {key}=VALUE)"
                )
    for index, selector in enumerate(plan.labels):
        if not any(node.has(selector) for node in nodes):
            who = " and ".join(
                role
                for role in plan.selectors
                if any(slot.bundle == index for slot in plan.roles.get(role, ()))
            )
            raise PlacementError(
                f"placement.labels: no single node has {said(selector)}, asked of bundle {index} by "
                f"{who}; {_labels_of(nodes)}; ask for less"
            )


def kinds(nodes: Sequence[Node]) -> list[tuple[Node, int]]:
    """Nodes alike in CPUs, GPUs and labels, and how many there are; nodes without both take no work."""
    found: dict[tuple[float, float, str], list[Node]] = {}
    for node in nodes:
        cpus, gpus = node.resources.get("CPU", 0.0), node.resources.get("GPU", 0.0)
        if cpus or gpus:
            found.setdefault((cpus, gpus, said(node.labels or {})), []).append(node)
    return [(alike[0], len(alike)) for alike in found.values()]


def room(plan: PlacementPlan, nodes: Sequence[Node]) -> int:
    """How many such runs idle nodes hold at once, each placed beside those before it."""
    count = 0
    free, missed = _first_fit(plan, nodes)
    while missed is None:
        count += 1
        free, missed = _first_fit(plan, free)
    return count


def side_by_side(bundle: Mapping[str, float], selector: Mapping[str, str], nodes: Sequence[Node]) -> int:
    """How many such bundles the nodes hold at once."""
    return sum(
        min(int(node.resources.get(name, 0.0) / amount + 1e-6) for name, amount in bundle.items() if amount)
        for node in nodes
        if node.has(selector)
    )


def _fits(bundle: Mapping[str, float], node: Mapping[str, float]) -> bool:
    return all(amount <= node.get(name, 0.0) + 1e-6 for name, amount in bundle.items())


def _having(selector: Mapping[str, str]) -> str:
    return f" with {said(selector)}" if selector else ""


def _labels_of(nodes: Sequence[Node]) -> str:
    """What the nodes have instead, each kind once."""
    count: dict[str, int] = {}
    for node in nodes:
        text = said(node.labels or {}) or "no label"
        count[text] = count.get(text, 0) + 1
    return "the nodes have " + "; ".join(f"{text} ({number})" for text, number in sorted(count.items()))


def _said(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items() if amount)
