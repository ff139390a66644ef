"""Writes checkpoints beside training: one at a time, and the driver commits it when all ranks are done.

    driver           begin ── save ──────── step ── poll ── step ── poll, commit ──
    learner ranks            copy │ train ──────── train ──────── train
    their threads                 └ write, fsync, hash ──────┘

Training waits for the copy, for a commit (small files and a rename), and for the whole write only where the
next checkpoint is due before the last one is on the disk, at the end, and when asked to stop. A disk that
fails costs a warning and that checkpoint, never the run; only at the end is it an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rairl_ray import metrics as names
from rairl_ray.actors.learner import LearnerWorkers
from rairl_ray.checkpoint import Draft
from rairl_ray.config.schema import RunConfig
from rairl_ray.engines.artifacts import reference_path
from rairl_ray.engines.origin import content_id
from rairl_ray.errors import ResumeError, RunFailure
from rairl_ray.trainer.prepare import Prepared
from rairl_ray.trainer.run_context import RunContext
from rairl_ray.types import Written


@dataclass
class _InFlight:
    draft: Draft
    versions: dict[str, int]
    reports: dict[str, Written]
    """Of the roles whose ranks have all written."""


class AsyncCheckpointer:
    """The checkpoints of one attempt at a run."""

    def __init__(self, context: RunContext, learners: Mapping[str, LearnerWorkers]) -> None:
        self._context = context
        self._learners = learners
        self._in_flight: _InFlight | None = None
        self._error: str | None = None
        """Why the newest checkpoint could not be written."""
        self._metrics: dict[str, float] = {}
        self.newest: dict[str, Any] | None = None
        """State of the newest checkpoint that is written or being written."""

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy everything and begin to write it. An earlier checkpoint that is still on is waited for.

        Args:
            state: the trainer's own, as for `CheckpointStore.begin`.
        """
        self.finish()
        try:
            draft = self._context.store.begin(step, state)
        except OSError as error:
            self.failed(step, str(error))
            return
        for role, workers in self._learners.items():
            workers.save(draft.folder / role)
        versions = {role: workers.version for role, workers in self._learners.items()}
        self._in_flight = _InFlight(draft, versions, {})
        self.newest = dict(state)

    def poll(self, wait: bool = False) -> None:
        """Commit the checkpoint that is being written if all ranks are done."""
        flight = self._in_flight
        if flight is None:
            return
        for role, workers in self._learners.items():
            if role not in flight.reports:
                report = workers.written(wait)
                if report is None:
                    return
                flight.reports[role] = report
        self._in_flight = None
        self.commit(flight.draft, flight.reports, flight.versions)

    def finish(self) -> None:
        """Wait until nothing is being written any more."""
        self.poll(wait=True)

    def require(self) -> None:
        """`finish`, where the last checkpoint must be there.

        Raises:
            RunFailure: it could not be written.
        """
        self.finish()
        if self._error is not None:
            raise RunFailure(self._error)

    def commit(self, draft: Draft, reports: Mapping[str, Written], versions: Mapping[str, int]) -> None:
        """Finish a checkpoint whose ranks have all written, or give it up where one could not."""
        context = self._context
        errors = [report.error for report in reports.values() if report.error is not None]
        if errors:
            context.store.abort(draft)
            self.failed(draft.step, "; ".join(errors))
            return
        identity = context.identity()
        try:
            context.store.commit(draft, reports, versions, identity)
        except OSError as error:
            self.failed(draft.step, str(error))
            return
        self._error = None
        sizes = [facts["size"] for report in reports.values() for facts in report.files.values()]
        seconds = max(report.seconds for report in reports.values())
        self._metrics = {names.CHECKPOINT_WRITE_SECONDS: seconds, names.CHECKPOINT_BYTES: float(sum(sizes))}

    def take_metrics(self) -> dict[str, float]:
        """Of the checkpoint committed since the last call, for the row of the step that found it committed."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def failed(self, step: int, error: str) -> None:
        """Tell the user of a checkpoint that could not be written; the run goes on."""
        self.newest = None
        self._error = (
            f"checkpoint of step {step} could not be written: {' '.join(error.split())}; the last good one "
            "stays, and writing is tried again when the next one is due: make room on the disk"
        )
        self._context.event(self._error)


# --- frozen weights that no checkpoint holds ------------------------------------------------------


def references(prepared: Prepared) -> dict[str, dict[str, str]]:
    """Role -> path and content of the weights that it starts from as a saved reward, compares with, or that its
    adapter stands on."""
    found = {}
    for role, revision, path in _frozen(prepared.config, prepared):
        found[role] = {"path": path, "content": content_id(path, revision)}
    return found


def _frozen(config: RunConfig, prepared: Prepared) -> list[tuple[str, str | None, str]]:
    policy, discriminator = config.model.policy, config.model.read_discriminator
    compared = config.policy.kl_coefficient > 0 and config.algorithm.needs.rollouts
    roles = []
    if policy.lora.rank is not None or compared:
        roles.append(("policy", policy.revision, prepared.policy_path))
    implicit, start = config.discriminator.head_needs.reference, prepared.start
    if start is not None:
        roles.append(("discriminator", None, str(start.folder)))
        if implicit:
            path = reference_path(start.folder, start.settings)
            roles.append(("discriminator's reference", start.settings.reference_revision, path))
    elif config.algorithm.needs.discriminator and (discriminator.lora.rank is not None or implicit):
        roles.append(("discriminator", discriminator.revision, prepared.discriminator_path))
    return roles


def check_references(
    saved: Mapping[str, Mapping[str, str]], now: Mapping[str, Mapping[str, str]], path: Path
) -> None:
    """The frozen weights must be those that the checkpoint was trained with.

    Raises:
        ResumeError: naming role, path and both contents.
    """
    for role, before in saved.items():
        found = now.get(role, {"path": "none", "content": "none"})
        if found["content"] != before["content"]:
            raise ResumeError(
                f"{path}: the frozen weights of the {role} were {before['content']} (from {before['path']}), "
                f"and are now {found['content']} (from {found['path']}); give back the model it began with"
            )
