"""Evaluation on held-out problems with live actors: pass@k, reranking, AUROC, localisation.

The same rows, graders and metric functions serve the final table, the warm-up gate and later evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.algorithms.rewards import selected_score, unit_rewards
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.tasks.base import Task
from rairl_ray.engines.rollout_engine import SamplingSettings
from rairl_ray.evaluation.bootstrap import Summary
from rairl_ray.evaluation.calibration import auroc
from rairl_ray.evaluation.localisation import InjectedError, injected_errors, localise, step_char_ends
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.evaluation.summary import summarise_as
from rairl_ray.rewards.reading import trace_of
from rairl_ray.rewards.scorer import Scorer
from rairl_ray.types import RolloutGroup, TraceScores


class Evaluator:
    """Evaluates whatever policy the rollout workers serve, and the reward where there is one."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        rollouts: RolloutWorkers,
        scorer: Scorer | None,
        stop: Callable[[], bool] | None = None,
    ) -> None:
        """`scorer`: None for a run without a learned reward. `stop`: asked while samples are awaited; once it
        says True, that ends in Interrupted."""
        self._config = config
        self._task = task
        self._rollouts = rollouts
        self._scorer = scorer
        self._stop = stop
        self._prompts = [item.prompt for item in task.eval[: config.eval.prompts]]

    def sample(self, stream: str) -> list[RolloutGroup]:
        """Fresh samples of the held-out problems under the evaluation's own sampling settings."""
        settings = SamplingSettings(
            temperature=self._config.eval.temperature,
            top_p=self._config.eval.top_p,
            max_tokens=self._config.rollout.max_completion_tokens,
        )
        return self._rollouts.generate(
            self._prompts, f"eval/{stream}", self._config.eval.samples_per_prompt, settings, self._stop
        )

    def evaluate(self, stream: str = "heldout") -> tuple[Summary, list[EvalRow]]:
        """Metric name -> {value, low, high, n} with 95% intervals over problems, and one row a sample.

        All evaluations of a run use the same stream by default: the sampling seeds are then equal, and the
        difference between two policies is not the luck of the draw.
        """
        groups = self.sample(stream)
        rows = self.rows(groups)
        summary = summarise_as(self._config, rows)
        if names.CALIBRATION_AUROC in summary:  # under the gate's name too: one curve through the whole run
            summary[names.DISCRIMINATOR_AUROC] = summary[names.CALIBRATION_AUROC]
        if self._scorer is not None and self._config.eval.localisation_traces:
            summary |= self.localisation()
        return summary, rows

    def rows(self, groups: Sequence[RolloutGroup]) -> list[EvalRow]:
        """Graded and, with a learned reward, scored samples."""
        traces = [trace_of(group.prompt, rollout) for group in groups for rollout in group.rollouts]
        scores: list[TraceScores | None] = [None] * len(traces)
        reward = None
        if self._scorer is not None:
            scores, reward = list(self._scorer.score(traces)), self._scorer.reward
        rows: list[EvalRow] = []
        pairs = [(group, rollout) for group in groups for rollout in group.rollouts]
        for (group, rollout), score in zip(pairs, scores, strict=True):
            grade = self._task.grade(group.prompt, rollout.text)
            rewards = None if score is None or reward is None else unit_rewards(score.logits, reward)
            row = EvalRow(
                prompt_id=group.prompt.id,
                question=group.prompt.question,
                generation=rollout.text,
                generation_idx=rollout.sample_index,
                answer=group.prompt.answer,
                correct=grade.correct,
                extracted=grade.answer,
                format_ok=grade.format_ok,
                finish_reason=rollout.finish_reason,
                tokens=len(rollout.token_ids),
                policy_version=rollout.policy_version,
                discriminator_version=None if score is None else score.discriminator_version,
                unit_scores=None if rewards is None else [float(value) for value in rewards],
                unit_char_ends=None if score is None else [int(end) for end in score.unit_char_ends],
                score=None
                if rewards is None or not len(rewards)
                else selected_score(rewards, self._config.eval),
                metadata=group.prompt.metadata,
            )
            rows.append(row)
        return rows

    def separation(self, groups: Sequence[RolloutGroup]) -> float:
        """AUROC of the reward between right and wrong samples of these held-out groups (the gate's signal)."""
        rows = self.rows(groups)
        correct = np.asarray([row.correct for row in rows])
        scores = [float("nan") if row.score is None else row.score for row in rows]
        return auroc(correct, np.asarray(scores, dtype=np.float64))

    def localisation(self) -> Summary:
        """Step accuracy of the largest downward step on held-out expert traces with one injected error."""
        assert self._scorer is not None
        traces = injected_errors(self._task.eval, self._config)
        cases: list[InjectedError] = []
        for trace, score in zip(traces, self._scorer.score(traces), strict=True):
            assert trace.edit_char is not None
            case = InjectedError(
                step_char_ends=step_char_ends(trace.text),
                edit_char=trace.edit_char,
                unit_char_ends=score.unit_char_ends,
                unit_rewards=unit_rewards(score.logits, self._scorer.reward),
            )
            cases.append(case)
        return localise(cases, resamples=self._config.eval.bootstrap, key=(self._config.seed, "localise"))


def values_of(summary: Summary) -> dict[str, float]:
    """The plain numbers of a summary, for the metrics log."""
    return {name: entry["value"] for name, entry in summary.items()}
