"""`jobs list|status|logs|stop` as commands, and the options that `submit` shares with them."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console

from rairl_ray.jobs import verbs
from rairl_ray.jobs.client import Connection

Address = Annotated[str | None, typer.Option(metavar="URL", help="Dashboard: http(s)://HOST:8265.")]
CaFile = Annotated[str | None, typer.Option(metavar="FILE", help="Certificates that https is checked against.")]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Submission id, or the run's name.")]

jobs_app = typer.Typer(rich_markup_mode=None, help="Jobs of a Ray cluster: list, status, logs, stop.")


@jobs_app.command("list")
def list_command(address: Address = None, ca_file: CaFile = None) -> int:
    """Show every job with its status and exit code."""
    return verbs.list_jobs(Connection(address, ca_file), wide_console())


@jobs_app.command("status")
def status_command(job: JobName, address: Address = None, ca_file: CaFile = None) -> int:
    """Show how a job is or how it ended, and where its results are."""
    return verbs.status(Connection(address, ca_file), job, wide_console())


@jobs_app.command("logs")
def logs_command(
    job: JobName,
    address: Address = None,
    ca_file: CaFile = None,
    follow: Annotated[bool, typer.Option("--follow", help="To the end; exit as the job does.")] = False,
) -> int:
    """Show a job's output so far, or all of it as it comes."""
    return verbs.logs(Connection(address, ca_file), job, wide_console(), "follow" if follow else "leave")


@jobs_app.command("stop")
def stop_command(job: JobName, address: Address = None, ca_file: CaFile = None) -> int:
    """Ask a job to end; training finishes its step and saves."""
    return verbs.stop(Connection(address, ca_file), job, wide_console())


def wide_console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=140)
