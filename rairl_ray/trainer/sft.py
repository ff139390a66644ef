"""SFT: cross-entropy on the expert's completion tokens, by Ray Train around the same DeepSpeed engine.

driver                                  TorchTrainer workers (one per rank, `sft_worker.train_worker`)
──────                                  ───────────────────────────────────────────────────────────────
evaluate the untrained policy
trainer.fit() ────────────────────────> same cursor on every rank, each takes its own micro-batches
metrics, MLflow, display  <──relay───── rank 0: its phase, one row per update
checkpoint committed      <──relay───── rank 0: what all ranks have written beside training
stop request              ──relay─────> rank 0, which tells the others
evaluate, report          <──────────── final/policy

Ray Train waits for its workers without an end; here each phase that rank 0 tells has its deadline. Whatever
fails ends the attempt, and `attempts.py` makes the next one: Ray Train itself retries nothing.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rairl_ray.actors.draining import Drained
from rairl_ray.actors.group import GroupFailure, Interrupted, blamed
from rairl_ray.actors.learner import learner_environment
from rairl_ray.actors.roster import ANY_RANK, GONE, Member
from rairl_ray.actors.weight_sync import put_update
from rairl_ray.config.machine_schema import Timeouts
from rairl_ray.engines.weights import saved_chunks
from rairl_ray.errors import UserError
from rairl_ray.runfolder import Summary
from rairl_ray.trainer.attempts import run_attempts
from rairl_ray.trainer.heldout import HeldOut, values_of
from rairl_ray.trainer.parts import Parts
from rairl_ray.trainer.relay import Message, Relay
from rairl_ray.trainer.saving import Saving
from rairl_ray.trainer.session import Session
from rairl_ray.trainer.sft_worker import train_worker

POLL_SECONDS = 0.2
DRAIN_SECONDS = 5.0
"""Between two looks for nodes that are about to go."""


def run(session: Session) -> bool:
    """The whole run; True when it finished, False when it was asked to stop (its state is saved)."""
    return run_attempts(session, lambda parts, resume, ready: _attempt(session, parts, resume, ready))


def _attempt(session: Session, parts: Parts, resume: bool, ready: Callable[[], None]) -> bool:
    try:
        return _to_the_end(session, parts, resume, ready)
    except Interrupted:
        session.event(f"stopped inside an evaluation; go on with --resume {session.config.name}")
        return False


def _to_the_end(session: Session, parts: Parts, resume: bool, ready: Callable[[], None]) -> bool:
    config = session.config
    parts.rollouts.open()
    heldout = HeldOut(config, session.prepared.task, parts.rollouts, None, lambda: bool(session.stop))
    if not resume or session.store.latest_valid() is None:
        session.forget_after(-1)
        if config.eval.at_start:
            parts.rollouts.serve_disk_weights()
            _evaluate(session, heldout, "start", 0)
    session.display.phase("training", config.trainer.steps)
    last, finished = Fit(session, parts, ready).run()
    if not finished:
        session.event(f"stopped after update {last}; go on with --resume {config.name}")
        return False
    summary: Summary = {}
    if config.eval.at_end:
        chunks, adapter = saved_chunks(session.folder.final_policy)
        parts.rollouts.sync(put_update(chunks, max(last, 1), adapter))
        summary = _evaluate(session, heldout, "final", last)
    session.finish(summary)
    return True


def _evaluate(session: Session, heldout: HeldOut, name: str, step: int) -> Summary:
    session.display.phase(f"evaluating ({name})")
    summary, rows = heldout.evaluate()
    session.write_evaluation(name, summary, rows)
    session.log(step, values_of(summary))
    session.display.show(values_of(summary))
    return summary


class Fit:
    """Ray Train's part of one attempt, under watch: rows come out as they are made, no phase lasts for ever."""

    def __init__(self, session: Session, parts: Parts, ready: Callable[[], None]) -> None:
        self._session, self._parts, self._ready = session, parts, ready
        self._roster = parts.roster
        self._relay = Relay(self._roster, session.config.timeouts)
        self._saving = Saving(session, {})
        for rank in range(session.config.learner.replicas):
            self._roster.add(Member("policy", rank, None))
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
        """
        thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)
        thread.start()
        asked, looked, drained = False, time.monotonic(), set[str]()
        while True:
            alive = thread.is_alive()
            messages = self._relay.take()
            for message in messages:
                self._hear(message)
            if not alive and not messages:
                break
            if time.monotonic() - self._since > phase_seconds(self._session.config.timeouts, self._phase):
                if self._finished:
                    self._session.event(
                        "Ray Train does not end after its last update; it is left to the cluster"
                    )
                    break
                raise self._late()
            if not asked and time.monotonic() - looked > DRAIN_SECONDS:
                looked, drained = time.monotonic(), self._roster.draining()
            if (self._session.stop or drained) and not asked:
                self._relay.ask_to_stop()
                asked = True
            if not messages:
                time.sleep(POLL_SECONDS)
        if self._error is not None:
            raise self._explained(self._error)
        self._relay.close()
        self._saving.require()
        if drained and not (self._finished or self._session.stop):
            raise Drained(drained, self._last)
        shutil.rmtree(self._session.folder.root / ".ray_train", ignore_errors=True)
        return self._last, self._finished

    def _fit(self) -> None:
        try:
            _trainer(self._session, self._parts, self._relay).fit()
        except BaseException as error:
            self._error = error

    def _hear(self, message: Message) -> None:
        session, step = self._session, message.step
        if message.kind == "joined":
            joined = message.content
            self._roster.add(Member("policy", joined.rank, None, *joined.place))
            if joined.group is not None and joined.group not in self._roster.groups:
                self._roster.groups.append(joined.group)
            return
        if message.kind == "failed":
            self._raised |= dict([message.content])
            return
        self._since = time.monotonic()
        if message.kind == "phase":
            self._phase = message.content
        elif message.kind == "restored":
            dropped = session.forget_after(step)
            self._progress(step)
            self._ready()
            session.event(
                f"workers start from update {step}; {dropped} later rows of metrics.jsonl are made again"
            )
        elif message.kind == "event":
            session.event(message.content)
        elif message.kind == "unwritable":
            self._saving.failed(step, message.content)
        elif message.kind == "written":
            draft, report = message.content
            self._saving.commit(draft, {"policy": report}, {"policy": step})
        elif message.kind == "finished":
            self._finished = True
        elif message.kind == "update":
            metrics = {**message.content, **session.prepared.facts, **self._saving.take_metrics()}
            session.log(step, metrics)
            session.display.step(step, metrics)
            self._progress(step)

    def _progress(self, step: int) -> None:
        self._last = self._relay.last_step = step
        self._parts.finished(step)

    def _late(self) -> GroupFailure:
        seconds = phase_seconds(self._session.config.timeouts, self._phase)
        text = (
            f"policy (SFT workers): no sign of life within {seconds:g} s in phase {self._phase} "
            f"(last finished step {self._last})"
        )
        suspect = self._roster.members["policy", 0]
        return blamed(text, suspect, self._roster, self._phase, self._last, self._since)

    def _explained(self, error: BaseException) -> BaseException:
        """The worker's own error where it is one that a user can act on, else a one-paragraph failure."""
        user_errors = [cause for cause in self._raised.values() if isinstance(cause, UserError)]
        if user_errors:
            return user_errors[0]
        # Ray Train has ended all workers by now: who died by itself is what it met, not what is seen today.
        failures = getattr(error, "worker_failures", None) or {}
        dead = [rank for rank, failure in failures.items() if hasattr(failure, "health_check_failure")]
        suspect = self._roster.members["policy", [*sorted(dead), *self._raised, *failures, 0][0]]
        cause = self._raised.get(suspect.rank) or failures.get(suspect.rank) or error
        text = (
            f"{suspect.name} failed in phase {self._phase}, last finished step {self._last}: "
            f"{' '.join(str(cause).split())[:800]}"
        )
        text = f"{suspect.name} is {GONE}. {text}" if dead else text
        return blamed(text, suspect, None, self._phase, self._last, self._since)


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


def _trainer(session: Session, parts: Parts, relay: Relay) -> TorchTrainer:
    config = session.config
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = dict(session.plan.roles["policy"][0].resources)
    threads = config.placement.threads_per_actor or os.cpu_count() or 1
    environment = {
        **learner_environment(config, parts.device, threads),
        **parts.roster.mark("policy", ANY_RANK),
    }
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "policy_path": session.prepared.policy_path,
            "device": parts.device,
            "folder": str(session.folder.root),
            "verified": session.verified,
            "relay": relay.handle,
        },
        torch_config=TorchConfig(timeout_s=int(config.timeouts.start_seconds) + 1),
        scaling_config=ScalingConfig(
            num_workers=config.learner.replicas,
            use_gpu="GPU" in resources,
            resources_per_worker=resources,
            label_selector=dict(session.plan.selectors.get("policy", {})) or None,
        ),
        run_config=RunConfig(
            # A name of its own: Ray Train would go on from an earlier attempt's bookkeeping.
            name=f"sft-{parts.roster.attempt}",
            storage_path=str(session.folder.root / ".ray_train"),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": environment},
        ),
    )
