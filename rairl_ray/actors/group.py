"""Ray actors of one role as one object: started in order, called together, judged by their first failure.

The driver sees typed verbs (`PolicyGroup.update`), never ranks. Rank 0 is made first and hands out the
rendezvous. Every wait has a deadline; whatever goes wrong surfaces as ONE `GroupFailure` that names role,
rank, node, phase and the last finished step.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rairl_ray.actors.placement import Plan
from rairl_ray.errors import PlacementError, RunFailure, UserError

R = TypeVar("R")


class GroupFailure(RunFailure):
    """An actor died, raised or missed its deadline. The group is unusable afterwards."""


@dataclass(frozen=True)
class Member:
    """One rank: its handle and where it lives."""

    rank: int
    handle: Any
    node: str
    pid: int


@dataclass(frozen=True)
class Pending:
    """A verb that was started on some ranks and not waited for yet."""

    phase: str
    deadline_seconds: float
    refs: Mapping[ray.ObjectRef, Member]


class RankActor:
    """What every actor of ours answers. Subclasses are wrapped by `ray.remote` when the group starts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def whereabouts(self) -> tuple[str, int]:
        """(node address, process id)"""
        return ray.util.get_node_ip_address(), os.getpid()

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port on this rank's node, for the group's collectives."""
        with socket.socket() as sock:
            sock.bind(("", 0))
            return ray.util.get_node_ip_address(), sock.getsockname()[1]


class ActorGroup:
    """N actors of one role. Use the subclasses with their verbs."""

    def __init__(self, role: str, members: Sequence[Member]) -> None:
        self.role = role
        self.members = list(members)
        self.last_step = 0
        """Newest step that the driver finished with this group; failures name it."""

    def __len__(self) -> int:
        return len(self.members)

    def call(
        self,
        phase: str,
        deadline_seconds: float,
        verb: Callable[[Any, int], ray.ObjectRef],
        ranks: int | None = None,
    ) -> list[Any]:
        """Run `verb(handle, rank)` on all ranks (or the first `ranks`) and return their results in rank order.

        Raises:
            GroupFailure: at the first rank that fails, or for the ranks that are silent at the deadline.
            UserError: raised inside an actor comes out as itself.
        """
        return self.wait(self.submit(phase, deadline_seconds, verb, ranks))

    def submit(
        self,
        phase: str,
        deadline_seconds: float,
        verb: Callable[[Any, int], ray.ObjectRef],
        ranks: int | None = None,
    ) -> Pending:
        """Start `verb` on the ranks without waiting; an actor runs what it was given in order."""
        members = self.members[:ranks]
        return Pending(phase, deadline_seconds, {verb(m.handle, m.rank): m for m in members})

    def wait(self, pending: Pending) -> list[Any]:
        """Results of `submit` in rank order; its deadline counts from here. Raises as `call` does."""
        refs, phase = pending.refs, pending.phase
        results: dict[int, Any] = {}
        open_refs = list(refs)
        deadline = time.monotonic() + pending.deadline_seconds
        while open_refs:
            done, open_refs = ray.wait(open_refs, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                silent = ", ".join(self._name(refs[ref]) for ref in open_refs)
                raise GroupFailure(
                    f"{self.role}: no answer within {pending.deadline_seconds:g} s in phase {phase} "
                    f"(last finished step {self.last_step}) from {silent}"
                )
            member = refs[done[0]]
            try:
                results[member.rank] = ray.get(done[0])
            except UserError:
                raise
            except ray.exceptions.RayTaskError as error:
                cause = error.cause if isinstance(error.cause, BaseException) else error
                if isinstance(cause, UserError):
                    raise cause from None
                raise GroupFailure(self._report(member, phase, f"{type(cause).__name__}: {cause}")) from error
            except ray.exceptions.RayError as error:
                raise GroupFailure(self._report(member, phase, _in_one_line(error))) from error
        return [results[member.rank] for member in refs.values()]

    def close(self) -> None:
        """End all actors at once; what they hold is lost."""
        for member in self.members:
            ray.kill(member.handle, no_restart=True)
        self.members = []

    def _name(self, member: Member) -> str:
        return f"rank {member.rank} (node {member.node}, pid {member.pid})"

    def _report(self, member: Member, phase: str, cause: str) -> str:
        return (
            f"{self.role}: {self._name(member)} failed in phase {phase}, "
            f"last finished step {self.last_step}: {cause}"
        )


def start_members(
    role: str,
    actor_class: type[RankActor],
    plan: Plan,
    group: PlacementGroup,
    environment: Mapping[str, str],
    arguments: Callable[[int], tuple[Any, ...]],
    deadline_seconds: float,
) -> list[Member]:
    """Create the role's actors in their bundles, all at once, and wait until each has answered.

    Args:
        environment: variables that must be set before the process imports its heavy library.
        arguments: rank -> positional constructor arguments after `rank`.
    """
    handles = []
    for rank, (bundle, resources) in enumerate(plan.roles[role]):
        others = {key: value for key, value in resources.items() if key not in ("CPU", "GPU")}
        options = ray.remote(actor_class).options(
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            resources=others or None,
            max_restarts=0,
            runtime_env={"env_vars": dict(environment)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=True
            ),
        )
        handles.append(options.remote(rank, *arguments(rank)))
    members = [Member(rank, handle, "unknown", 0) for rank, handle in enumerate(handles)]
    places = ActorGroup(role, members).call(
        "start", deadline_seconds, lambda handle, _rank: handle.whereabouts.remote()
    )
    return [Member(m.rank, m.handle, node, pid) for m, (node, pid) in zip(members, places, strict=True)]


def reserve(plan: Plan, deadline_seconds: float) -> PlacementGroup:
    """Take the plan's bundles from the cluster.

    Raises:
        PlacementError: when the cluster does not grant them within the deadline.
    """
    group = placement_group(list(plan.bundles), strategy=plan.strategy)
    if not group.wait(timeout_seconds=deadline_seconds):
        remove_placement_group(group)
        raise PlacementError(
            f"placement: the cluster did not grant {list(plan.bundles)} within {deadline_seconds:g} s; "
            f"it has {ray.available_resources()} free: wait for other jobs or ask for less"
        )
    return group


def release(group: PlacementGroup) -> None:
    """Give the bundles back; actors in them end."""
    remove_placement_group(group)


def _in_one_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return " ".join(line.strip() for line in text.splitlines()[:12])
