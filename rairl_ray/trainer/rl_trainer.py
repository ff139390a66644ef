"""An airl or grpo run around `Loop.step`: start or resume, warm up, step, evaluate, checkpoint, export.

A failed actor group ends the attempt; `recovery.py` starts the next one from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rairl_ray import metrics as names
from rairl_ray.actors.draining import Drained
from rairl_ray.actors.group import Interrupted
from rairl_ray.actors.head import Stranded, check_silence
from rairl_ray.actors.learner import LearnerWorkers
from rairl_ray.actors.pool import RolloutPool
from rairl_ray.algorithms.warmup import WarmupGate
from rairl_ray.config.transport import weight_transport
from rairl_ray.metrics import PhaseTimer
from rairl_ray.runfolder import Summary
from rairl_ray.trainer.airl import AirlStrategy
from rairl_ray.trainer.async_checkpointer import AsyncCheckpointer
from rairl_ray.trainer.evaluator import Evaluator, values_of
from rairl_ray.trainer.grpo import GrpoStrategy
from rairl_ray.trainer.loop import Loop
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.trainer.recovery import Recovery
from rairl_ray.trainer.run_context import RunContext
from rairl_ray.trainer.warmup import WarmupPool
from rairl_ray.trainer.worker_groups import WorkerGroups


def run(context: RunContext) -> bool:
    """The whole run; True when it finished, False when it was asked to stop (its state is saved)."""
    recovery = Recovery(context)
    while recovery.goes_on():
        with recovery.attempt():
            workers = recovery.start_workers()
            trainer = RLTrainer(context, workers)
            trainer.begin(recovery.resumes)
            recovery.ready()
            summary = None
            with suppress(Interrupted):
                summary = trainer.to_the_end()
            finished = trainer.stopped() if summary is None else trainer.export(summary)
            workers.close()
            return finished
    return False


@dataclass
class Progress:
    """Where a run stands, beyond weights and cursors."""

    step: int = 0
    """Finished policy steps."""
    warmup: int = 0
    """Finished warm-up updates of the discriminator."""
    warmed_up: bool = False
    unevaluated: dict[str, float] | None = None
    """The row of `step` while its evaluation is not done; where a stop cuts that off, the resume does it."""


class RLTrainer:
    """One attempt at an airl or grpo run, on the workers that were started for it."""

    def __init__(self, context: RunContext, workers: WorkerGroups) -> None:
        assert workers.policy is not None
        prepared, config = context.prepared, context.config
        self.context = context
        self.config = config
        self.workers = workers
        self.policy = workers.policy
        self.progress = Progress()
        self.learners: dict[str, LearnerWorkers] = {"policy": workers.policy}
        if workers.discriminator is not None:
            self.learners["discriminator"] = workers.discriminator
        self.checkpointer = AsyncCheckpointer(context, self.learners)
        self.sampler = PromptSampler(prepared.task, config.seed, config.trainer.max_staleness_steps)
        self.airl: AirlStrategy | None = None
        if workers.discriminator is not None:
            self.airl = AirlStrategy(
                config, prepared.task, self.sampler, prepared.policy_renderer, prepared.reader,
                workers.discriminator, workers.policy,
            )  # fmt: skip
        self.reward = self.airl or GrpoStrategy(prepared.task, prepared.policy_renderer, config.reward)
        self.loop = Loop(config, self.sampler, workers.rollouts, workers.policy, self.reward)
        by_itself = weight_transport(config, workers.device) == "object_store"
        alone = config.trainer.max_staleness_steps == 0 and by_itself
        self.rollout_pool = RolloutPool(
            config, context.plan, workers.rollouts, workers.spawn_rollout, self.loop.bring_up, context.event,
            config.trainer.max_restarts_per_role if alone else 0,
        )  # fmt: skip
        scorer = None if self.airl is None else self.airl.scorer
        self.evaluator = Evaluator(config, prepared.task, workers.rollouts, scorer, lambda: bool(context.stop))

    def begin(self, resume: bool) -> None:
        """From start or checkpoint to where training goes on."""
        self._open()
        restored = self._restore() if resume else False
        self.loop.sync()
        if self.config.eval.at_start and not restored:
            self.progress.unevaluated = {}

    def to_the_end(self) -> Summary | None:
        """From where the run stands to its final evaluation; None when asked to stop.

        Raises:
            Interrupted: asked to stop while samples were awaited that no step trains on.
        """
        config, context = self.config, self.context
        if (row := self.progress.unevaluated) is not None:
            self._log_evaluation(self._evaluate(), row)
        if not self._warm_up():
            return None
        context.display.phase("training", config.trainer.steps, self.progress.step)
        for step in range(self.progress.step + 1, config.trainer.steps + 1):
            self._step(step)
            if context.stop and step < config.trainer.steps:
                return None
            self._leave_drained_nodes()
        if not config.eval.at_end:
            return {}
        summary = self._evaluate("final")
        self._log_evaluation(summary)
        return summary

    # --- the parts of a run ------------------------------------------------------------------------

    def _open(self) -> None:
        """The engines first: vLLM takes its share of what is free, and must see no change while it starts."""
        config = self.config
        steps = config.trainer.steps * config.policy.minibatches_per_step
        self.context.display.phase("loading models")
        self.workers.rollouts.open()
        self.rollout_pool.grow()
        self.policy.open(steps)
        if self.workers.discriminator is not None:
            gate = WarmupGate(config.discriminator)
            updates = gate.max_steps + config.trainer.steps * config.discriminator.updates_per_policy_step
            self.workers.discriminator.open(max(1, updates))
        for role, learner in self.learners.items():
            if learner.padded_because is not None:
                self.context.event(f"{role}: {learner.padded_because}")

    def _step(self, step: int) -> None:
        config, timer = self.config, PhaseTimer()
        self._forget_references()
        with timer.phase(names.TIME_SYNC):
            self.rollout_pool.grow()
        metrics, groups, rewarded = self.loop.step(step, timer)
        self.progress.step = step
        self.workers.finished(step)
        metrics |= self.context.prepared.facts
        if config.eval.every and step % config.eval.every == 0 and step < config.trainer.steps:
            self.progress.unevaluated = dict(metrics)
            with suppress(Interrupted), timer.phase(names.TIME_EVALUATION):
                metrics |= values_of(self._evaluate())
        with timer.phase(names.TIME_CHECKPOINT):
            self.checkpointer.poll()
            if self._checkpoint_due(step):
                self._save()
        metrics |= {**self.checkpointer.take_metrics(), **timer.finish()}
        if self.progress.unevaluated is None:
            self.context.log(step, metrics)
        self.context.log_rollouts(step, groups, rewarded)
        self.context.display.step(step, metrics)

    def _forget_references(self) -> None:
        """Begin a step, evaluation or measurement: none hands on what a resume would make anew."""
        if self.workers.discriminator is not None:
            self.workers.discriminator.forget_references()

    def _checkpoint_due(self, step: int) -> bool:
        every = self.config.trainer.checkpoint_every
        stopping = bool(self.context.stop)
        return stopping or step == self.config.trainer.steps or bool(every and step % every == 0)

    def _evaluate(self, name: str | None = None) -> Summary:
        """Evaluate on held-out problems, write rows and summary; the name is otherwise the current step's."""
        name = name or (f"step-{self.progress.step:06d}" if self.progress.step else "start")
        self.context.display.phase(f"evaluating ({name})")
        self.loop.buffer.drain()
        self._forget_references()
        summary, rows = self.evaluator.evaluate()
        self.context.write_evaluation(name, summary, rows)
        self.progress.unevaluated = None
        return summary

    def _log_evaluation(self, summary: Summary, row: Mapping[str, float] = MappingProxyType({})) -> None:
        """The numbers at the current step, with the rest of its row where that waited for them."""
        self.context.log(self.progress.step, {**row, **values_of(summary)})
        self.context.display.show(values_of(summary))

    # --- warm-up -----------------------------------------------------------------------------------

    def _warm_up(self) -> bool:
        """Train the discriminator against the frozen policy until its gate opens; False when asked to stop."""
        gate = WarmupGate(self.config.discriminator)
        if self.airl is None or self.progress.warmed_up or gate.max_steps == 0:
            return True
        display = self.context.display
        display.phase("discriminator warm-up", gate.max_steps, self.progress.warmup)
        pool = WarmupPool(
            self.config, self.context.prepared.task.train, self.workers.rollouts, self.evaluator,
            lambda: bool(self.context.stop), self.progress.warmup,
        )  # fmt: skip
        auroc = self._separation(pool) if gate.measures(self.progress.warmup) else None
        ready, reason = gate.ready(self.progress.warmup, auroc)
        while not ready:
            update = self.progress.warmup + 1
            timer = PhaseTimer()
            self._forget_references()
            with timer.phase(names.TIME_SYNC):
                self.rollout_pool.grow()
            with timer.phase(names.TIME_DISCRIMINATOR):
                groups, demonstrations = pool.next(update)
                metrics = self.airl.update(groups, demonstrations, epoch=f"warmup/{update}")
            self.progress.warmup = update
            if self.config.trainer.checkpoint_every and update % self.config.trainer.checkpoint_every == 0:
                with timer.phase(names.TIME_CHECKPOINT):
                    self._save()
            auroc = self._separation(pool) if gate.measures(update) else None
            if auroc is not None:
                metrics[names.DISCRIMINATOR_AUROC] = auroc
            # Warm-up rows lie before step 1, one number each: -(max - 1) .. 0.
            step = update - gate.max_steps
            metrics |= {names.DISCRIMINATOR_WARMUP_STEP: float(update), **timer.finish()}
            self.context.log(step, metrics)
            display.step(update, metrics)
            ready, reason = gate.ready(update, auroc)
            if self.context.stop and not ready:
                return False
            self._leave_drained_nodes()
        self.progress.warmed_up = True
        self._save()
        self.context.event(
            f"discriminator warm-up ended after {self.progress.warmup} updates ({reason}), "
            f"AUROC on held-out right/wrong samples {float('nan') if auroc is None else auroc:.3f}"
        )
        return True

    def _separation(self, pool: WarmupPool) -> float:
        self._forget_references()
        return self.evaluator.separation(pool.heldout)

    # --- saving ------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Begin a checkpoint of this moment; `AsyncCheckpointer` says when it is there."""
        self.loop.buffer.drain()
        self.checkpointer.start(self.progress.step, self._state())

    def _state(self) -> dict[str, Any]:
        """The trainer's own state, a file each in the checkpoint."""
        return {
            "progress": dict(vars(self.progress)),
            "cursors": self.sampler.state(),
            **self.reward.state(),
            "rollouts": self.loop.buffer.state(),
        }

    def _restore(self) -> bool:
        """Go back to the newest whole checkpoint; without one the run starts from the beginning."""
        path = self.context.newest_checkpoint()
        if path is None:
            self.context.forget_after(-(1 << 31))
            self.context.event("no checkpoint to resume from: starting from the beginning")
            return False
        state = self.context.store.read(path)
        self.progress = Progress(**state["progress"])
        self.workers.finished(self.progress.step)
        self.sampler.restore(state["cursors"])
        self.reward.restore(state)
        self.loop.buffer.restore(state["rollouts"])
        for role, learner in self.learners.items():
            learner.load(path / role)
        last = evaluated = self.progress.step
        if self.progress.unevaluated is not None:
            # Its evaluation comes next; an earlier resume may have logged the two.
            last = evaluated = last - 1
        if self.progress.step == 0 and not self.progress.warmed_up and self.airl is not None:
            last = self.progress.warmup - WarmupGate(self.config.discriminator).max_steps
        dropped = self.context.forget_after(last, evaluated)
        self.context.event(
            f"resumed from {path.name}; {dropped} later rows of metrics.jsonl will be made again"
        )
        return True

    def _save_this_moment(self) -> None:
        """Return once a checkpoint of this moment is there. Raises RunFailure where it cannot be written."""
        self.checkpointer.finish()
        saved = self.checkpointer.newest
        if saved is None or saved["progress"] != vars(self.progress):
            self._save()
        self.checkpointer.require()

    def _leave_drained_nodes(self) -> None:
        """Rollouts leave first; raises Drained, with everything saved, where that is not enough.

        The same for a head that has been away for too long: Stranded.
        """
        self.rollout_pool.leave_drained()
        if nodes := self.workers.monitor.draining():
            self._save_this_moment()
            raise Drained(nodes, self.progress.step)
        try:
            check_silence()
        except Stranded as error:
            self._save_this_moment()
            raise Stranded(f"{error}: saved after step {self.progress.step}") from None

    def stopped(self) -> bool:
        """Save what there is; False, as the run did not finish."""
        self._save_this_moment()
        self.context.event(
            f"stopped after step {self.progress.step}; go on with --resume {self.context.config.name}"
        )
        return False

    def export(self, summary: Summary) -> bool:
        """Final artifacts, uploaded, and the result on the screen; True, as the run finished."""
        self.checkpointer.require()
        context = self.context
        context.display.phase("writing final artifacts")
        self.policy.export(context.folder.final_policy)
        if self.workers.discriminator is not None:
            self.workers.discriminator.export(context.folder.final_reward_model)
        context.finish(summary)
        return True
