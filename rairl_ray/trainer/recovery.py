"""Recovers a run when part of the machine fails: all is torn down and rebuilt from the newest checkpoint.

    start the workers ──> attempt ──> finished or stopped
            ^                │ GroupFailure (role, rank, node, phase, step)
            │                v
         backoff <──────── tear down, look that nothing is left (bounded by timeouts.teardown_seconds)

Where nodes of the run are being drained, the body saves and raises `Drained`: the next attempt is elsewhere,
and no budget pays for it. Each role has a budget of `trainer.max_restarts_per_role` rebuilds: a node that keeps
killing a discriminator does not use up what a policy needs. Errors of the user are never tried again.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from rairl_ray.actors.draining import Drained
from rairl_ray.actors.group import GroupFailure, pause_after
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.errors import PlacementError, RunFailure
from rairl_ray.trainer.run_context import RunContext
from rairl_ray.trainer.worker_groups import WorkerGroups, start_worker_groups

Body = Callable[[WorkerGroups, bool, Callable[[], None]], bool]
"""(workers, whether to go on from the newest checkpoint, to be called once training goes on) -> finished."""


def run_with_recovery(context: RunContext, body: Body) -> bool:
    """Run `body` until it ends, anew after each failure that is left in its role's budget.

    Returns what `body` returned: True when the run finished, False when it was asked to stop.

    Raises:
        GroupFailure: the first one beyond its role's budget.
        RunFailure: when the cluster no longer has room for the run after a failure.
    """
    trainer, timeouts = context.config.trainer, context.config.timeouts
    failures: Counter[str] = Counter()
    rebuild: Rebuild | None = None
    while True:
        monitor = ProcessMonitor(timeouts.probe_seconds, lent=context.lent)
        context.display.phase("starting actors")
        try:
            workers = start_worker_groups(context.prepared, context.plan, monitor)
            done = body(workers, context.resumed or rebuild is not None, partial(_ready, context, rebuild))
            workers.close()
            return done
        except GroupFailure as failure:
            failures[failure.role] += 1
            pause = pause_after(failures.total(), trainer.retry_backoff_seconds)
            rebuild = Rebuild(failure, f"the failure of {failure.role} in phase {failure.phase}", pause)
            context.event(
                f"failure {failures[failure.role]} of role {failure.role}, whose budget is "
                f"{trainer.max_restarts_per_role}, after {failure.waited_seconds:.1f} s of waiting: {failure}"
            )
            if failures[failure.role] > trainer.max_restarts_per_role:
                raise
        except Drained as notice:
            rebuild = Rebuild(notice, "a drained node", 0.0)
            context.event(str(notice))
            if context.lent is not None:
                context.event(f"its placement group cannot move; go on with --resume {context.config.name}")
                return False
        except PlacementError as error:
            if rebuild is None:
                raise
            raise RunFailure(f"{rebuild.cause}. No room for a rebuild: {error}") from rebuild.cause
        finally:
            _end(context, monitor)
        rebuild.torn_down = time.monotonic()
        if context.stop.wait(rebuild.pause):
            context.event(f"stopped after a failure; go on with --resume {context.config.name}")
            return False


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


def _end(context: RunContext, monitor: ProcessMonitor) -> None:
    """Nothing of an attempt survives it, however it ended; what could not be confirmed is an event."""
    for left in monitor.end(context.config.timeouts.teardown_seconds):
        context.event(f"teardown: {left}")


def _ready(context: RunContext, rebuild: Rebuild | None) -> None:
    """The body restored its state and goes on: after a failure, say what that took."""
    if rebuild is None:
        return
    seconds = time.monotonic() - rebuild.raised
    teardown = rebuild.torn_down - rebuild.raised
    context.event(
        f"recovered from {rebuild.what} in {seconds:.1f} s: teardown "
        f"{teardown:.1f} s, backoff {rebuild.pause:.1f} s, restart {seconds - teardown - rebuild.pause:.1f} s"
    )
