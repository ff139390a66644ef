"""One run as a call: prepare, open the run folder, run the algorithm, leave everything in a terminal state."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal, NamedTuple

from ray.util.placement_group import PlacementGroup

from rairl_ray.actors.placement import PlacementPlan
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.config.load import config_hash, read_saved, warm_start_chain
from rairl_ray.config.rules import check
from rairl_ray.config.schema import Algorithm, RunConfig
from rairl_ray.config.variants import complete
from rairl_ray.display import Display
from rairl_ray.runfolder import RunFolder, Summary, read_summary
from rairl_ray.tracking.tracker import Status, Tracker
from rairl_ray.trainer.async_checkpointer import check_references, references
from rairl_ray.trainer.fork import Fork, take_over
from rairl_ray.trainer.outputs import mirrored
from rairl_ray.trainer.prepare import Prepared, check_machine, prepare
from rairl_ray.trainer.run_context import (
    MetricSink,
    RunContext,
    SignalStop,
    StopRequest,
    open_folder,
    resumable,
    save_config,
)
from rairl_ray.trainer.worker_groups import check_bundles, check_lent, check_room, cluster, place

ALGORITHMS = {"airl": "rl_trainer", "grpo": "rl_trainer", "sft": "sft"}
"""Files beside this one whose `run` does the steps; loaded when it is time: sft.py brings Ray Train."""
complete(f"{__name__}.ALGORITHMS", ALGORITHMS, Algorithm, "type")


@dataclass(frozen=True)
class RunResult:
    """What a call of `run` came to."""

    folder: RunFolder
    status: Literal["finished", "stopped"]
    summary: Summary
    """The final evaluation; empty where the run was stopped, or evaluates nothing."""

    @property
    def exit_code(self) -> int:
        """Of the command line: 130 where Ctrl-C or SIGTERM stopped the run."""
        return 0 if self.status == "finished" else 130


def run(
    config: RunConfig,
    *,
    resume: str | None = None,
    fork: Fork | None = None,
    stop: StopRequest | None = None,
    sinks: Sequence[MetricSink] = (),
    display: Display | None = None,
    placement_group: PlacementGroup | None = None,
) -> RunResult:
    """One run from its configuration to its final artifacts, in the caller's process.

    Takes no signal handler, joins the Ray that is initialised or starts one and ends that, and removes nothing
    that it did not make.

    Args:
        resume: the run folder, or its name, to go on with.
        fork: start from another run's checkpoint; `config` is then the fork's.
        stop: `stop.ask()`, from any thread, ends the run after its step with a checkpoint.
        sinks: called with (step, metrics) for every row that the run logs.
        display: where progress is shown; the terminal without one.
        placement_group: where the actors live, such as a Tune trial's; it is left as it was. It has the bundles
            of `place(config)`, in that order, or larger ones. A run cannot leave it: when a node of it is being
            drained the run saves and is stopped.

    Raises:
        UserError: something that the user can mend: its configuration, data, machine, or what it resumes.
        RunFailure: what failed more often than `trainer.max_restarts_per_role` allows.
        KeyboardInterrupt: it was stopped while its warm start was trained.
    """
    display = display or Display(config.name, config.trainer.steps)
    check(config)
    if placement_group is not None:
        check_lent(config)
    caller = Caller(StopRequest() if stop is None else stop, sinks, display, placement_group)
    with (
        mirrored(config, resume, display.note) as (staged, resumed),
        _opened(staged, resumed, fork, caller) as context,
    ):
        status: Status = "FAILED"
        try:
            with display, context.stop.listening(display):
                trainer = import_module(f"rairl_ray.trainer.{ALGORITHMS[config.algorithm.type]}")
                status = "FINISHED" if trainer.run(context) else "KILLED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            context.folder.event(f"failed: {error}")
            raise
        finally:
            context.tracker.finish(status)
        return _result(context, status)


def train(config: RunConfig, resume: str | None = None, fork: Fork | None = None) -> int:
    """A run that Ctrl-C and SIGTERM may end, as `launch.py train` makes one; its exit code."""
    return run(config, resume=resume, fork=fork, stop=SignalStop()).exit_code


class Caller(NamedTuple):
    """How a run is ended from outside, who hears of it, and where it may live."""

    stop: StopRequest
    sinks: Sequence[MetricSink]
    display: Display
    lent: PlacementGroup | None


@contextmanager
def _opened(config: RunConfig, resume: str | None, fork: Fork | None, caller: Caller) -> Iterator[RunContext]:
    """All that a run needs is checked and prepared; cluster and run folder are its own in here."""
    if resume is not None:
        resumable(filled_in(config), resume)
    check_room(config)
    config = with_warm_start(config, caller.display, caller.stop)
    prepared = prepare(config)
    with cluster(config):
        plan = place(config)
        if caller.lent is not None:
            check_bundles(plan, caller.lent)
        check_machine(config, plan.device)
        folder = open_folder(config, resume, caller.display)
        caller.display.note(f"run folder: {folder.root}")
        with folder.lock():
            if fork is not None:
                take_over(fork, folder)
            yield _context(prepared, plan, folder, resume is not None or fork is not None, caller)


def _context(
    prepared: Prepared, plan: PlacementPlan, folder: RunFolder, resumed: bool, caller: Caller
) -> RunContext:
    """What surrounds the loop, with tracking started; newest checkpoint and configuration agree."""
    config, display = prepared.config, caller.display
    save_config(folder, config)
    tracker = Tracker(warn=display.note)
    store = CheckpointStore(folder.root, config.trainer.keep_checkpoints, warn=display.note)
    # Hashing large frozen weights takes a while, and nobody needs the answer before the first checkpoint.
    frozen = ThreadPoolExecutor(1, "references").submit(references, prepared)
    newest = store.latest_valid() if resumed else None
    saved = store.manifest(newest) if newest is not None else {}
    if newest is not None:
        check_references(saved["references"], frozen.result(), newest)
    fork = folder.read_fork()
    tracker.start(
        config,
        folder.root,
        resume_run_id=saved.get("mlflow_run_id"),
        tags={
            "rairl.config_hash": config_hash(config),
            "rairl.data_hash": prepared.task.data_hash,
            **({"rairl.forked_from": f"{fork['run']}@{fork['step']}"} if fork else {}),
        },
    )
    context = RunContext(
        prepared, plan, folder, store, tracker, display, resumed, frozen, newest,
        stop=caller.stop, sinks=caller.sinks, lent=caller.lent,
    )  # fmt: skip
    before = saved.get("code_version", context.code_version)
    if before != context.code_version:
        context.event(f"the checkpoint was written by code {before}, this is {context.code_version}")
    if prepared.start is not None:
        context.event(prepared.start.describe())
    return context


def _result(context: RunContext, status: Status) -> RunResult:
    if status != "FINISHED":
        return RunResult(context.folder, "stopped", {})
    written = context.folder.evaluation("final") / "summary.json"
    return RunResult(context.folder, "finished", read_summary(written) if written.is_file() else {})


def with_warm_start(config: RunConfig, display: Display, stop: StopRequest | None = None) -> RunConfig:
    """The configuration with its policy path filled in from `warm_start`, whose run is trained first if needed.

    The warm start takes over what must agree with this run: data, seed, folders and machines. An existing
    one is used again only if it was made by exactly this configuration.
    """
    if config.warm_start is None:
        return config
    earlier = warm_start_chain(config)[0]
    earlier = with_warm_start(earlier, display, stop)
    folder = RunFolder(Path(earlier.output_dir) / earlier.name)
    if not made_by(folder, earlier):
        if config.cluster.address is not None:
            with cluster(config):
                place(config)
        display.note(f"warm start: {config.warm_start} is trained first, into {folder.root}")
        if run(earlier, stop=stop).status == "stopped":
            raise KeyboardInterrupt
    return filled_in(config)


def filled_in(config: RunConfig) -> RunConfig:
    """The configuration as its run saves it: the policy's path is what its warm start leaves or will leave."""
    if config.warm_start is None:
        return config
    earlier = warm_start_chain(config)[0]
    path = RunFolder(Path(earlier.output_dir) / earlier.name).final_policy
    policy = config.model.policy.model_copy(update={"path": str(path), "build": None})
    return config.model_copy(update={"model": config.model.model_copy(update={"policy": policy})})


def made_by(folder: RunFolder, config: RunConfig) -> bool:
    """Whether the folder holds the final policy of a run of exactly this configuration."""
    files = ("config.json", "adapter_config.json")
    if not any((folder.final_policy / name).is_file() for name in files):
        return False
    return config_hash(read_saved(folder.config)) == config_hash(config)
