"""The machines of a run: a Ray connection, one placement group, and the actor groups in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import ray
from ray._common.utils import get_default_ray_temp_dir
from ray.util.placement_group import PlacementGroup

from rairl_ray.actors.discriminator import DiscriminatorActor, DiscriminatorWorkers
from rairl_ray.actors.group import RankActor, create_process, create_processes, reserve, start_processes
from rairl_ray.actors.head import HeadAway, ask, patience
from rairl_ray.actors.joining import join, present_nodes, start
from rairl_ray.actors.learner import learner_environment
from rairl_ray.actors.placement import (
    Node,
    PlacementPlan,
    Slot,
    bundles,
    check_against,
    present_or_promised,
    resolve_device,
    this_machine,
    total_gpus,
)
from rairl_ray.actors.policy import PolicyActor, PolicyWorkers
from rairl_ray.actors.pool import Spawn
from rairl_ray.actors.process_monitor import ActorProcess, ProcessMonitor
from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.actors.rollout_actor import RolloutActor, rollout_environment
from rairl_ray.actors.shared_disk import check_shared
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import PlacementError
from rairl_ray.files import planted
from rairl_ray.trainer.prepare import Prepared

SOCKET_BYTES = 107
"""Longest path of a Unix socket."""


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Join or start Ray; what we started is gone afterwards, what we joined is left as it was."""
    if ray.is_initialized():
        yield
        return
    namespace = f"rairl-{uuid.uuid4().hex[:12]}"
    if config.cluster.address:
        join(config.cluster.address, namespace)
    else:
        start(namespace)
    try:
        yield
    finally:
        ray.shutdown()


def place(config: RunConfig) -> PlacementPlan:
    """The run's placement on the connected cluster.

    Raises:
        PlacementError: when the cluster can never serve it, even when idle.
    """
    return _placed(config, present_nodes())


def check_room(config: RunConfig) -> None:
    """Refuse a run that this machine can never place, before anything is made or trained for it.

    Raises:
        PlacementError: as `place`. A cluster that somebody else runs is asked when it is joined.
    """
    if config.cluster.address is None and not ray.is_initialized():
        check_sockets(get_default_ray_temp_dir())
        _placed(config, [this_machine()])


def check_lent(config: RunConfig) -> None:
    """Refuse a placement group for a run that needs places of its own. Raises PlacementError."""
    if not config.algorithm.needs.rollouts:
        why = f"algorithm.type={config.algorithm.type}: Ray Train places its workers itself"
    elif config.rollout.most_replicas != config.rollout.least_replicas:
        why = "rollout.replicas: replicas that join while it is on need places beside the group"
    elif config.warm_start is not None:
        why = f"warm_start={config.warm_start}: train that first, and give its result as model.policy.path"
    else:
        return
    raise PlacementError(f"placement_group: this run cannot live in one; {why}")


def check_bundles(plan: PlacementPlan, group: PlacementGroup) -> None:
    """Refuse a placement group whose bundles do not hold the plan's, one by one. Raises PlacementError."""
    given = group.bundle_specs
    for number, wanted in enumerate(plan.bundles):
        has = given[number] if number < len(given) else {}
        if any(has.get(name, 0) < amount for name, amount in wanted.items()):
            raise PlacementError(
                f"placement_group: bundle {number} has {has or 'nothing'}, the run needs {wanted} there; "
                f"all it needs, in order: {list(plan.bundles)}"
            )


def check_sockets(folder: str) -> None:
    """Refuse a temporary folder below which Ray cannot make its sockets. Raises PlacementError."""
    longest = f"{folder}/session_2000-01-01_00-00-00_000000_{2**22}/sockets/plasma_store"
    if len(os.fsencode(longest)) > SOCKET_BYTES:
        spare = SOCKET_BYTES - len(longest) + len(folder) - len("/ray")
        raise PlacementError(
            f"TMPDIR: {folder} is too long for Ray's sockets, which end at {SOCKET_BYTES} characters; set "
            f"RAY_TMPDIR to a folder of at most {spare} characters, such as /tmp"
        )


def _placed(config: RunConfig, alive: list[Node]) -> PlacementPlan:
    nodes = present_or_promised(config, alive)
    device = resolve_device(total_gpus(nodes)) if config.placement.device == "auto" else config.placement.device
    plan = bundles(config, device)
    check_against(plan, nodes)
    return plan


def rollouts_only(plan: PlacementPlan) -> PlacementPlan:
    """The rollout engines in bundles of their own size: for SFT, Ray Train reserves the learners' itself."""
    slots = plan.roles["rollout"]
    return replace(
        plan,
        bundles=tuple(dict(slot.resources) for slot in slots),
        roles={"rollout": tuple(slot._replace(bundle=i) for i, slot in enumerate(slots))},
    )


@dataclass
class WorkerGroups:
    """Running actor groups. `policy` and `discriminator` are None where the algorithm has none."""

    monitor: ProcessMonitor
    device: str
    rollouts: RolloutWorkers
    policy: PolicyWorkers | None
    discriminator: DiscriminatorWorkers | None
    spawn_rollout: Spawn
    """Makes a process for one more rollout replica."""

    def finished(self, step: int) -> None:
        """Tell every group the newest finished step, for their failure reports."""
        for workers in (self.rollouts, self.policy, self.discriminator):
            if workers is not None:
                workers.last_step = step

    def close(self) -> None:
        """End a healthy run: the engines close themselves, the placement group takes the rest with it."""
        for workers in (self.rollouts, self.policy, self.discriminator):
            if workers is not None:
                workers.close()
        with suppress(HeadAway):  # the bundles then end with this driver
            ask(self.monitor.release, patience())


def start_worker_groups(
    prepared: Prepared, plan: PlacementPlan, monitor: ProcessMonitor, folder: Path
) -> WorkerGroups:
    """Reserve the plan's bundles and start its roles (of SFT only the rollout engine, for evaluation).

    Whatever fails, the process monitor knows what there is to end.

    Args:
        folder: the run's, which all nodes must see.
    """
    config = prepared.config
    device: Literal["cpu", "cuda"] = "cuda" if plan.device == "gpu" else "cpu"
    if not config.algorithm.needs.rollouts:
        plan = rollouts_only(plan)
    monitor.groups.append(monitor.lent or reserve(plan, config.timeouts.placement_seconds))
    pad_ids = (prepared.policy_renderer.pad_id, prepared.reader.renderer.pad_id)
    roles: dict[str, tuple[type[RankActor], Mapping[str, str], tuple[object, ...]]] = {
        "rollout": (
            RolloutActor, rollout_environment(config, device), (prepared.policy_path, device)
        ),
        "policy": (
            PolicyActor, learner_environment(config, "policy", device),
            (prepared.policy_path, pad_ids[0], device),
        ),
        "discriminator": (
            DiscriminatorActor, learner_environment(config, "discriminator", device),
            (prepared.discriminator_path, pad_ids[1], device),
        ),
    }  # fmt: skip
    created = {
        role: create_processes(role, roles[role][0], plan, monitor, roles[role][1], (config, *roles[role][2]))
        for role in plan.roles
    }
    processes = start_processes(created, monitor, config.timeouts.start_seconds)
    models = {
        "model.policy.path": prepared.policy_path,
        "model.discriminator.path": prepared.discriminator_path,
    }
    with planted(folder) as sign:
        check_shared(monitor, sign, models, config.timeouts.start_seconds)

    def spawn(rank: int, group: PlacementGroup, slot: Slot) -> ActorProcess:
        kind, environment, arguments = roles["rollout"]
        marked = {**environment, **monitor.mark("rollout", rank)}
        return create_process("rollout", kind, rank, group, slot, marked, (config, *arguments))

    groups = WorkerGroups(
        monitor,
        device,
        RolloutWorkers(processes["rollout"], config, prepared.policy_renderer),
        PolicyWorkers(processes["policy"], config) if "policy" in processes else None,
        DiscriminatorWorkers(processes["discriminator"], config) if "discriminator" in processes else None,
        spawn,
    )
    for workers in (groups.rollouts, groups.policy, groups.discriminator):
        if workers is not None:
            workers.monitor = monitor
    return groups
