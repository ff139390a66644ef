"""The machines of a run: a Ray connection, one placement group, and the actor groups in it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import ray
from ray.util.placement_group import PlacementGroup

from rairl_ray.actors.discriminator import DiscriminatorActor, DiscriminatorWorkers
from rairl_ray.actors.group import Member, RankActor, release, reserve, start_members
from rairl_ray.actors.learner import learner_environment
from rairl_ray.actors.placement import Plan, bundles, check_against, resolve_device
from rairl_ray.actors.policy import PolicyActor, PolicyWorkers
from rairl_ray.actors.rollout import RolloutActor, RolloutWorkers, rollout_environment
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import PlacementError
from rairl_ray.trainer.prepare import Prepared


@contextmanager
def cluster(config: RunConfig) -> Iterator[None]:
    """Join or start Ray; what we started is gone afterwards, what we joined is left as it was."""
    if ray.is_initialized():
        yield
        return
    address = config.cluster.address
    try:
        ray.init(
            address=address or "local",
            namespace=f"rairl-{uuid.uuid4().hex[:12]}",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address else {"include_dashboard": False, "num_cpus": os.cpu_count()}),
        )
    except ConnectionError as error:
        raise PlacementError(
            f"cluster.address={address}: no Ray cluster answers there ({str(error).splitlines()[0]}); "
            "start one with `ray start --head`, or leave the key out for a private one"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def place(config: RunConfig) -> Plan:
    """The run's placement on the connected cluster.

    Raises:
        PlacementError: when the cluster can never serve it, even when idle.
    """
    gpus = int(ray.cluster_resources().get("GPU", 0))
    device = resolve_device(gpus) if config.placement.device == "auto" else config.placement.device
    plan = bundles(config, device)
    check_against(plan, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    return plan


def rollouts_only(plan: Plan) -> Plan:
    """The rollout engines in bundles of their own size: for SFT, Ray Train reserves the learners' itself."""
    slots = plan.roles["rollout"]
    return replace(
        plan,
        bundles=tuple(dict(slot.resources) for slot in slots),
        roles={"rollout": tuple(slot._replace(bundle=i) for i, slot in enumerate(slots))},
    )


@dataclass
class Parts:
    """Running actor groups. `policy` and `discriminator` are None where the algorithm has none."""

    group: PlacementGroup
    device: str
    rollouts: RolloutWorkers
    policy: PolicyWorkers | None
    discriminator: DiscriminatorWorkers | None

    def finished(self, step: int) -> None:
        """Tell every group the newest finished step, for their failure reports."""
        for workers in (self.rollouts, self.policy, self.discriminator):
            if workers is not None:
                workers.last_step = step

    def close(self) -> None:
        for workers in (self.rollouts, self.policy, self.discriminator):
            if workers is not None:
                workers.close()
        release(self.group)


def start_parts(prepared: Prepared, plan: Plan) -> Parts:
    """Reserve the plan's bundles and start its roles (of SFT only the rollout engine, for evaluation)."""
    config = prepared.config
    device: Literal["cpu", "cuda"] = "cuda" if plan.device == "gpu" else "cpu"
    threads = config.placement.threads_per_actor or os.cpu_count() or 1
    if config.algorithm.type == "sft":
        plan = rollouts_only(plan)
    group = reserve(plan, config.timeouts.placement_seconds)
    learners = learner_environment(config, device, threads)

    def start(
        role: str, actor: type[RankActor], environment: Mapping[str, str], *arguments: object
    ) -> list[Member]:
        return start_members(
            role,
            actor,
            plan,
            group,
            environment,
            lambda _rank: (config, *arguments),
            config.timeouts.start_seconds,
        )

    try:
        environment = rollout_environment(config, device, threads)
        members = start("rollout", RolloutActor, environment, prepared.policy_path, device)
        parts = Parts(group, device, RolloutWorkers(members, config, prepared.policy_renderer), None, None)
        if "policy" in plan.roles:
            pad_id = prepared.policy_renderer.pad_id
            members = start("policy", PolicyActor, learners, prepared.policy_path, pad_id, device)
            parts.policy = PolicyWorkers(members, config)
        if "discriminator" in plan.roles:
            pad_id = prepared.reader.renderer.pad_id
            members = start(
                "discriminator", DiscriminatorActor, learners, prepared.discriminator_path, pad_id, device
            )
            parts.discriminator = DiscriminatorWorkers(members, config)
    except BaseException:
        release(group)
        raise
    return parts
