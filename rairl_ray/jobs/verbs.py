"""`jobs list|status|logs|stop`: what a cluster runs, and following one job to its exit code."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from rairl_ray.errors import RunFailure, UserError
from rairl_ray.jobs.arguments import NAMED_BY_RUN, slug
from rairl_ray.jobs.client import ClusterError, Connection

QUIET_SECONDS = 20.0
"""After so long without a line, the job's status is asked: a cut cable sends no goodbye."""
LOST_SECONDS = 120.0
"""How long a cluster may be away before following gives up; the job itself goes on."""
POLL_SECONDS = 1.0
INTERRUPTED = 130


@dataclass(frozen=True)
class Job:
    """One attempt, as the Jobs API tells it."""

    id: str
    status: str
    code: int | None
    """Exit code of the verb; None while it runs, and where Ray ended it."""
    message: str
    start: float
    end: float | None
    entrypoint: str
    metadata: dict[str, str]

    @property
    def ended(self) -> bool:
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")

    @property
    def exit_code(self) -> int:
        """The verb's own; 130 for a stopped job, 128 + signal for a killed one, 1 where it never started."""
        if self.code is not None:
            return self.code if self.code >= 0 else 128 - self.code
        return {"SUCCEEDED": 0, "STOPPED": INTERRUPTED}.get(self.status, 1)


def find_job(connection: Connection, name: str) -> Job:
    """A job by its submission id or its run's name (the newest attempt). Raises UserError."""
    jobs = all_jobs(connection)
    exact = [job for job in jobs if job.id == name]
    by_name = [
        job for job in jobs if _first_attempt(job.id) in {f"{verb}-{slug(name)}" for verb in NAMED_BY_RUN}
    ]
    found = exact or by_name
    if not found:
        known = ", ".join(job.id for job in jobs[-3:]) or "none"
        raise UserError(f"{name}: the cluster knows no such job; `rairl jobs list` shows all (newest: {known})")
    return found[-1]


def all_jobs(connection: Connection) -> list[Job]:
    """Every submitted job, the oldest first."""
    with connection.errors():
        details = connection.jobs.list_jobs()
    return sorted((_job(item) for item in details if item.submission_id), key=lambda job: job.start)


def attempts(connection: Connection, first: str) -> list[Job]:
    """The attempts of a job in their order: `first`, `first~2`, `first~3`."""
    own = [job for job in all_jobs(connection) if _first_attempt(job.id) == first]
    return sorted(own, key=lambda job: int(job.id.partition("~")[2] or 1))


def list_jobs(connection: Connection, console: Console) -> int:
    """Print every submitted job."""
    table = Table(title=f"jobs of {connection.address}")
    for heading in ("job", "status", "exit code", "started (UTC)", "took", "command"):
        table.add_column(heading, overflow="fold")
    for job in all_jobs(connection):
        started = datetime.fromtimestamp(job.start, UTC).strftime("%Y-%m-%d %H:%M:%S")
        took = f"{(job.end or time.time()) - job.start:.0f} s"
        code = str(job.exit_code) if job.ended else ""
        table.add_row(
            job.id, job.status, code, started, took, job.metadata.get("rairl.command", job.entrypoint)
        )
    console.print(table)
    return 0


def status(connection: Connection, name: str, console: Console) -> int:
    """Print one job; 0 whatever its state."""
    job = find_job(connection, name)
    show(console, f"{job.id} {said(job)}")
    show(console, f"command: {job.metadata.get('rairl.command', job.entrypoint)}")
    if job.metadata.get("rairl.output"):
        show(console, where(job.metadata["rairl.output"]))
    return 0


def logs(connection: Connection, name: str, console: Console, then: str) -> int:
    """Print a job's log. `then`: `leave` (0), or `follow` to its end (its exit code)."""
    job = find_job(connection, name)
    if then == "follow":
        return follow(connection, job.id, console)
    with connection.errors():
        _write(console, connection.jobs.get_job_logs(job.id))
    return 0


def stop(connection: Connection, name: str, console: Console) -> int:
    """Ask a job to end, as Ctrl-C does: training finishes its step and saves."""
    job = find_job(connection, name)
    if job.ended:
        show(console, f"{job.id} has ended already: it {said(job)}")
        return 0
    with connection.errors():
        connection.jobs.stop_job(job.id)
    show(
        console,
        f"{job.id} was asked to stop; it finishes its step and saves (rairl jobs status {job.id}"
        f"{connection.options()})",
    )
    return 0


def follow(connection: Connection, identity: str, console: Console) -> int:
    """Stream a job's log to its end and return its exit code; Ctrl-C leaves the job alone and returns 130.

    Raises:
        RunFailure: the cluster was away for LOST_SECONDS.
    """
    shown = 0
    seen = time.monotonic()

    def print_new(text: str, before: int) -> None:
        """`before`: characters of this stream before `text`; each stream starts at the log's beginning."""
        nonlocal shown, seen
        seen = time.monotonic()
        _write(console, text[max(0, shown - before) :])
        shown = max(shown, before + len(text))

    try:
        while True:
            try:
                # A stream that breaks off matters only where the job's state cannot be asked either.
                with suppress(ClusterError):
                    asyncio.run(_stream(connection, identity, print_new))
                job = one_job(connection, identity)
                seen = time.monotonic()
                if job.ended:
                    with suppress(ClusterError), connection.errors():
                        print_new(connection.jobs.get_job_logs(identity), 0)
                    break
            except ClusterError as error:
                if time.monotonic() - seen > LOST_SECONDS:
                    raise RunFailure(f"{error}; the job goes on: {_come_back(connection, identity)}") from None
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        show(console, f"\ndetached; {identity} goes on: {_come_back(connection, identity)}")
        return INTERRUPTED
    show(console, f"{job.id} {said(job)}")
    return job.exit_code


def one_job(connection: Connection, identity: str) -> Job:
    """The job's state now."""
    with connection.errors():
        return _job(connection.jobs.get_job_info(identity))


def said(job: Job) -> str:
    """`runs`, or how it ended, as the rest of a sentence."""
    if not job.ended:
        return "waits for its start" if job.status == "PENDING" else "runs"
    words = {"SUCCEEDED": "succeeded", "FAILED": "failed", "STOPPED": "was stopped"}[job.status]
    reason = ""
    if job.status == "FAILED" and job.code is None:
        reason = f" ({' '.join(job.message.split())[:200]})"
    return f"{words} with exit code {job.exit_code}{reason}"


def where(output: str) -> str:
    """The line that says where a job's results lie."""
    return f"results: {output}" if "://" in output else f"results, on the cluster's disk: {output}"


def show(console: Console, text: str) -> None:
    """A line as it is: no markup, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


async def _stream(connection: Connection, identity: str, print_new: Callable[[str, int], None]) -> None:
    """One connection to the log, until it closes or the job has ended."""
    with connection.errors():
        lines = connection.jobs.tail_job_logs(identity)
        before = 0
        waiting = asyncio.ensure_future(anext(lines, None))
        try:
            while True:
                done, _ = await asyncio.wait({waiting}, timeout=QUIET_SECONDS)
                if not done:
                    if (await asyncio.to_thread(one_job, connection, identity)).ended:
                        return
                    print_new("", before)
                    continue
                text = waiting.result()
                if text is None:
                    return
                print_new(text, before)
                before += len(text)
                waiting = asyncio.ensure_future(anext(lines, None))
        finally:
            waiting.cancel()


def _come_back(connection: Connection, identity: str) -> str:
    reach = connection.options()
    return f"rairl jobs logs {identity} --follow{reach} comes back, rairl jobs stop {identity}{reach} ends it"


def _first_attempt(identity: str) -> str:
    return identity.partition("~")[0]


def _write(console: Console, text: str) -> None:
    console.file.write(text)
    console.file.flush()


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id,
        status=str(details.status.value),
        code=details.driver_exit_code,
        message=details.message or "",
        start=(details.start_time or 0) / 1000,
        end=details.end_time / 1000 if details.end_time else None,
        entrypoint=details.entrypoint,
        metadata=dict(details.metadata or {}),
    )
