"""`plan`: what a run would be and take, printed; nothing is started.

Neither Ray nor torch is imported, but Ray to ask a running cluster for its nodes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress

from rich.console import Console
from rich.table import Table

from rairl_ray.actors.placement import (
    SPREAD_ROLLOUTS,
    Node,
    PlacementPlan,
    bundles,
    check_against,
    kinds,
    local_gpus,
    present_or_promised,
    resolve_device,
    total_gpus,
)
from rairl_ray.config.estimate import Memory, memory, work
from rairl_ray.config.labels import said
from rairl_ray.config.load import config_hash, dump_yaml, warm_start_chain
from rairl_ray.config.prediction import Assumptions, predict
from rairl_ray.config.rules import check
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.engines.environment import compute_environment, openmp_of, threads_of
from rairl_ray.errors import PlacementError, UserError

PLENTY = 1e9
"""CPUs of a hypothetical node that nobody described."""


def show_plan(
    config: RunConfig,
    console: Console,
    gpus: int | None = None,
    nodes: int | None = None,
    cpus: int | None = None,
    address: str | None = None,
) -> None:
    """Print the resolved configuration, placement, work and memory.

    Args:
        gpus, cpus: of EACH node of a hypothetical cluster; None asks for what the plan needs.
        nodes: how many nodes there are; None: as many as needed, or 1 where `gpus` or `cpus` is given.
        address: HOST:PORT of a running cluster, whose nodes and labels count instead.

    Raises:
        UserError: a warm start that contradicts the run; a cluster that cannot serve the plan.
    """
    chain = warm_start_chain(config)
    if address is not None:
        cluster = present_or_promised(config, running_nodes(address, gpus, nodes, cpus))
        plan = placement_with(config, total_gpus(cluster))
    else:
        plan = placement_with(config, local_gpus() if gpus is None else gpus)
        cluster = hypothetical_nodes(plan, config.placement.gpus_per_node, gpus, nodes, cpus)
    check_against(plan, cluster)

    console.print(dump_yaml(config).rstrip(), markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nconfig hash: {config_hash(config)}", highlight=False)
    console.print(f"run folder: {config.output_dir}/{config.name}", markup=False, highlight=False)
    for earlier in chain:
        console.print(f"starts from: {earlier.name} ({earlier.trainer.steps} SFT steps)", markup=False)
    print_placement(plan, cluster, console)
    print_threads(config, plan, console)
    _print_work(config, console)
    policy = chain[0].model.policy if chain else None
    print_memory(memory(config, policy), plan, console)
    print_prediction(config, plan, console, policy)


def placement_with(config: RunConfig, gpus: int) -> PlacementPlan:
    """The run's placement on a cluster with so many GPUs.

    Raises:
        UserError: what the configuration asks for cannot be on the device that this makes it.
    """
    device = config.placement.device
    if device == "auto":
        device = resolve_device(gpus)
    check(config, f"on this cluster ({device})", device)
    return bundles(config, device)


def hypothetical_nodes(
    plan: PlacementPlan, gpus_per_node: int, gpus: int | None, nodes: int | None, cpus: int | None
) -> list[Node]:
    """The cluster that a plan is checked against; what nobody said is as large as needed."""
    node = {"CPU": PLENTY if cpus is None else float(cpus)}
    if plan.device == "gpu" or gpus is not None:
        node["GPU"] = float(gpus_per_node if gpus is None else gpus)
    if nodes is None:
        described = gpus is not None or cpus is not None
        nodes = 1 if described or plan.device == "cpu" else _enough(plan, Node(node))
    return [Node(node) for _ in range(nodes)]


def _enough(plan: PlacementPlan, node: Node) -> int:
    """The fewest such nodes that hold the plan's bundles, or its GPUs where no number of them does."""
    fewest = math.ceil(plan.total("GPU") / node.resources["GPU"])
    for count in range(fewest, len(plan.bundles) + 1):
        with suppress(PlacementError):
            check_against(plan, [node] * count)
            return count
    return fewest


def running_nodes(address: str, gpus: int | None, nodes: int | None, cpus: int | None) -> list[Node]:
    """The living nodes of a running cluster. Raises UserError where a hypothetical one is described, too."""
    hypothetical = {"--gpus": gpus, "--nodes": nodes, "--cpus": cpus}
    given = [option for option, value in hypothetical.items() if value is not None]
    if given:
        raise UserError(
            f"plan: --address asks a running cluster for its nodes, which contradicts {', '.join(given)}; "
            "leave one of them out"
        )
    from rairl_ray.actors.joining import nodes_at

    return nodes_at(address)


def described(cluster: Sequence[Node]) -> str:
    """The nodes that take work, by their kinds."""
    return " and ".join(
        f"{count} node(s) of {node.resources.get('CPU', 0.0):g} CPUs "
        f"and {node.resources.get('GPU', 0.0):g} GPUs"
        + (f" ({text})" if (text := said(node.labels or {})) else "")
        for node, count in kinds(cluster)
    )


def print_placement(plan: PlacementPlan, cluster: Sequence[Node], console: Console) -> None:
    """Bundles, which ranks live in them, and on which kinds of a known cluster's nodes they may be."""
    known = kinds(cluster) if all(node.labels is not None for node in cluster) else []
    table = Table(title=f"placement: {len(plan.bundles)} bundle(s) on {plan.device}, {plan.strategy}")
    for heading in ("bundle", "resources", "who", *(["labels"] if any(plan.labels) else [])):
        table.add_column(heading, overflow="fold")
    if known:
        table.add_column("on kind", overflow="fold")
    for index, (resources, selector) in enumerate(zip(plan.bundles, plan.labels, strict=True)):
        who = [
            f"{role} {rank} ({_said(slot.resources)})"
            for role, slots in plan.roles.items()
            for rank, slot in enumerate(slots)
            if slot.bundle == index
        ]
        row = [str(index), _said(resources), "\n".join(who), *([said(selector)] if any(plan.labels) else [])]
        if known:
            fit = [str(i) for i, (node, _) in enumerate(known, 1) if node.holds(resources, selector)]
            row.append(" or ".join(fit))
        table.add_row(*row)
    console.print()
    console.print(table)
    if plan.strategy == SPREAD_ROLLOUTS:
        console.print(
            "SPREAD_ROLLOUTS: a bundle is on one node; Ray puts two on one only where there are too few nodes",
            highlight=False,
        )
    if plan.spare:
        least, most = len(plan.roles["rollout"]), len(plan.roles["rollout"]) + plan.spare
        at_most = {name: plan.total(name) + plan.spare * amount for name, amount in plan.spare_bundle.items()}
        console.print(
            f"rollout replicas: starts with {least}, on the bundles above; up to {most} as the cluster has "
            f"room, each further one {_said(plan.spare_bundle)}; with {most} the run takes {_said(at_most)}",
            highlight=False,
        )
    for number, kind in enumerate(known, 1):
        node, count = kind
        console.print(f"kind {number}: {described([node] * count)}", highlight=False, markup=False)
    if plan.device == "gpu" and not known:
        console.print(
            f"fits {len(cluster)} node(s) of {cluster[0].resources['GPU']:g} GPUs; takes {plan.total('GPU'):g} "
            "GPUs",
            highlight=False,
        )


def print_threads(config: RunConfig, plan: PlacementPlan, console: Console) -> None:
    """Compute threads of an actor of each role, and the OpenMP that runs them on a CPU."""
    device = "cuda" if plan.device == "gpu" else "cpu"
    said, openmp = [], ""
    for role in ("rollout", "policy", "discriminator"):
        if role not in plan.roles or (role == "rollout" and device == "cuda"):
            continue  # an engine on a GPU is told nothing
        variables = compute_environment(device, threads_of(config, role))
        ranks = f" in each of {len(plan.roles[role])}" if len(plan.roles[role]) > 1 else ""
        said.append(f"{role} {variables['OMP_NUM_THREADS']}{ranks}")
        openmp = f"; OpenMP: {openmp_of(variables)}" if device == "cpu" else ""
    given = config.placement.threads_per_actor
    key = "all of them" if given is None else str(given)
    console.print(
        f"compute threads: {', '.join(said)} (this machine has {os.cpu_count()} cores, "
        f"placement.threads_per_actor: {key}){openmp}",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def _print_work(config: RunConfig, console: Console) -> None:
    todo = work(config)
    table = Table(title="work (tokens at their upper limits)")
    table.add_column("what", overflow="fold")
    table.add_column("a step", justify="right")
    table.add_column("in all", justify="right")
    steps = config.trainer.steps
    what = "samples" if config.algorithm.needs.rollouts else "demonstrations"
    table.add_row(what, f"{todo.samples_per_step:,}", f"{todo.total_samples:,}")
    table.add_row(
        "completion tokens", f"{todo.completion_tokens_per_step:,}", f"{todo.total_completion_tokens:,}"
    )
    learner_tokens = todo.learner_tokens_per_step
    table.add_row("tokens read by the policy learner", f"{learner_tokens:,}", f"{learner_tokens * steps:,}")
    table.add_row("policy optimizer steps", f"{todo.policy_updates // steps:,}", f"{todo.policy_updates:,}")
    if config.algorithm.needs.discriminator:
        least, most = todo.discriminator_updates, todo.discriminator_updates_most
        in_all = f"{least:,}" if least == most else f"{least:,} to {most:,}"
        a_step = f"{config.discriminator.updates_per_policy_step:,}"
        table.add_row("discriminator optimizer steps (warm-up included)", a_step, in_all)
    console.print()
    console.print(table)


def print_prediction(
    config: RunConfig, plan: PlacementPlan, console: Console, policy: Model | None = None
) -> None:
    """Seconds of a step by phase and GPU hours, where the run is on GPUs and the models' shapes are known."""
    found = predict(config, plan.total("GPU"), policy)
    if found is None:
        return
    phases = {
        "rollout": found.rollout, "score": found.score, "discriminator": found.discriminator,
        "policy": found.policy, "weight sync": found.sync,
    }  # fmt: skip
    table = Table(title="time, predicted and not measured")
    table.add_column("what")
    table.add_column("seconds a step", justify="right")
    for phase, seconds in phases.items():
        if seconds:
            table.add_row(phase, f"{seconds:.2f}")
    table.add_row("step" + (" (rollouts overlap)" if found.overlapped else ""), f"{found.step:.2f}")
    console.print()
    console.print(table)
    console.print(
        f"the whole run, its warm-up and evaluations with it: {found.hours:.1f} hours, {found.gpu_hours:.0f} "
        f"GPU hours\nassumed: {Assumptions()}",
        highlight=False,
    )


def print_memory(estimates: list[Memory], plan: PlacementPlan, console: Console) -> None:
    """What one rank of each role needs."""
    table = Table(title="memory of one rank, estimated")
    for heading in ("role", "ranks", "model", "parameters", "trained", "parts", "total"):
        table.add_column(heading, overflow="fold")
    for estimate in estimates:
        parts = ", ".join(f"{part} {_bytes(value)}" for part, value in estimate.parts.items() if value != 0)
        ranks = len(plan.roles[estimate.role])
        more = f" to {ranks + plan.spare}" if estimate.role == "rollout" and plan.spare else ""
        table.add_row(
            estimate.role,
            f"{ranks}{more}",
            estimate.model,
            _count(estimate.parameters),
            "-" if estimate.role == "rollout" else _count(estimate.trained),
            parts,
            _bytes(estimate.total),
        )
    console.print()
    console.print(table)
    if any(estimate.total is None for estimate in estimates):
        console.print("unknown: no shape for this model without a download", highlight=False)


def _said(resources: dict[str, float]) -> str:
    return ", ".join(f"{name} {amount:g}" for name, amount in resources.items())


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 2**30:,.1f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"


def _count(value: int | None) -> str:
    if value is None:
        return "unknown"
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value)
