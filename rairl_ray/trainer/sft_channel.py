"""Messages between SFT's workers and the driver while Ray Train holds the workers.

The channel is also an attempt's licence: whoever cannot reach it any more belongs to an attempt that was torn
down, and ends before it touches the run folder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rairl_ray.actors.group import ActorGroup, RankActor, whereabouts
from rairl_ray.actors.process_monitor import ActorProcess, ProcessMonitor
from rairl_ray.config.machine_schema import Timeouts


class Message(NamedTuple):
    """From a worker.

    `kind`: joined, phase, restored, update, written, unwritable, event, finished, failed.
    """

    kind: str
    step: int
    content: Any = None


class Joined(NamedTuple):
    """A worker that has started: where it lives and the placement group that Ray Train made for it."""

    rank: int
    place: tuple[str, int, str]
    group: PlacementGroup | None


class SftChannelActor(RankActor):
    """Messages in the order of their arrival, and whether the driver wants the workers to stop."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self._messages: list[Message] = []
        self._stop = False

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        """What has come since the last time."""
        messages, self._messages = self._messages, []
        return messages

    def ask_to_stop(self) -> None:
        self._stop = True

    def asked_to_stop(self) -> bool:
        return self._stop


class SftChannel(ActorGroup):
    """The driver's side."""

    def __init__(self, monitor: ProcessMonitor, timeouts: Timeouts) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        handle = (
            ray.remote(SftChannelActor)
            .options(
                num_cpus=0,
                max_restarts=0,
                runtime_env={"env_vars": monitor.mark("channel", 0)},
                scheduling_strategy=here,
            )
            .remote(0)
        )
        process = ActorProcess("channel", 0, handle)
        monitor.add(process)
        super().__init__("channel", [process], monitor)
        self._seconds = timeouts.sync_seconds
        place = self.call("start", timeouts.start_seconds, lambda actor, _rank: actor.whereabouts.remote())[0]
        self.processes = [ActorProcess("channel", 0, handle, *place)]
        monitor.add(self.processes[0])

    @property
    def handle(self) -> Any:
        """What the workers get."""
        return self.processes[0].handle

    def take(self) -> list[Message]:
        return self.call("channel", self._seconds, lambda actor, _rank: actor.take.remote())[0]

    def ask_to_stop(self) -> None:
        self.call("channel", self._seconds, lambda actor, _rank: actor.ask_to_stop.remote())


class WorkerSide:
    """A worker's side; each wait is bounded, and a channel that is gone ends the worker."""

    def __init__(self, handle: Any, timeouts: Timeouts) -> None:
        self._handle, self._seconds = handle, timeouts.sync_seconds

    def join(self, rank: int) -> None:
        self.send("joined", 0, Joined(rank, whereabouts(), get_current_placement_group()))

    def send(self, kind: str, step: int, content: Any = None) -> None:
        ray.get(self._handle.put.remote(Message(kind, step, content)), timeout=self._seconds)

    def asked_to_stop(self) -> bool:
        return ray.get(self._handle.asked_to_stop.remote(), timeout=self._seconds)
