"""What surrounds the training loop of one run: run folder, checkpoints, tracking, display, stop requests."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray.util.placement_group import PlacementGroup

from rairl_ray.actors.placement import PlacementPlan
from rairl_ray.checkpoint import CheckpointStore, Identity
from rairl_ray.config.load import config_hash, differences, dump_yaml, read_saved
from rairl_ray.config.schema import RunConfig
from rairl_ray.display import Display
from rairl_ray.errors import ResumeError
from rairl_ray.evaluation.rows import EvalRow, write_rows
from rairl_ray.files import name_beside
from rairl_ray.provenance import git_state
from rairl_ray.runfolder import RunFolder, Summary, write_summary
from rairl_ray.tracking.tracker import Tracker
from rairl_ray.trainer.prepare import Prepared
from rairl_ray.types import RewardedTrace, RolloutGroup

FREE_KEYS = {
    "output_dir": "where the run folder lies",
    "tracking.": "where metrics go",
    "cluster.": "which Ray cluster",
    "timeouts.": "how long a wait may last",
    "trainer.checkpoint_every": "how often state is saved",
    "trainer.keep_checkpoints": "how many are kept",
    "trainer.log_rollouts_every": "how many samples are kept",
    "trainer.max_restarts_per_role": "how often a failed group is started anew",
    "trainer.retry_backoff_seconds": "how long to wait before that",
    "placement.": "which rank runs where",
    "rollout.replicas": "how many engines sample; what vLLM samples may differ by rounding",
    "learner.replicas": "ranks of the policy learner; later updates differ by rounding",
    "learner.discriminator_replicas": "ranks of the discriminator learner; later updates differ by rounding",
    "learner.zero_stage": "how ranks share the state; later updates differ by rounding",
}
"""Keys (or prefixes of keys) that may change on a resume -> what they decide. None changes what is learned."""

SUMMARY_COLUMNS = ("metric", "value", "95% interval", "n")

LOGGED_ROLLOUTS = 32
"""Sample rollouts written per logged step."""


def code_version() -> str:
    """Commit of the code that runs, with -dirty where it was edited since; asked once, as files may change."""
    state = git_state()
    return state["git.commit"] + ("-dirty" if state["git.dirty"] == "true" else "")


class StopRequest:
    """A wish that a run may end: it finishes its step (SFT: up to two more updates), saves and leaves. Any
    thread may call `ask`."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def ask(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Pause; True at once when a stop is asked for."""
        return self._event.wait(seconds)

    @contextmanager
    def listening(self, display: Display) -> Iterator[None]:
        """Whatever must be in place while training is on; here nothing."""
        yield


class SignalStop(StopRequest):
    """Asked for by the first Ctrl-C or SIGTERM during training; a second one ends at once."""

    @contextmanager
    def listening(self, display: Display) -> Iterator[None]:
        """Handle the signals; only the main thread may, elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(number: int, _frame: Any) -> None:
            if self:
                raise KeyboardInterrupt
            self.ask()
            display.note(
                f"{signal.Signals(number).name}: finishing this step and saving; once more ends at once"
            )

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


MetricSink = Callable[[int, Mapping[str, float]], None]
"""(step, metrics): called on the run's own thread for each row that it logs."""


@dataclass
class RunContext:
    """One run while it is on."""

    prepared: Prepared
    plan: PlacementPlan
    folder: RunFolder
    store: CheckpointStore
    tracker: Tracker
    display: Display
    resumed: bool
    references: Future[dict[str, dict[str, str]]]
    """Frozen weights by role (async_checkpointer.references), being hashed."""
    verified: Path | None = None
    """The checkpoint that a resumed run starts from, its files checked; taken once."""
    code_version: str = field(default_factory=code_version)
    stop: StopRequest = field(default_factory=StopRequest)
    sinks: Sequence[MetricSink] = ()
    lent: PlacementGroup | None = None
    """Where the actors live, if the caller said so."""

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One step's metrics to the run folder first, then to the tracker and the caller's sinks."""
        self.folder.append_metrics(step, metrics)
        self.tracker.log(metrics, step)
        for sink in self.sinks:
            sink(step, metrics)

    def forget_after(self, step: int, evaluated: int | None = None) -> int:
        """Rows of later steps belong to a past that a resume has left; the lines dropped from metrics.jsonl.

        `evaluated`: the last step whose evaluation, in a row of its own, stays; `step` by default. The final
        evaluation never does: a run that goes on from its last step makes it again.
        """
        self.tracker.go_back_to(step)
        evaluated = step if evaluated is None else evaluated
        if self.config.eval.at_end and evaluated == self.config.trainer.steps:
            evaluated -= 1
        return self.folder.truncate_to_step(step, evaluated)

    def event(self, text: str) -> None:
        """A line in events.log and on the screen."""
        self.folder.event(text)
        self.display.note(text)

    def identity(self) -> Identity:
        """What this run is, for a checkpoint's manifest."""
        return Identity(
            config_hash=config_hash(self.config),
            code_version=self.code_version,
            mlflow_run_id=self.tracker.run_id,
            references=self.references.result(),
        )

    def newest_checkpoint(self) -> Path | None:
        """The newest good checkpoint. The start of a resumed run has looked already, with all checksums."""
        if self.verified is not None:
            path, self.verified = self.verified, None
            return path
        return self.store.latest_valid()

    def log_rollouts(
        self, step: int, groups: Sequence[RolloutGroup], rewarded: Sequence[Sequence[RewardedTrace]]
    ) -> None:
        """A sample of the rollouts with their rewards, to the run folder and as a table to the tracker."""
        every = self.config.trainer.log_rollouts_every
        if not every or step % every:
            return
        shown = [
            (group.prompt, rollout, trace)
            # a group's expert traces, which some advantages add, come after its samples
            for group, traces in zip(groups, rewarded, strict=True)
            for rollout, trace in zip(group.rollouts, traces, strict=False)
        ][:LOGGED_ROLLOUTS]
        rows = [
            {
                "prompt_id": prompt.id,
                "prompt": prompt.question,
                "generation": rollout.text,
                "generation_idx": rollout.sample_index,
                "finish_reason": rollout.finish_reason,
                "policy_version": rollout.policy_version,
                "discriminator_version": trace.discriminator_version,
                "token_rewards": [_finite(value) for value in trace.token_rewards],
                "seed": rollout.seed,
                "answer": prompt.answer,
                "correct": self.prepared.task.grade(prompt, rollout.text).correct,
            }
            for prompt, rollout, trace in shown
        ]
        self.folder.write_rollouts(step, rows)
        self.tracker.log_table(rows, f"rollouts/step-{step:06d}")

    def write_evaluation(self, name: str, summary: Summary, rows: list[EvalRow]) -> None:
        folder = self.folder.evaluation(name)
        write_rows(folder / "rows.jsonl", rows)
        write_summary(folder / "summary.json", summary)

    def finish(self, summary: Summary) -> None:
        """Upload the final artifacts and show the result and where it lies."""
        if self.config.tracking.log_artifacts:
            self.tracker.log_artifacts(self.folder.root / "final")
            self.tracker.log_artifacts(self.folder.evaluations)
        self.display.table(self.config.name, summary_rows(summary), SUMMARY_COLUMNS)
        reward = self.folder.final_reward_model
        self.display.finish(
            [
                f"final policy: {self.folder.final_policy}",
                *([f"reward model: {reward}"] if reward.is_dir() else []),
                f"metrics: {self.folder.metrics}",
                f"evaluation rows: {self.folder.evaluations}",
            ]
        )


def _finite(value: float) -> float | None:
    """A number that JSON has, to six digits; None for a trace without units, which has no reward."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def summary_rows(summary: Summary) -> list[dict[str, object]]:
    """One row a metric, with its 95% interval where it has one."""
    return [
        {
            "metric": name,
            "value": f"{entry['value']:.4f}",
            "95% interval": f"{entry['low']:.4f} .. {entry['high']:.4f}" if "low" in entry else "",
            "n": f"{entry['n']:.0f}" if "n" in entry else "",
        }
        for name, entry in summary.items()
    ]


def open_folder(config: RunConfig, resume: str | None, display: Display) -> RunFolder:
    """The run folder to write to.

    A fresh start never destroys an earlier run of the same name: that one is moved aside to NAME~1.

    Raises:
        ResumeError: nothing to resume, or the configuration contradicts the run; all differing keys are named.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    if resume is not None:
        folder = resumable(config, resume)
    elif folder.root.exists() and any(folder.root.iterdir()):
        with folder.lock():
            aside = name_beside(folder.root)
        folder.root.rename(aside)
        display.note(f"an earlier run of this name was moved to {aside}")
    folder.create()
    return folder


def resumable(config: RunConfig, resume: str) -> RunFolder:
    """The folder of the run to resume, given as a path or as a name below `output_dir`."""
    root = run_root("--resume", resume, config.output_dir)
    if not RunFolder(root).checkpoints.is_dir():
        raise ResumeError(
            f"--resume {resume}: {root} is no training run (it has no folder checkpoints); name one that is"
        )
    refuse_other(config, root, resume)
    return RunFolder(root)


def refuse_other(config: RunConfig, root: Path, resume: str) -> None:
    """Raises ResumeError with every key in which a configuration contradicts the run of a folder."""
    saved = read_saved(root / "config.yaml")
    changed = [
        f"{key} (run: {old}, now: {new})"
        for key, old, new in differences(saved, config)
        if not key.startswith(tuple(FREE_KEYS))
    ]
    if changed:
        raise ResumeError(
            f"--resume {resume}: the configuration contradicts the run in {', '.join(changed)}; "
            "give the run's own values, or start a new run with another name="
        )


def run_root(option: str, run: str, output_dir: str) -> Path:
    """A run's folder, given as a path or as a name below `output_dir`. Raises ResumeError."""
    if not run:
        raise ResumeError(f"{option}: has no value; give the run's folder, or its name below output_dir")
    candidates = [Path(run), Path(output_dir) / run]
    root = next((path for path in candidates if (path / "config.yaml").is_file()), None)
    if root is None:
        raise ResumeError(
            f"{option} {run}: neither {candidates[0]} nor {output_dir}/{run} is a run folder with a "
            "config.yaml; give the run's folder, or its name below output_dir"
        )
    return root


def save_config(folder: RunFolder, config: RunConfig) -> None:
    folder.write_config(dump_yaml(config))
