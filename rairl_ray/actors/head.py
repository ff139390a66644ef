"""Questions to the cluster's head (Ray's GCS), which may be away: who waits how long, who can no longer go on.

Without the head, actors go on and answer each other, but whoever asks it something waits. So each question is
put in a thread of its own, and while one is open no other is put:

    `ask`        of a step, for a moment: where the head is away the step goes on without the answer
    `insist`     of what cannot go on without it: until the head has been silent for `patience`
    `check_own`  before and while something new is begun: a driver whose own node has ended can begin nothing

Ray ends a driver whose head is away for 60 s, without a word; `patience` ends a little before.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import ray

from rairl_ray.errors import RunFailure

R = TypeVar("R")

ANSWER_SECONDS = 2.0
"""How long a question of a step waits for its answer."""

RAYS_BOUND = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""Ray's own key for the seconds after which it ends a process without a head; 60 where it is not set."""

PROBE_SECONDS = 5.0
ANEW_SECONDS = 5.0
"""Between two looks at whether a wait for something new can still end well."""


class HeadAway(Exception):
    """The head has not answered in time."""


class Stranded(RunFailure):
    """This driver can begin nothing any more: a rebuild is not possible, a resume by another driver is."""


class Head:
    """The head as one process asks it."""

    def __init__(self) -> None:
        self._open: threading.Thread | None = None
        self._begun = 0.0

    def ask(self, question: Callable[[], R], seconds: float = ANSWER_SECONDS) -> R:
        """The question's answer, or what it raises.

        Args:
            seconds: from the moment at which it, or the one that is still open, was put.

        Raises:
            HeadAway: there is none in time; it is no longer waited for.
        """
        if self._open is not None:
            self._open.join(max(0.0, self._begun + seconds - time.monotonic()))
            if self._open.is_alive():
                raise HeadAway
        answers: list[R] = []
        errors: list[BaseException] = []

        def put() -> None:
            try:
                answers.append(question())
            except BaseException as error:
                errors.append(error)

        self._begun = time.monotonic()
        self._open = threading.Thread(target=put, name="question to the head", daemon=True)
        self._open.start()
        self._open.join(seconds)
        if errors:
            raise errors[0]
        if not answers:
            raise HeadAway
        return answers[0]

    def insist(self, question: Callable[[], R]) -> R:
        """The same where nothing goes on without an answer. Raises Stranded after `patience`."""
        try:
            return self.ask(question, patience())
        except HeadAway:
            raise _silent() from None

    def check_silence(self) -> None:
        """Raise Stranded where a question has been open for longer than `patience`."""
        if self._open is not None and self._open.is_alive() and time.monotonic() - self._begun > patience():
            raise _silent()


_head = Head()  # this process has one connection, and that has one head
ask, insist, check_silence = _head.ask, _head.insist, _head.check_silence


def patience() -> float:
    """Seconds after which a driver that its head does not answer gives up, before Ray ends it."""
    given = float(os.environ.get(RAYS_BOUND, 60))
    return given - min(10.0, given / 2)


def _silent() -> Stranded:
    return Stranded(f"the cluster's head (Ray's GCS) has not answered for {patience():g} s")


def living_nodes() -> set[str]:
    """Ids of the nodes that the head holds for alive."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def check_own() -> None:
    """Raise Stranded where the driver's own node has ended, or its head stays silent.

    A head that is back with all it knew holds its old node for dead, though a new raylet may listen at the same
    place: it closes the job of a driver that lived there and ends its actors.
    """
    if own_node_ended():
        raise Stranded("the Ray processes of this driver's node have ended")
    if ray.get_runtime_context().get_node_id() not in insist(living_nodes):
        raise Stranded("the cluster holds this driver's node for dead")


def never_stranded() -> Callable[[], bool]:
    """False whenever it is asked, for a wait for new actors, or now and then what `check_own` raises."""
    looked = time.monotonic()

    def unless() -> bool:
        nonlocal looked
        if time.monotonic() - looked > ANEW_SECONDS:
            check_own()
            looked = time.monotonic()
        return False

    return unless


def own_node_ended() -> bool:
    """Whether nothing listens where this process reaches the raylet of its node; one that is busy does."""
    node = ray._private.worker.global_worker.node
    if node is None or not node.raylet_socket_name:
        return False
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(PROBE_SECONDS)
            probe.connect(node.raylet_socket_name)
    except (ConnectionRefusedError, FileNotFoundError):
        return True
    except OSError:
        return False
    return False
