"""Watches the processes of one attempt at a run, wherever they live: what state each is in, and its sure end.

A collective makes all its ranks silent when one of them stops, and Ray cannot tell a stopped process from a
busy one. So each process carries a mark in its environment, which its children inherit, and a zero-CPU
task on each node looks at the processes themselves. A node that does not answer is itself an answer.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psutil
import ray
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rairl_ray.actors.draining import draining_nodes
from rairl_ray.actors.head import HeadAway, ask, check_own, insist, living_nodes, own_node_ended, patience

R = TypeVar("R")

MARK = "RAIRL_MEMBER"
"""Environment variable of every process of a run's actors: ATTEMPT/ROLE/RANK."""

ANY_RANK = -1
"""In the mark of processes that learn their rank only later (Ray Train's workers)."""

OWN_SECONDS = 5.0
"""How long a look takes at most at an actor process whose failure explains itself."""

RUNNING, STOPPED, GONE, NOT_STARTED = "running", "stopped", "gone", "not started"
DISK, SILENT_NODE, LOST_NODE = "waiting for a disk", "on a silent node", "on a lost node"
FAULTS = (STOPPED, GONE, LOST_NODE, SILENT_NODE, NOT_STARTED)
"""States that explain a failure, the surest first."""


@dataclass(frozen=True)
class ActorProcess:
    """One rank: its handle (None where Ray Train holds it) and where it lives."""

    role: str
    rank: int
    handle: Any
    node: str = "unknown"
    pid: int = 0
    node_id: str = ""

    @property
    def name(self) -> str:
        return f"{self.role} rank {self.rank} (node {self.node}, pid {self.pid})"


@dataclass(frozen=True)
class Seen:
    """A marked process as a look at its node found it."""

    role: str
    rank: int
    pid: int
    state: str


@dataclass
class ProcessMonitor:
    """The actor processes of one attempt, its placement groups, and the tasks that look at their processes."""

    probe_seconds: float
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    groups: list[PlacementGroup] = field(default_factory=list)
    lent: PlacementGroup | None = None
    """One that the run was given, among `groups` once it is used: its actors end with the attempt, it stays."""
    processes: dict[tuple[str, int], ActorProcess] = field(default_factory=dict)

    def mark(self, role: str, rank: int) -> dict[str, str]:
        """What the process of this rank must have in its environment."""
        return {MARK: f"{self.attempt}/{role}/{rank}"}

    def add(self, actor: ActorProcess) -> None:
        """Enter an actor process, or what has become known of it."""
        self.processes[actor.role, actor.rank] = actor

    def remove(self, actor: ActorProcess) -> None:
        """Forget an actor process that has left."""
        self.processes.pop((actor.role, actor.rank), None)

    def states(self, only: ActorProcess | None = None) -> dict[tuple[str, int], str]:
        """(role, rank) -> state of its process, within `probe_seconds` whatever has happened to the nodes.

        Args:
            only: of this actor process alone, within OWN_SECONDS.

        Raises:
            Stranded: no node can be asked from here.
        """
        processes = self.processes if only is None else {(only.role, only.rank): only}
        if not processes:
            return {}
        check_own()
        alive, holding = insist(lambda: (living_nodes(), self._nodes()))
        asked = holding if only is None else {only.node_id}
        seconds = self.probe_seconds if only is None else min(OWN_SECONDS, self.probe_seconds)
        found = _on_nodes(asked & alive, look, self.attempt, seconds)
        claimed = {actor.pid for actor in self.processes.values()}
        return {
            key: _state_elsewhere(actor, found, asked - alive) or _state(actor, found, claimed)
            for key, actor in processes.items()
        }

    def end(self, seconds: float) -> list[str]:
        """End every process of the attempt and give its bundles back; says what could not be confirmed.

        Removing a placement group kills what runs in it, stopped processes too. Tasks on the nodes then kill
        what is left (children of actors, what Ray Train started) and see for themselves that it is gone.
        """
        if not self.groups and not self.processes:
            return []

        def give_back() -> tuple[set[str], set[str]]:
            nodes = self._nodes()
            self.release()
            return nodes, living_nodes()

        try:
            nodes, alive = ask(give_back, patience())
        except HeadAway:
            return ["the cluster's head does not answer: bundles and processes end with this driver"]
        if own_node_ended():
            return ["the node of this driver has ended: the processes on others were not seen to end"]
        answers = _on_nodes(nodes & alive, kill, self.attempt, seconds)
        left = [f"node {node[:8]} is lost: its processes end with its raylet" for node in nodes - alive]
        for node, pids in answers.items():
            if pids is None:
                left.append(f"node {node[:8]} does not answer: its processes were not seen to end")
            left += [f"pid {pid} on node {node[:8]} survived SIGKILL" for pid in pids or ()]
        return left

    def end_process(self, actor: ActorProcess, seconds: float) -> None:
        """End the processes of one actor process, stopped or not, and leave all others alone."""
        with suppress(ray.exceptions.RayError):
            ray.kill(actor.handle, no_restart=True)
        alive = insist(living_nodes)
        of = (actor.role, actor.rank)
        _on_nodes({actor.node_id} & alive, lambda attempt: kill(attempt, of=of), self.attempt, seconds)

    def release(self) -> None:
        """Give the bundles back; the actors in them end."""
        for group in self.groups:
            if group != self.lent:
                remove_placement_group(group)
        if self.lent in self.groups:
            for actor in self.processes.values():
                with suppress(ray.exceptions.RayError):
                    ray.kill(actor.handle, no_restart=True)
        self.groups, self.processes = [], {}

    def draining(self) -> set[str]:
        """Ids of nodes that hold an actor process and are about to go."""
        return draining_nodes() & {actor.node_id for actor in self.processes.values()}

    def _nodes(self) -> set[str]:
        """Nodes that hold a bundle or an actor process."""
        nodes = {actor.node_id for actor in self.processes.values()}
        for group in self.groups:
            nodes |= set(placement_group_table(group).get("bundles_to_node_id", {}).values())
        return nodes - {""}


def _state_elsewhere(actor: ActorProcess, found: Mapping[str, list[Seen] | None], lost: set[str]) -> str | None:
    """The state that an actor process has because its node cannot be asked; None where it could."""
    if actor.node_id in lost:
        return LOST_NODE
    return SILENT_NODE if actor.node_id and found.get(actor.node_id) is None else None


def _state(actor: ActorProcess, found: Mapping[str, Sequence[Seen] | None], claimed: set[int]) -> str:
    nodes = [actor.node_id] if actor.node_id else list(found)
    own = [seen for node in nodes for seen in found[node] or () if seen.role == actor.role]
    if actor.pid:
        own = [process for process in own if process.pid == actor.pid]
    else:
        own = [process for process in own if process.rank in (actor.rank, ANY_RANK)]
        own = [process for process in own if process.pid not in claimed]
    states = [process.state for process in own] or [GONE if actor.pid else NOT_STARTED]
    return min(states, key=lambda state: (state not in FAULTS, state))


def look(attempt: str) -> list[Seen]:
    """Runs on a node: the attempt's marked processes there, without their children."""
    marked = _marked(attempt)
    pids = {process.pid for process, _, _ in marked}
    seen = []
    for process, role, rank in marked:
        try:
            if process.ppid() in pids:
                continue
            status = process.status()
        except psutil.NoSuchProcess:
            continue
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            continue
        stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        waits = DISK if status == psutil.STATUS_DISK_SLEEP else RUNNING
        seen.append(Seen(role, rank, process.pid, STOPPED if stopped else waits))
    return seen


def kill(attempt: str, seconds: float = 10.0, of: tuple[str, int] | None = None) -> list[int]:
    """Runs on a node: SIGKILL to the attempt's processes there (`of`: to those of one role and rank); the ids
    of those that remain."""
    deadline = time.monotonic() + seconds
    while True:
        processes = [process for process, *whose in _marked(attempt) if of in (None, tuple(whose))]
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        _, left = psutil.wait_procs(processes, timeout=max(0.0, deadline - time.monotonic()))
        # Once more: a killed process may have had a child meanwhile.
        if not processes or left:
            return [process.pid for process in left]


def _marked(attempt: str) -> list[tuple[psutil.Process, str, int]]:
    """(process, role, rank) of this node's processes with the attempt's mark."""
    marked = []
    for process in psutil.process_iter():
        try:
            mark = "" if process.status() == psutil.STATUS_ZOMBIE else process.environ().get(MARK, "")
        except (psutil.Error, OSError):
            continue
        found, _, actor = mark.partition("/")
        role, _, rank = actor.rpartition("/")
        if found == attempt:
            marked.append((process, role, int(rank)))
    return marked


def _on_nodes(
    nodes: set[str], function: Callable[[str], R], attempt: str, seconds: float
) -> dict[str, R | None]:
    """The function's answer from each node; None from a node that is silent until the deadline."""
    task = ray.remote(function)
    refs = {}
    for node in sorted(nodes):
        pinned = NodeAffinitySchedulingStrategy(node, soft=False)
        refs[task.options(num_cpus=0, max_retries=0, scheduling_strategy=pinned).remote(attempt)] = node
    answers: dict[str, R | None] = dict.fromkeys(refs.values())
    if not refs:
        return answers
    done, silent = ray.wait(list(refs), num_returns=len(refs), timeout=seconds)
    for ref in done:
        try:
            answers[refs[ref]] = ray.get(ref, timeout=seconds)
        except ray.exceptions.RayError:
            continue
    for ref in silent:
        ray.cancel(ref, force=True)
    return answers
