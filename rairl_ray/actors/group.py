"""Ray actors of one role as one object: started in order, called together, judged by their first failure.

The driver sees typed verbs (`PolicyWorkers.update`), never ranks. Rank 0 is made first and hands out the
rendezvous. Every wait has a deadline; whatever goes wrong surfaces as ONE `GroupFailure` that names role,
rank, node, phase and the last finished step.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rairl_ray.actors.head import ANEW_SECONDS, Stranded, check_own, insist, never_stranded
from rairl_ray.actors.placement import PlacementPlan, Slot
from rairl_ray.actors.process_monitor import FAULTS, ActorProcess, ProcessMonitor
from rairl_ray.errors import PlacementError, RunFailure, UserError
from rairl_ray.files import unseen

LOOK_SECONDS = 0.5
"""Between two looks at whether a wait is still wanted."""

LONGEST_PAUSE_SECONDS = 300.0

LAST_LOOK_SECONDS = 1.0
"""Least time that a wait gives to answers which came while the driver was busy elsewhere."""


class GroupFailure(RunFailure):
    """An actor died, raised or missed its deadline. The group is unusable afterwards.

    `role`, `rank` and `node` are the culprit's as far as it could be found: in a collective all ranks fall
    silent when one stops, and a dead learner may show in a rollout engine that waits for its weights.
    `state` is that of the culprit's process (process_monitor.py), where it was looked at.
    `waited_seconds` runs from the failed call's start to here, the look at the processes included.
    """

    def __init__(
        self,
        text: str,
        *,
        role: str = "",
        rank: int | None = None,
        node: str = "",
        phase: str = "",
        last_step: int = 0,
        waited_seconds: float = 0.0,
        state: str = "",
    ) -> None:
        super().__init__(text)
        self.role, self.rank, self.node = role, rank, node
        self.phase, self.last_step, self.waited_seconds = phase, last_step, waited_seconds
        self.state = state


@dataclass(eq=False)
class Pending:
    """A call that all its ranks have been given, with the answers that have come so far."""

    phase: str
    deadline_seconds: float
    refs: dict[ray.ObjectRef, ActorProcess]
    """Still without an answer."""
    submitted: float
    results: dict[int, Any] = field(default_factory=dict)


class Interrupted(Exception):
    """A wait was given up because a stop was asked for; the actors are still at work on the call."""


class RankActor:
    """What every actor of ours answers. Subclasses are wrapped by `ray.remote` when the group starts."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def whereabouts(self) -> tuple[str, int, str]:
        """(node address, process id, Ray's node id)"""
        return whereabouts()

    def unseen(self, paths: Sequence[str]) -> list[str]:
        """Those of the paths that this rank's node does not see."""
        return unseen(paths)

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port on this rank's node, for the group's collectives."""
        with socket.socket() as sock:
            sock.bind(("", 0))
            return ray.util.get_node_ip_address(), sock.getsockname()[1]


def whereabouts() -> tuple[str, int, str]:
    """(node address, process id, Ray's node id) of the calling process."""
    return ray.util.get_node_ip_address(), os.getpid(), ray.get_runtime_context().get_node_id()


class ActorGroup:
    """N actors of one role. Use the subclasses with their verbs."""

    by_themselves: frozenset[str] = frozenset()
    """Phases in which a rank waits for no other process, so that its failure is its own."""

    def __init__(
        self, role: str, processes: Sequence[ActorProcess], monitor: ProcessMonitor | None = None
    ) -> None:
        self.role = role
        self.processes = list(processes)
        self.monitor = monitor
        """Where a failure finds its culprit; without one the first silent rank is named."""
        self.last_step = 0
        """Newest step that the driver finished with this group; failures name it."""
        self._queue: list[Pending] = []

    def __len__(self) -> int:
        return len(self.processes)

    def call(
        self,
        phase: str,
        deadline_seconds: float,
        verb: Callable[[Any, int], ray.ObjectRef],
        ranks: int | None = None,
    ) -> list[Any]:
        """`submit` and `wait`: run `verb(handle, rank)` on all ranks (or the first `ranks`)."""
        return self.wait(self.submit(phase, deadline_seconds, verb, ranks))

    def submit(
        self,
        phase: str,
        deadline_seconds: float,
        verb: Callable[[Any, int], ray.ObjectRef],
        ranks: int | None = None,
    ) -> Pending:
        """Give `verb(handle, rank)` to the ranks, which run it after what they were given before.

        An actor does one thing after another, so the call's clock starts when it can run: now, or when
        the group's earlier calls have answered. Their deadlines add up; none eats another's.
        """
        refs = {verb(process.handle, process.rank): process for process in self.processes[:ranks]}
        pending = Pending(phase, deadline_seconds, refs, time.monotonic())
        self._queue.append(pending)
        return pending

    def wait(self, pending: Pending, unless: Callable[[], bool] | None = None) -> list[Any]:
        """The results of a call in rank order. Calls submitted earlier are waited for first and keep theirs.

        Args:
            unless: asked while nothing has come; the wait is given up once it says True.

        Raises:
            GroupFailure: at the first rank that fails, or for the ranks that are silent at the deadline.
            UserError: raised inside an actor comes out as itself.
            Interrupted: the wait was given up.
        """
        started = pending.submitted
        while pending in self._queue:
            first = self._queue[0]
            try:
                self._finish(first, max(started, first.submitted), unless)
            finally:
                self._queue.remove(first)  # a failure is told once
            started = time.monotonic()
        return [pending.results[rank] for rank in sorted(pending.results)]

    def _finish(self, pending: Pending, started: float, unless: Callable[[], bool] | None) -> None:
        """Wait until every rank has answered this one call, whose clock started at `started`."""
        deadline = max(started + pending.deadline_seconds, time.monotonic() + LAST_LOOK_SECONDS)
        while pending.refs:
            if unless is not None and unless():
                raise Interrupted(f"{self.role}: no longer waited for in phase {pending.phase}")
            left = max(0.0, deadline - time.monotonic())
            look = left if unless is None else min(left, LOOK_SECONDS)
            done, _ = ray.wait(list(pending.refs), num_returns=1, timeout=look)
            if not done and look < left:
                continue
            if not done:
                raise self._silence(pending, started)
            process = pending.refs[done[0]]
            try:
                # The answer exists; fetching it from another node is a wait of its own.
                pending.results[process.rank] = ray.get(done[0], timeout=pending.deadline_seconds)
            except ray.exceptions.RayTaskError as error:  # of its cause's class, too; its text is a traceback
                cause = error.cause if isinstance(error.cause, BaseException) else error
                if isinstance(cause, UserError):
                    raise cause from None
                text = in_one_line(f"{type(cause).__name__}: {cause}")
                raise self._failure(pending, process, text, started) from error
            except ray.exceptions.RayError as error:
                text = in_one_line(str(error)) or type(error).__name__
                raise self._failure(pending, process, text, started) from error
            del pending.refs[done[0]]

    def forget(self) -> None:
        """Wait no longer for what was submitted; a later call's clock starts at once."""
        self._queue.clear()

    def close(self) -> None:
        """End all actors at once; what they hold is lost."""
        for process in self.processes:
            ray.kill(process.handle, no_restart=True)
        self.processes = []

    # --- who is to blame ---------------------------------------------------------------------------

    def _silence(self, pending: Pending, started: float) -> GroupFailure:
        silent = list(pending.refs.values())
        text = (
            f"{self.role}: no answer within {pending.deadline_seconds:g} s in phase {pending.phase} "
            f"(last finished step {self.last_step}) from {', '.join(process.name for process in silent)}"
        )
        return attribute_failure(text, silent[0], self.monitor, pending.phase, self.last_step, started)

    def _failure(self, pending: Pending, process: ActorProcess, cause: str, started: float) -> GroupFailure:
        text = (
            f"{process.name} failed in phase {pending.phase}, last finished step {self.last_step}: "
            f"{cause.rstrip('.')}"
        )
        own = pending.phase in self.by_themselves
        return attribute_failure(text, process, self.monitor, pending.phase, self.last_step, started, own)


def attribute_failure(
    text: str,
    suspect: ActorProcess,
    monitor: ProcessMonitor | None,
    phase: str,
    last_step: int,
    started: float,
    own: bool = False,
) -> GroupFailure:
    """The failure, with the culprit that the processes themselves show, else with the suspect.

    Args:
        started: `time.monotonic()` at which the wait began that failed.
        own: nobody but the suspect can be the culprit, so nobody else is looked at.

    Raises:
        Stranded: this driver's own node, or the head, is the culprit.
    """
    try:
        states = monitor.states(suspect if own else None) if monitor is not None else {}
    except Stranded as error:
        raise Stranded(f"{error}; first seen as: {text}") from None
    told = ", ".join(f"{role} rank {rank} {state}" for (role, rank), state in sorted(states.items()))
    # A fault among the suspect's own ranks explains a failure before one elsewhere.
    faulty = sorted(
        (key for key, state in states.items() if state in FAULTS),
        key=lambda key: (key[0] != suspect.role, FAULTS.index(states[key]), key),
    )
    if monitor is not None and faulty:
        suspect = monitor.processes[faulty[0]]
        text = f"{suspect.name} is {states[faulty[0]]}. {text}"
    return GroupFailure(
        f"{text}. Processes: {told}" if told else text,
        role=suspect.role,
        rank=suspect.rank,
        node=suspect.node,
        phase=phase,
        last_step=last_step,
        waited_seconds=time.monotonic() - started,
        state=states.get((suspect.role, suspect.rank), ""),
    )


def create_processes(
    role: str,
    actor_class: type[RankActor],
    plan: PlacementPlan,
    monitor: ProcessMonitor,
    environment: Mapping[str, str],
    arguments: tuple[object, ...],
) -> list[ActorProcess]:
    """Create the role's actors in their bundles, without waiting for their processes.

    Args:
        environment: variables that must be set before the process imports its heavy library.
        arguments: positional constructor arguments after `rank`.
    """
    processes = []
    for rank, slot in enumerate(plan.roles[role]):
        marked = {**environment, **monitor.mark(role, rank)}
        processes.append(create_process(role, actor_class, rank, monitor.groups[0], slot, marked, arguments))
        monitor.add(processes[-1])
    return processes


def create_process(
    role: str,
    actor_class: type[RankActor],
    rank: int,
    group: PlacementGroup,
    slot: Slot,
    environment: Mapping[str, str],
    arguments: tuple[object, ...],
) -> ActorProcess:
    """Create one actor in its bundle of a placement group, which need not be there yet; waits for nothing."""
    bundle, resources = slot
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
    return ActorProcess(role, rank, options.remote(rank, *arguments))


def start_processes(
    created: Mapping[str, Sequence[ActorProcess]], monitor: ProcessMonitor, deadline_seconds: float
) -> dict[str, list[ActorProcess]]:
    """Wait until every process answers where it lives; all roles start side by side. Raises Stranded, too."""
    groups = {role: ActorGroup(role, processes, monitor) for role, processes in created.items()}
    asked = {
        role: group.submit("start", deadline_seconds, lambda handle, _rank: handle.whereabouts.remote())
        for role, group in groups.items()
    }
    started: dict[str, list[ActorProcess]] = {}
    for role, group in groups.items():
        places = group.wait(asked[role], never_stranded())
        started[role] = [
            ActorProcess(role, process.rank, process.handle, *place)
            for process, place in zip(group.processes, places, strict=True)
        ]
        for process in started[role]:
            monitor.add(process)
    return started


def reserve(plan: PlacementPlan, deadline_seconds: float) -> PlacementGroup:
    """Take the plan's bundles from the cluster.

    Raises:
        PlacementError: Ray refuses the labels, or does not grant the bundles within the deadline.
        Stranded: nothing can begin from this driver.
    """
    check_own()
    sizes, labels = list(plan.bundles), list(plan.labels)
    selectors = labels if any(labels) else None
    until = time.monotonic() + deadline_seconds
    try:
        group = insist(
            lambda: placement_group(sizes, strategy=plan.rays_strategy, bundle_label_selector=selectors)
        )
    except ValueError as error:  # GB200 for one role alone, say
        raise PlacementError(f"placement.labels: Ray refuses {labels}: {in_one_line(str(error))}") from None
    while not insist(lambda: group.wait(timeout_seconds=_slice(until))):
        if time.monotonic() < until:
            check_own()
            continue
        insist(lambda: remove_placement_group(group))
        asked = f" with labels {labels}" if any(labels) else ""
        raise PlacementError(
            f"placement: the cluster did not grant {sizes}{asked} within {deadline_seconds:g} s; "
            f"it has {insist(ray.available_resources)} free: wait for other jobs or ask for less"
        )
    return group


def _slice(until: float) -> float:
    return min(ANEW_SECONDS, max(0.0, until - time.monotonic()))


def pause_after(failures: int, first: float) -> float:
    """Seconds to wait after so many failures in a row: `first`, doubled with each, up to five minutes."""
    return min(LONGEST_PAUSE_SECONDS, first * 2 ** min(failures - 1, 30))


def in_one_line(text: str) -> str:
    """The first lines of a text, joined by blanks."""
    return " ".join(line.strip() for line in text.strip().splitlines()[:12])
