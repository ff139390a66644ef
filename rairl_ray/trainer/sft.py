"""SFT: cross-entropy on the expert's completion tokens, by Ray Train around the same DeepSpeed engine.

driver                                  TorchTrainer workers (one per rank, `sft_worker.train_worker`)
──────                                  ───────────────────────────────────────────────────────────────
evaluate the untrained policy
trainer.fit() ────────────────────────> same cursor on every rank, each takes its own micro-batches
metrics, MLflow, display  <──queue───── rank 0: one row per update, checkpoints of the same layout
stop request              ──queue─────> rank 0, which tells the others
evaluate, report          <──────────── final/policy
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.util.queue import Empty, Queue

from rairl_ray.actors.group import GroupFailure
from rairl_ray.actors.learner import learner_environment
from rairl_ray.engines.weights import read_payload
from rairl_ray.errors import UserError
from rairl_ray.runfolder import Summary
from rairl_ray.trainer.heldout import HeldOut, values_of
from rairl_ray.trainer.parts import Parts, start_parts
from rairl_ray.trainer.session import Session
from rairl_ray.trainer.sft_worker import train_worker


def run(session: Session) -> bool:
    """The whole run; True when it finished, False when it was asked to stop (its state is saved)."""
    config, prepared = session.config, session.prepared
    session.display.phase("starting actors")
    parts = start_parts(prepared, session.plan)
    try:
        parts.rollouts.open()
        heldout = HeldOut(config, prepared.task, parts.rollouts, None)
        if config.eval.at_start and not session.resumed:
            parts.rollouts.serve_disk_weights()
            _evaluate(session, heldout, "start", 0)
        if not session.resumed:
            session.folder.truncate_to_step(0)
        session.display.phase("training", config.trainer.steps)
        last, finished = _fit(session, parts)
        if not finished:
            session.event(f"stopped after update {last}; go on with --resume {config.name}")
            return False
        summary: Summary = {}
        if config.eval.at_end:
            parts.rollouts.sync(ray.put(read_payload(session.folder.final_policy)), max(last, 1))
            summary = _evaluate(session, heldout, "final", last)
        session.finish(summary)
        return True
    finally:
        parts.close()


def _evaluate(session: Session, heldout: HeldOut, name: str, step: int) -> Summary:
    session.display.phase(f"evaluating ({name})")
    summary, rows = heldout.evaluate()
    session.write_evaluation(name, summary, rows)
    session.log(step, values_of(summary))
    session.display.show(values_of(summary))
    return summary


def _fit(session: Session, parts: Parts) -> tuple[int, bool]:
    """Run the workers, relaying their rows as they come; (last update, whether training is complete).

    Raises:
        GroupFailure: when the workers failed more often than `trainer.failure_retries`.
    """
    rows, stop = Queue(actor_options={"num_cpus": 0}), Queue(actor_options={"num_cpus": 0})
    trainer = _trainer(session, parts, rows, stop)
    outcome: dict[str, BaseException | None] = {}

    def fit() -> None:
        try:
            trainer.fit()
            outcome["error"] = None
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    last, finished, asked = 0, False, False
    for message in _messages(rows, thread):
        kind, step, metrics = message
        if kind == "restored":
            dropped = session.folder.truncate_to_step(step)
            session.event(
                f"workers start from update {step}; {dropped} later rows of metrics.jsonl are made again"
            )
        elif kind == "finished":
            finished = True
        elif kind == "update":
            session.log(step, metrics)
            session.display.step(step, metrics)
        last = max(last, step) if kind == "update" else step
        if session.stop and not asked:
            stop.put(True)
            asked = True
    for channel in (rows, stop):
        channel.shutdown()
    shutil.rmtree(session.folder.root / ".ray_train", ignore_errors=True)
    error = outcome.get("error")
    if error is not None:
        raise _explained(error, last)
    return last, finished


def _trainer(session: Session, parts: Parts, rows: Queue, stop: Queue) -> TorchTrainer:
    config = session.config
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    resources = dict(session.plan.roles["policy"][0].resources)
    threads = config.placement.threads_per_actor or os.cpu_count() or 1
    return TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config,
            "policy_path": session.prepared.policy_path,
            "device": parts.device,
            "folder": str(session.folder.root),
            "mlflow_run_id": session.tracker.run_id,
            "rows": rows,
            "stop": stop,
        },
        scaling_config=ScalingConfig(
            num_workers=config.learner.replicas, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="sft",
            storage_path=str(session.folder.root / ".ray_train"),
            failure_config=FailureConfig(max_failures=config.trainer.failure_retries),
            worker_runtime_env={"env_vars": dict(learner_environment(config, parts.device, threads))},
        ),
    )


def _messages(rows: Queue, thread: threading.Thread) -> Iterator[tuple[str, int, dict[str, float]]]:
    """What rank 0 sends, until the trainer's thread has ended and the queue is empty."""
    while True:
        alive = thread.is_alive()
        try:
            yield rows.get(timeout=0.5)
        except Empty:
            if not alive:
                return


def _explained(error: BaseException, last: int) -> BaseException:
    """The worker's own error where it is one that a user can act on, else a one-paragraph failure."""
    cause: Any = error
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        inner = getattr(cause, "worker_failures", None)
        cause = (
            next(iter(inner.values()), None) if inner else (cause.__cause__ or getattr(cause, "cause", None))
        )
    text = " ".join(str(error).split())[:800]
    return GroupFailure(f"policy (SFT workers): failed after update {last}: {text}")
