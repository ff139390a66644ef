"""Recovers a run when part of the machine fails: all is torn down and rebuilt from the newest checkpoint.

    start the workers ──> attempt ──> finished or stopped
            ^                │ GroupFailure (role, rank, node, phase, step)
            │                v
         backoff <──────── tear down, look that nothing is left (bounded by timeouts.teardown_seconds)

Where nodes of the run are being drained, the attempt saves and raises `Drained`: the next attempt is elsewhere,
and no budget pays for it. Each role has a budget of `trainer.max_restarts_per_role` rebuilds: a node that keeps
killing a discriminator does not use up what a policy needs. Errors of the user are never tried again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rairl_ray.actors.draining import Drained
from rairl_ray.actors.group import GroupFailure, pause_after
from rairl_ray.actors.head import Stranded
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.errors import PlacementError, RunFailure
from rairl_ray.trainer.run_context import RunContext
from rairl_ray.trainer.worker_groups import WorkerGroups, start_worker_groups


@dataclass
class Rebuild:
    """One failure, or one move, on its way to a running attempt."""

    cause: GroupFailure | Drained
    what: str
    """It happened, in words."""
    pause: float
    """Seconds of backoff after the teardown."""
    raised: float = field(default_factory=time.monotonic)
    torn_down: float = 0.0


class Recovery:
    """The attempts at a run, one after the other, as long as a failure is left in its role's budget:

    while recovery.goes_on():
        with recovery.attempt():
            workers = recovery.start_workers()
            ...
            return finished
    return False
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._failures: Counter[str] = Counter()
        self._monitor: ProcessMonitor | None = None
        self._rebuild: Rebuild | None = None

    @property
    def resumes(self) -> bool:
        """Whether this attempt goes on from the newest checkpoint."""
        return self._context.resumed or self._rebuild is not None

    def goes_on(self) -> bool:
        """Whether there is an attempt to make; waits for the backoff of a failure, which a stop ends."""
        if self._rebuild is None:
            return True
        if self._context.lent is not None and isinstance(self._rebuild.cause, Drained):
            why = "stopped, as its placement group cannot move"
        elif self._context.stop.wait(self._rebuild.pause):
            why = "stopped after a failure"
        else:
            return True
        self._context.event(f"{why}; go on with --resume {self._context.config.name}")
        return False

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure in here that may be tried again ends the block, and is not raised. All workers end with it.

        Raises:
            GroupFailure: the first one beyond its role's budget.
            RunFailure: when the cluster no longer has room for the run after a failure, or this driver has lost
                its head or its own node.
        """
        context = self._context
        self._monitor = ProcessMonitor(context.config.timeouts.probe_seconds, lent=context.lent)
        context.display.phase("starting actors")
        try:
            yield
        except GroupFailure as failure:
            self._count(failure)
        except Drained as notice:
            self._rebuild = Rebuild(notice, "a drained node", 0.0)
            context.event(str(notice))
        except Stranded as error:
            name = context.config.name
            raise RunFailure(f"{error}; when the cluster answers, go on with --resume {name}") from error
        except PlacementError as error:
            if self._rebuild is None:
                raise
            cause = self._rebuild.cause
            raise RunFailure(f"{cause}. No room for a rebuild: {error}") from cause
        finally:
            # Nothing of an attempt survives it, however it ended; what could not be confirmed is an event.
            for left in self._monitor.end(context.config.timeouts.teardown_seconds):
                context.event(f"teardown: {left}")
            if self._rebuild is not None:
                self._rebuild.torn_down = time.monotonic()

    def start_workers(self) -> WorkerGroups:
        """The workers of this attempt, on nodes that see the run's files."""
        assert self._monitor is not None
        context = self._context
        return start_worker_groups(context.prepared, context.plan, self._monitor, context.folder.root)

    def ready(self) -> None:
        """Training goes on where it should: after a failure, say what that took."""
        if (rebuild := self._rebuild) is None:
            return
        seconds = time.monotonic() - rebuild.raised
        teardown = rebuild.torn_down - rebuild.raised
        self._context.event(
            f"recovered from {rebuild.what} in {seconds:.1f} s: teardown "
            f"{teardown:.1f} s, backoff {rebuild.pause:.1f} s, "
            f"restart {seconds - teardown - rebuild.pause:.1f} s"
        )

    def _count(self, failure: GroupFailure) -> None:
        """Prepare a rebuild. Raises the failure where its role's budget is spent."""
        trainer = self._context.config.trainer
        self._failures[failure.role] += 1
        pause = pause_after(self._failures.total(), trainer.retry_backoff_seconds)
        self._rebuild = Rebuild(failure, f"the failure of {failure.role} in phase {failure.phase}", pause)
        self._context.event(
            f"failure {self._failures[failure.role]} of role {failure.role}, whose budget is "
            f"{trainer.max_restarts_per_role}, after {failure.waited_seconds:.1f} s of waiting: {failure}"
        )
        if self._failures[failure.role] > trainer.max_restarts_per_role:
            raise failure
