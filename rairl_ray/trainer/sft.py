"""SFT: cross-entropy on the expert's completion tokens, by Ray Train around the same DeepSpeed engine.

driver                                  TorchTrainer workers (one per rank, `sft_worker.train_worker`)
──────                                  ───────────────────────────────────────────────────────────────
evaluate the untrained policy
trainer.fit() ────────────────────────> same cursor on every rank, each takes its own micro-batches
metrics, MLflow, display  <──channel─── rank 0: its phase, one row per update
checkpoint committed      <──channel─── rank 0: what all ranks have written beside training
stop request              ──channel───> rank 0, which tells the others
evaluate, report          <──────────── final/policy

Ray Train waits for its workers without an end; here each phase that rank 0 tells has its deadline. Whatever
fails ends the attempt, and `recovery.py` makes the next one: Ray Train itself retries nothing.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rairl_ray.actors.draining import Drained
from rairl_ray.actors.group import GroupFailure, Interrupted, attribute_failure
from rairl_ray.actors.head import check_silence
from rairl_ray.actors.learner import learner_environment
from rairl_ray.actors.process_monitor import ANY_RANK, GONE, ActorProcess
from rairl_ray.actors.weight_sync import put_update
from rairl_ray.config.machine_schema import Timeouts
from rairl_ray.engines.weights import saved_chunks
from rairl_ray.errors import UserError
from rairl_ray.files import planted
from rairl_ray.runfolder import Summary
from rairl_ray.trainer.async_checkpointer import AsyncCheckpointer
from rairl_ray.trainer.evaluator import Evaluator, values_of
from rairl_ray.trainer.recovery import Recovery
from rairl_ray.trainer.run_context import RunContext
from rairl_ray.trainer.sft_channel import Message, SftChannel
from rairl_ray.trainer.sft_worker import train_worker
from rairl_ray.trainer.worker_groups import WorkerGroups

POLL_SECONDS = 0.2
DRAIN_SECONDS = 5.0
"""Between two looks for nodes that are about to go."""


def run(context: RunContext) -> bool:
    """The whole run; True when it finished, False when it was asked to stop (its state is saved)."""
    recovery = Recovery(context)
    while recovery.goes_on():
        with recovery.attempt():
            workers = recovery.start_workers()
            try:
                finished = _to_the_end(context, workers, recovery.resumes, recovery.ready)
            except Interrupted:
                context.event(f"stopped inside an evaluation; go on with --resume {context.config.name}")
                finished = False
            workers.close()
            return finished
    return False


def _to_the_end(context: RunContext, workers: WorkerGroups, resume: bool, ready: Callable[[], None]) -> bool:
    config = context.config
    workers.rollouts.open()
    evaluator = Evaluator(config, context.prepared.task, workers.rollouts, None, lambda: bool(context.stop))
    if not resume or context.store.latest_valid() is None:
        context.forget_after(-1)
        if config.eval.at_start:
            workers.rollouts.serve_disk_weights()
            _evaluate(context, evaluator, "start", 0)
    context.display.phase("training", config.trainer.steps)
    last, finished = Fit(context, workers, ready).run()
    if not finished:
        context.event(f"stopped after update {last}; go on with --resume {config.name}")
        return False
    summary: Summary = {}
    if config.eval.at_end:
        chunks, adapter = saved_chunks(context.folder.final_policy)
        workers.rollouts.sync(put_update(chunks, max(last, 1), adapter))
        summary = _evaluate(context, evaluator, "final", last)
    context.finish(summary)
    return True


def _evaluate(context: RunContext, evaluator: Evaluator, name: str, step: int) -> Summary:
    context.display.phase(f"evaluating ({name})")
    summary, rows = evaluator.evaluate()
    context.write_evaluation(name, summary, rows)
    context.log(step, values_of(summary))
    context.display.show(values_of(summary))
    return summary


class Fit:
    """Ray Train's part of one attempt, under watch: rows come out as they are made, no phase lasts for ever."""

    def __init__(self, context: RunContext, workers: WorkerGroups, ready: Callable[[], None]) -> None:
        self._context, self._workers, self._ready = context, workers, ready
        self._monitor = workers.monitor
        self._channel = SftChannel(self._monitor, context.config.timeouts)
        self._checkpointer = AsyncCheckpointer(context, {})
        for rank in range(context.config.learner.replicas):
            self._monitor.add(ActorProcess("policy", rank, None))
        self._error: BaseException | None = None
        self._raised: dict[int, UserError | str] = {}
        """What the workers' own code raised, by rank, the first one first."""
        self._phase, self._since = "start", time.monotonic()
        self._last, self._finished = 0, False

    def run(self) -> tuple[int, bool]:
        """(last update, whether training is complete).

        Raises:
            GroupFailure: a worker failed, or a phase missed its deadline.
            UserError: raised inside a worker comes out as itself.
            Drained: nodes of the run are about to go, and its state is saved.
            Stranded: the head has been away for too long.
        """
        thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        thread.start()
        asked, looked, drained = False, time.monotonic(), set[str]()
        while True:
            alive = thread.is_alive()
            messages = self._channel.take()
            for message in messages:
                self._hear(message)
            if not alive and not messages:
                break
            if time.monotonic() - self._since > phase_seconds(self._context.config.timeouts, self._phase):
                if self._finished:
                    self._context.event(
                        "Ray Train does not end after its last update; it is left to the cluster"
                    )
                    break
                raise self._late()
            if not asked and time.monotonic() - looked > DRAIN_SECONDS:
                looked, drained = time.monotonic(), self._monitor.draining()
                check_silence()
            if (self._context.stop or drained) and not asked:
                self._channel.ask_to_stop()
                asked = True
            if not messages:
                time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._explained(self._error)
        self._channel.close()
        self._checkpointer.require()
        if drained and not (self._finished or self._context.stop):
            raise Drained(drained, self._last)
        shutil.rmtree(self._context.folder.root / ".ray_train", ignore_errors=True)
        return self._last, self._finished

    def _fit(self) -> None:
        try:
            with planted(self._context.folder.root) as sign:
                _trainer(self._context, self._workers, self._channel, sign).fit()
        except BaseException as error:
            self._error = error

    def _hear(self, message: Message) -> None:
        context, step = self._context, message.step
        if message.kind == "joined":
            joined = message.content
            self._monitor.add(ActorProcess("policy", joined.rank, None, *joined.place))
            if joined.group is not None and joined.group not in self._monitor.groups:
                self._monitor.groups.append(joined.group)
            return
        if message.kind == "failed":
            self._raised |= dict([message.content])
            return
        self._since = time.monotonic()
        if message.kind == "phase":
            self._phase = message.content
        elif message.kind == "restored":
            dropped = context.forget_after(step)
            self._progress(step)
            self._ready()
            context.event(
                f"workers start from update {step}; {dropped} later rows of metrics.jsonl are made again"
            )
        elif message.kind == "event":
            context.event(message.content)
        elif message.kind == "unwritable":
            self._checkpointer.failed(step, message.content)
        elif message.kind == "written":
            draft, report = message.content
            self._checkpointer.commit(draft, {"policy": report}, {"policy": step})
        elif message.kind == "finished":
            self._finished = True
        elif message.kind == "update":
            metrics = {**message.content, **context.prepared.facts, **self._checkpointer.take_metrics()}
            context.log(step, metrics)
            context.display.step(step, metrics)
            self._progress(step)

    def _progress(self, step: int) -> None:
        self._last = self._channel.last_step = step
        self._workers.finished(step)

    def _late(self) -> GroupFailure:
        seconds = phase_seconds(self._context.config.timeouts, self._phase)
        text = (
            f"policy (SFT workers): no sign of life within {seconds:g} s in phase {self._phase} "
            f"(last finished step {self._last})"
        )
        suspect = self._monitor.processes["policy", 0]
        return attribute_failure(text, suspect, self._monitor, self._phase, self._last, self._since)

    def _explained(self, error: BaseException) -> BaseException:
        """The worker's own error where it is one that a user can act on, else a one-paragraph failure."""
        user_errors = [cause for cause in self._raised.values() if isinstance(cause, UserError)]
        if user_errors:
            return user_errors[0]
        # Ray Train has ended all workers by now: who died by itself is what it met, not what is seen today.
        failures = getattr(error, "worker_failures", None) or {}
        dead = [rank for rank, failure in failures.items() if hasattr(failure, "health_check_failure")]
        suspect = self._monitor.processes["policy", [*sorted(dead), *self._raised, *failures, 0][0]]
        cause = self._raised.get(suspect.rank) or failures.get(suspect.rank) or error
        text = (
            f"{suspect.name} failed in phase {self._phase}, last finished step {self._last}: "
            f"{' '.join(str(cause).split())[:800]}"
        )
        text = f"{suspect.name} is {GONE}. {text}" if dead else text
        return attribute_failure(text, suspect, None, self._phase, self._last, self._since)


def phase_seconds(timeouts: Timeouts, phase: str) -> float:
    """The deadline of a phase of the workers; each message from rank 0 starts the clock anew."""
    return {
        "start": timeouts.placement_seconds + timeouts.start_seconds,
        "open": timeouts.start_seconds,
        "load": timeouts.checkpoint_seconds,
        "update": timeouts.update_seconds,
        "save": timeouts.checkpoint_seconds,
        "export": timeouts.checkpoint_seconds,
        "end": timeouts.teardown_seconds,
    }[phase]


def _trainer(context: RunContext, workers: WorkerGroups, channel: SftChannel, sign: Path) -> TorchTrainer:
    config = context.config
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = dict(context.plan.roles["policy"][0].resources)
    environment = {
        **learner_environment(config, "policy", workers.device),
        **workers.monitor.mark("policy", ANY_RANK),
    }
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "policy_path": context.prepared.policy_path,
            "device": workers.device,
            "folder": str(context.folder.root),
            "sign": sign,
            "verified": context.verified,
            "channel": channel.handle,
        },
        torch_config=TorchConfig(timeout_s=int(config.timeouts.start_seconds) + 1),
        scaling_config=ScalingConfig(
            num_workers=config.learner.replicas,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            label_selector=dict(context.plan.selectors.get("policy", {})) or None,
        ),
        run_config=RunConfig(
            # A name of its own: Ray Train would go on from an earlier attempt's bookkeeping.
            name=f"sft-{workers.monitor.attempt}",
            storage_path=str(context.folder.root / ".ray_train"),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": environment},
        ),
    )
