"""`submit`: a verb as a Ray job. Everything is checked before anything is uploaded; asking again attaches."""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rairl_ray.actors.placement import Node, PlacementPlan, check_against, present_or_promised, total_gpus
from rairl_ray.config.load import warm_start_chain
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import UserError
from rairl_ray.jobs.arguments import NAMED_BY_RUN, Call, Places, prepare_call
from rairl_ray.jobs.client import Cluster, Connection, check_versions
from rairl_ray.jobs.pack import Pack, make_pack, write_zip
from rairl_ray.jobs.secrets import HOOK, SEALED, cluster_token, refuse_visible, seal
from rairl_ray.jobs.verbs import Job, attempts, follow, said, show, where
from rairl_ray.plan import placement_with, print_placement

STOP_SECONDS = 600
"""How long a stopped job may take to finish its step and save before Ray kills it (Ray's own answer is 3)."""
LOCK_SECONDS = 3600
"""How long a node may take to install the lock (Ray's own answer is 600)."""


class JobError(UserError):
    """A job that cannot be submitted as asked."""


@dataclass(frozen=True)
class Options:
    """How a verb is sent; see the options of `submit`."""

    working_dir: str | None = None
    image: str | None = None
    python: str | None = None
    lock: str | None = None
    """`pip`: the nodes install the pinned lock; None: they have it."""
    secrets: Mapping[str, str] | None = None
    ended: str = "refuse"
    """What an ended job of this name means: `refuse`, or `again` for a new attempt."""


@dataclass(frozen=True)
class Request:
    """A job, checked and not yet sent."""

    call: Call
    pack: Pack | None
    plan: PlacementPlan | None
    nodes: list[Node]
    """Those that the plan counts on."""
    entrypoint: str
    runtime_env: dict[str, Any]


def submit(
    verb: str, arguments: Sequence[str], config: RunConfig | None, root: Path, connection: Connection,
    options: Options, console: Console, then: str = "leave",
) -> int:  # fmt: skip
    """Send a verb to the cluster, or attach to its job.

    Args:
        config: of the experiment file that the first argument names, if it does.
        root: the checkout.
        then: `leave`, `follow` (stream the logs to the end) or `describe` (send nothing).

    Returns:
        0; followed, the job's own exit code, and 130 after Ctrl-C.

    Raises:
        UserError: whatever can be known before the upload.
    """
    refuse_visible(arguments, options.secrets or {})
    cluster = connection.cluster()
    check_versions(cluster, connection.address)
    request = make_request(verb, arguments, config, root, cluster, options)
    earlier = attempts(connection, request.call.job)
    if then == "describe":
        _describe(request, cluster, connection, earlier, console)
        return 0
    job = attached(earlier, request.call, arguments, connection.options(), options.ended)
    if job is not None:
        identity = job.id
        show(console, f"attached to {identity}, which {said(job)}")
    else:
        if request.pack is not None:
            for line in request.pack.describe():
                show(console, line)
        identity = send(
            connection, request, arguments, f"{request.call.job}~{len(earlier) + 1}" if earlier else ""
        )
        show(console, f"submitted {identity} to {connection.address} ({cluster.describe()})")
        _say_where(request, console)
    if then == "follow":
        return follow(connection, identity, console)
    show(console, f"follow it: rairl jobs logs {identity} --follow{connection.options()}")
    return 0


def make_request(
    verb: str, arguments: Sequence[str], config: RunConfig | None, root: Path, cluster: Cluster,
    options: Options,
) -> Request:  # fmt: skip
    """Check plan, arguments and files against the cluster."""
    plan, nodes = placed(config, cluster) if config is not None and verb in NAMED_BY_RUN else (None, [])
    packed = options.working_dir is None
    tracked = make_pack(root, {}) if packed else None
    places = Places(root, frozenset(tracked.files if tracked else ()), cluster.here, packed)
    call = prepare_call(verb, arguments, config, places)
    pack = make_pack(root, call.named) if packed else None
    runtime_env, folder = environment(options, root, cluster)
    python = options.python or (sys.executable if cluster.here and not options.lock else "python")
    command = shlex.join([python, "launch.py", verb, *call.arguments])
    entrypoint = f"cd {shlex.quote(folder)} && exec {command}" if folder else f"exec {command}"
    return Request(call, pack, plan, nodes, entrypoint, runtime_env)


def placed(config: RunConfig, cluster: Cluster) -> tuple[PlacementPlan, list[Node]]:
    """The run's placement, and the nodes it counts on. Raises PlacementError where it can never serve it."""
    warm_start_chain(config)
    nodes = present_or_promised(config, cluster.nodes)
    plan = placement_with(config, total_gpus(nodes))
    check_against(plan, nodes)
    return plan, nodes


def environment(options: Options, root: Path, cluster: Cluster) -> tuple[dict[str, Any], str]:
    """(the job's runtime_env without the package, the nodes' folder to start in or nothing)."""
    env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    folder = ""
    if options.working_dir is not None:
        if "://" in options.working_dir:
            env["working_dir"] = options.working_dir
        elif Path(options.working_dir).is_absolute():
            folder = options.working_dir
        else:
            raise JobError(
                f"--working-dir {options.working_dir}: give an absolute folder that the nodes or the image "
                "have, or "
                "a package's address such as s3://BUCKET/code.zip; leave it out to send this checkout"
            )
    if options.image is not None:
        if not folder:
            raise JobError(
                f"--image {options.image}: name where the code is inside it: --working-dir /FOLDER (Ray sends "
                "no "
                "files into an image)"
            )
        if options.lock or options.secrets:
            raise JobError(
                "--image: goes with neither --lock nor --secret (Ray's limit); put them into the nodes"
            )
        env["image_uri"] = options.image
    if options.lock is not None:
        env["pip"] = {
            "packages": lock_packages(root, "cuda" if cluster.gpus else "cpu"),
            "pip_check": False,
            "pip_install_options": ["--no-deps"],
        }
        env["config"] = {"setup_timeout_seconds": LOCK_SECONDS}
    if options.secrets:
        env["env_vars"][SEALED] = seal(options.secrets, cluster_token())
        env["worker_process_setup_hook"] = HOOK
    return env, folder


def lock_packages(root: Path, kind: str) -> list[str]:
    """torch, as requirements/install.sh pins it, and the lines of the lock of this kind (`cpu`, `cuda`)."""
    script = (root / "requirements" / "install.sh").read_text(encoding="utf-8")
    pinned = re.search(r"^torch_version=(\S+)$", script, re.MULTILINE)
    if pinned is None:
        raise JobError("requirements/install.sh: names no torch_version; --pip-lock needs it")
    lines = (root / "requirements" / f"{kind}.txt").read_text(encoding="utf-8").splitlines()
    packages = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return [f"torch=={pinned[1]}", *packages]


def attached(
    earlier: Sequence[Job], call: Call, arguments: Sequence[str], reach: str, ended: str
) -> Job | None:
    """The running job to attach to; None where a new one is to be sent.

    Args:
        earlier: the job's attempts in their order.
        reach: the options that reach the same cluster, for the remedy.
        ended: `refuse` a job that has ended, or run it `again`; `--resume` among the arguments allows it, too.

    Raises:
        JobError: the newest attempt runs with other arguments, or has ended and nobody said to go on.
    """
    if not earlier:
        return None
    job = earlier[-1]
    if not job.ended:
        if job.metadata.get("rairl.fingerprint") in (call.fingerprint, None):
            return job
        raise JobError(
            f"{job.id} runs already, with other arguments: {job.metadata.get('rairl.command')}; follow it "
            "(rairl "
            f"jobs logs {job.id} --follow{reach}), stop it (rairl jobs stop {job.id}{reach}), or write "
            "name=NAME"
        )
    resumes = any(word == "--resume" or word.startswith("--resume=") for word in arguments)
    if ended == "again" or resumes:
        return None
    resume = f"write --resume {call.output} behind the verb's arguments to continue it"
    offer = f"{resume}, or --again" if call.verb in NAMED_BY_RUN else "write --again"
    raise JobError(f"{job.id} has ended: it {said(job)}; {offer} before the verb to run it anew")


def send(connection: Connection, request: Request, arguments: Sequence[str], attempt: str) -> str:
    """Upload the package and submit; the submission id. A second sender of an id gets the first one's job."""
    identity = attempt or request.call.job
    call = request.call
    metadata = {
        "rairl.verb": call.verb,
        "rairl.command": shlex.join([call.verb, *arguments])[:2000],
        "rairl.fingerprint": call.fingerprint,
        "rairl.output": call.output,
    }
    with tempfile.TemporaryDirectory() as folder, connection.errors():
        env = dict(request.runtime_env)
        if request.pack is not None:
            package = Path(folder) / "rairl.zip"
            write_zip(request.pack, package)
            env["working_dir"] = str(package)
        try:
            connection.jobs.submit_job(
                entrypoint=request.entrypoint, submission_id=identity, runtime_env=env, metadata=metadata
            )
        except RuntimeError:
            # Ray answers a repeated id with HTTP 500: somebody was faster, perhaps ourselves.
            if not any(job.id == identity for job in attempts(connection, call.job)):
                raise
    return identity


def _describe(
    request: Request, cluster: Cluster, connection: Connection, earlier: Sequence[Job], console: Console
) -> None:
    show(console, f"cluster: {connection.address}: {cluster.describe()}")
    show(console, f"job: {request.call.job}" + (f"; {earlier[-1].id} {said(earlier[-1])}" if earlier else ""))
    show(console, f"command: {request.entrypoint}")
    if request.pack is None:
        show(
            console, f"packed: nothing (--working-dir {request.runtime_env.get('working_dir', 'on the nodes')})"
        )
    else:
        for line in request.pack.describe():
            show(console, line)
    if SEALED in request.runtime_env["env_vars"]:
        show(console, "secrets: sealed with the cluster's token")
    _say_where(request, console)
    if request.plan is not None:
        print_placement(request.plan, request.nodes, console)
    show(console, "nothing was sent")


def _say_where(request: Request, console: Console) -> None:
    if request.call.output:
        show(console, where(request.call.output))
