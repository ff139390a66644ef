"""The rollout replicas that a run has at the moment: who joins, who leaves, and who has to be replaced.

    room on a node ──> opening (bundle, process, engine) ──> synced, checked ──> serves
                                                                 it dies, hangs, │ its node drains
                           above `least`: leaves, the others go on  <────────────┤
                           else, while it samples: replaced in its bundle  <─────┤
                           else: a failure of the group  <───────────────────────┘

`grow` and `leave_drained` are called between two steps and wait for nothing but the sync of a replica that is
ready; while the cluster's head is away nobody joins or leaves. Samples do not depend on any of it: each request
has its own seed, and what a lost replica was asked is asked again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from rairl_ray.actors.draining import draining_nodes, notices
from rairl_ray.actors.group import GroupFailure, in_one_line, pause_after
from rairl_ray.actors.head import HeadAway, ask
from rairl_ray.actors.joining import free_nodes
from rairl_ray.actors.placement import Node, PlacementPlan, Slot, side_by_side
from rairl_ray.actors.process_monitor import LOST_NODE, SILENT_NODE, ActorProcess
from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.config.labels import OF_ONE_NODE
from rairl_ray.config.schema import RunConfig

LEAVE_SECONDS = 5.0
"""How long a replica that leaves may take to close, and its processes to end."""

SHUN_SECONDS = 120.0
"""How long nothing is asked of a node that did not answer: Ray takes up to a minute to see that it is dead, and
goes on placing there."""

GRANT_SECONDS = 30.0
"""How long a bundle may take on a node that had room for it, before it is asked for again: Ray has let one wait
for minutes that was asked for while another node was dying."""

Spawn = Callable[[int, PlacementGroup, Slot], ActorProcess]
"""(rank, placement group, slot there) -> a new process of a replica, not waited for."""


@dataclass(frozen=True)
class Place:
    """The bundle that a replica lives in."""

    group: PlacementGroup
    slot: Slot
    own: bool
    """The group holds this bundle alone and ends with the replica; else it is the run's."""

    @property
    def node_id(self) -> str:
        """Where the bundle is; empty while it is nowhere."""
        return placement_group_table(self.group).get("bundles_to_node_id", {}).get(self.slot.bundle) or ""


@dataclass(frozen=True)
class Opening:
    """A replica on its way."""

    process: ActorProcess
    place: Place
    node_id: str
    """The node that it was meant for; empty where Ray, or an autoscaler, chooses."""
    where: ray.ObjectRef
    opened: ray.ObjectRef
    begun: float = field(default_factory=time.monotonic)

    @property
    def home(self) -> str:
        return self.node_id or self.place.node_id


class RolloutPool:
    """Keeps the replicas of `workers` between `rollout.replicas` min and max; a fixed number is both."""

    def __init__(
        self,
        config: RunConfig,
        plan: PlacementPlan,
        workers: RolloutWorkers,
        spawn: Spawn,
        bring_up: Callable[[RolloutWorkers], None],
        tell: Callable[[str], None],
        replacements: int,
    ) -> None:
        """Args:
        spawn: makes a process.
        bring_up: gives a new replica the policy that the others serve, and checks it.
        tell: notes what happens.
        replacements: replicas that may be replaced; one more that is lost is a failure of the group.
        """
        assert workers.monitor is not None
        self._config, self._plan, self._workers, self._monitor = config, plan, workers, workers.monitor
        self._spawn, self._bring_up, self._tell, self._left = spawn, bring_up, tell, replacements
        self._least = len(plan.roles["rollout"])
        self._most = self._least + plan.spare
        group = self._monitor.groups[0]
        self._places = {
            process.rank: Place(group, slot, own=False)
            for process, slot in zip(workers.processes, plan.roles["rollout"], strict=True)
        }
        self._openings: list[Opening] = []
        self._next_rank = self._least
        self._failures, self._pause_ends = 0, 0.0
        self._shunned: dict[str, float] = {}
        """Node that did not answer -> until when nothing is asked of it."""
        self._owed: list[tuple[ActorProcess, Place]] = []
        """Replicas that left such nodes, to be ended later."""
        workers.lost = self.lost

    # --- between two steps -------------------------------------------------------------------------

    def grow(self) -> None:
        """Take in the replicas that are ready, and begin to open others where there is room."""
        if len(self._workers) == self._most and not self._owed:
            return
        try:
            alive, going = ask(lambda: (free_nodes(), notices()))
        except HeadAway:
            return
        self._pay(alive)
        for opening in list(self._openings):
            self._look_at(opening, alive)
        missing = self._most - len(self._workers) - len(self._openings)
        if missing <= 0 or time.monotonic() < self._pause_ends:
            return
        avoided = going | self._shunned.keys()
        free = {node: what for node, what in alive.items() if node not in avoided}
        vacant = [place for place in self._vacant() if place.node_id in free]
        bundle, selector = self._plan.spare_bundle, self._plan.selectors.get("rollout", {})
        waiting = [one.node_id for one in self._openings if one.place.own and not _granted(one.place)]
        homes = rooms(bundle, selector, free, waiting)
        if self._plan.rays_strategy == "SPREAD":
            present = [process.node_id for process in self._workers.processes]
            homes = apart(homes, [*present, *(opening.home for opening in self._openings)])
        if self._config.cluster.grows_to is not None:
            homes += [""] * missing  # a group that waits for its bundle is what an autoscaler sees
        again, more = openings(missing, len(vacant), len(homes))
        for place in vacant[:again]:
            self._open(place, place.node_id)
        for node in homes[:more]:
            asked = {**selector, **({OF_ONE_NODE: node} if node else {})}
            group = placement_group([bundle], bundle_label_selector=[asked] if asked else None)
            self._monitor.groups.append(group)
            self._open(Place(group, Slot(0, dict(bundle)), own=True), node)

    def leave_drained(self) -> None:
        """End the replicas on nodes that are about to go, where enough others stay."""
        going = draining_nodes() if self._most > self._least else set[str]()
        if not going:
            return
        for opening in [one for one in self._openings if one.home in going]:
            self._forget(opening)
        homes = {process.rank: process.node_id for process in self._workers.processes}
        for rank in departures(homes, going, self._least):
            with suppress(ray.exceptions.RayError):
                ray.wait([self._process(rank).handle.close.remote()], timeout=LEAVE_SECONDS)
            self._leave(rank, f"node {homes[rank][:8]} is being drained")

    # --- while they work ---------------------------------------------------------------------------

    def lost(self, failure: GroupFailure) -> None:
        """Let a lost replica leave, or replace it where it cannot be done without.

        Raises:
            GroupFailure: the given one, where it is not a replica's or neither may be.
        """
        if failure.role != self._workers.role or failure.rank not in self._places:
            raise failure
        if len(self._workers) > self._least:
            self._leave(failure.rank, str(failure), failure.state in (SILENT_NODE, LOST_NODE))
        elif failure.phase == "generate":
            self._replace(failure.rank, failure)
        else:
            raise failure

    def _leave(self, rank: int, why: str, silent: bool = False) -> None:
        """Args: silent: its node does not answer."""
        process, place = self._process(rank), self._places.pop(rank)
        self._workers.processes.remove(process)
        self._monitor.remove(process)
        if silent:
            self._shunned[process.node_id] = time.monotonic() + SHUN_SECONDS
            self._owed.append((process, place))
        else:
            self._end(process, place)
        self._tell(f"replica {rank} left, {len(self._workers)} go on: {why}")

    def _replace(self, rank: int, failure: GroupFailure) -> None:
        """Put a new process into the bundle of a lost replica; the learners rest while samples are due."""
        place = self._places[rank]
        if self._left < 1 or len(self._workers) < 2 or place.own:
            raise failure
        self._left -= 1
        begun, timeouts = time.monotonic(), self._config.timeouts
        index = self._workers.processes.index(self._process(rank))
        self._monitor.end_process(self._workers.processes[index], timeouts.teardown_seconds)
        made = self._workers.alone(self._spawn(rank, place.group, place.slot))
        self._monitor.add(made.processes[0])
        [where] = made.call("start", timeouts.start_seconds, lambda actor, _rank: actor.whereabouts.remote())
        one = self._workers.alone(ActorProcess(self._workers.role, rank, made.processes[0].handle, *where))
        self._monitor.add(one.processes[0])
        one.open()
        self._bring_up(one)
        self._workers.processes[index] = one.processes[0]
        spent, waited = time.monotonic() - begun, failure.waited_seconds
        self._tell(f"rollout rank {rank} replaced in {spent:.1f} s, after waiting {waited:.1f} s: {failure}")

    # --- on their way ------------------------------------------------------------------------------

    def _open(self, place: Place, node_id: str) -> None:
        """Begin to open one more; its process starts when its bundle is there."""
        rank, self._next_rank = self._next_rank, self._next_rank + 1
        process = self._spawn(rank, place.group, place.slot)
        where, opened = process.handle.whereabouts.remote(), process.handle.open.remote()
        self._openings.append(Opening(process, place, node_id, where, opened))

    def _look_at(self, opening: Opening, alive: Container[str]) -> None:
        """Let it join if it is ready; give it up if it has failed, takes too long, or its node is gone."""
        if (home := opening.home) and home not in alive:
            self._forget(opening)
            return
        done, _ = ray.wait([opening.where, opening.opened], num_returns=2, timeout=0)
        timeouts, spent = self._config.timeouts, time.monotonic() - opening.begun
        if len(done) < 2:
            known = GRANT_SECONDS if opening.node_id else timeouts.placement_seconds
            if spent > min(known, timeouts.placement_seconds) and not _granted(opening.place):
                self._forget(opening)  # somebody else was faster; there may be room another time
                self._tell(f"replica {opening.process.rank} was given no place in {spent:.0f} s")
            elif spent > timeouts.placement_seconds + timeouts.start_seconds:
                self._give_up(opening, f"is not open after {spent:.0f} s")
            return
        try:
            where, _ = ray.get([opening.where, opening.opened], timeout=timeouts.sync_seconds)
            self._join(opening, where)
        except ray.exceptions.RayError as error:
            self._give_up(opening, in_one_line(str(getattr(error, "cause", None) or error)))
        except GroupFailure as failure:
            if (failure.role, failure.phase) != (self._workers.role, "sync"):
                raise
            self._give_up(opening, str(failure))

    def _join(self, opening: Opening, where: tuple[Any, ...]) -> None:
        rank = opening.process.rank
        process = ActorProcess(self._workers.role, rank, opening.process.handle, *where)
        self._monitor.add(process)
        self._bring_up(self._workers.alone(process))
        self._openings.remove(opening)
        self._workers.processes.append(process)
        self._workers.processes.sort(key=lambda one: one.rank)
        self._places[rank] = opening.place
        self._failures = 0
        spent = time.monotonic() - opening.begun
        self._tell(
            f"replica {rank} joined from node {process.node} ({process.node_id[:8]}) after {spent:.1f} s: "
            f"{len(self._workers)} of at most {self._most} serve"
        )

    def _give_up(self, opening: Opening, why: str) -> None:
        self._forget(opening)
        self._failures += 1
        pause = pause_after(self._failures, self._config.trainer.retry_backoff_seconds)
        self._pause_ends = time.monotonic() + pause
        self._tell(f"replica {opening.process.rank} did not join, the next may begin in {pause:.0f} s: {why}")

    def _forget(self, opening: Opening) -> None:
        self._openings.remove(opening)
        self._monitor.remove(opening.process)
        ray.kill(opening.process.handle, no_restart=True)
        self._give_back(opening.place)

    def _end(self, process: ActorProcess, place: Place) -> None:
        self._monitor.end_process(process, LEAVE_SECONDS)
        self._give_back(place)

    def _give_back(self, place: Place) -> None:
        if place.own:
            self._monitor.groups.remove(place.group)
            remove_placement_group(place.group)

    def _pay(self, alive: Container[str]) -> None:
        """End what was left on nodes that are known to be dead by now, or to live."""
        now = time.monotonic()
        self._shunned = {node: until for node, until in self._shunned.items() if node in alive and until > now}
        for process, place in list(self._owed):
            if process.node_id not in self._shunned:
                self._owed.remove((process, place))
                self._end(process, place)

    def _vacant(self) -> list[Place]:
        """Bundles of the run's own group whose replica has left."""
        places = [*self._places.values(), *(opening.place for opening in self._openings)]
        taken = {place.slot.bundle for place in places if not place.own}
        slots = [slot for slot in self._plan.roles["rollout"] if slot.bundle not in taken]
        return [Place(self._monitor.groups[0], slot, own=False) for slot in slots]

    def _process(self, rank: int) -> ActorProcess:
        return next(process for process in self._workers.processes if process.rank == rank)


def rooms(
    bundle: Mapping[str, float], selector: Mapping[str, str], free: Mapping[str, Node], waiting: Sequence[str]
) -> list[str]:
    """A node for each further replica that there is room for.

    Args:
        free: node -> what is free there.
        waiting: nodes of replicas whose bundles are asked for and not granted yet.
    """
    counts = {node: side_by_side(bundle, selector, [what]) - waiting.count(node) for node, what in free.items()}
    return [node for node, count in counts.items() for _ in range(count)]


def apart(homes: Sequence[str], present: Sequence[str]) -> list[str]:
    """These nodes in an order that puts as few replicas as can be on one.

    Args:
        present: nodes of the replicas that there are.
    """
    place = [(present.count(node) + homes[:index].count(node), node) for index, node in enumerate(homes)]
    return [node for _, node in sorted(place, key=lambda one: one[0])]


def openings(missing: int, vacant: int, room: int) -> tuple[int, int]:
    """(replicas to open in bundles that the run has already, replicas to open in new ones)."""
    again = min(missing, vacant)
    return again, max(0, min(missing - again, room))


def departures(homes: Mapping[int, str], going: Iterable[str], least: int) -> list[int]:
    """The ranks that leave because their nodes go: all of those, or none where fewer than `least` would stay.

    Args:
        homes: rank -> node.
    """
    leaving = [rank for rank, node in homes.items() if node in set(going)]
    return leaving if len(homes) - len(leaving) >= least else []


def _granted(place: Place) -> bool:
    return placement_group_table(place.group).get("state") == "CREATED"
