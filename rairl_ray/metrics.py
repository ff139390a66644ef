"""Metric names, a phase timer, and small reductions.

Names are the same for airl, grpo and sft, and legal in MLflow: letters, digits, ``_ - . : /``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

# evaluation on held-out prompts
EVAL_PASS_AT = "eval/pass_at_{k}"
EVAL_PASS_AT_1 = "eval/pass_at_1"
EVAL_ORACLE_AT = "eval/oracle_at_{n}"
EVAL_MAJORITY_AT = "eval/majority_at_{n}"
EVAL_RERANK_AT_1 = "eval/rerank_at_1"
EVAL_RANDOM_AT_1 = "eval/random_at_1"
EVAL_SHORTEST_AT_1 = "eval/shortest_at_1"
EVAL_LONGEST_AT_1 = "eval/longest_at_1"
EVAL_LOGPROB_AT_1 = "eval/logprob_at_1"
EVAL_RERANK_AT = "eval/rerank_{selector}_at_{k}_of_{n}"
EVAL_WEIGHTED_MAJORITY_AT = "eval/weighted_majority_at_{n}"
EVAL_CATEGORY_PASS_AT_1 = "eval/category_pass_at_1/{category}"
EVAL_TRUNCATED = "eval/truncated_share"
EVAL_FORMAT = "eval/format_share"
EVAL_COMPLETION_TOKENS = "eval/completion_tokens"
CALIBRATION_AUROC = "calibration/auroc"
CALIBRATION_AUROC_WITHIN = "calibration/auroc_within_problem"
CALIBRATION_AUROC_LENGTH = "calibration/auroc_within_length"
CALIBRATION_AUROC_FORMAT = "calibration/auroc_within_format"
CALIBRATION_ECE = "calibration/ece"
CALIBRATION_BRIER = "calibration/brier"
CALIBRATION_T = "calibration/right_wrong_t"
CALIBRATION_P = "calibration/right_wrong_p"
LOCALISATION_STEP_ACCURACY = "localisation/step_accuracy"
LOCALISATION_CHANCE = "localisation/chance"
LOCALISATION_NORMALISED = "localisation/step_accuracy_above_chance"
LOCALISATION_HIT_AT_1 = "localisation/hit_at_1_within_{tokens}_tokens"
LOCALISATION_HIT_CHANCE = "localisation/hit_chance_within_{tokens}_tokens"
LOCALISATION_RIGHT_ACCURACY = "localisation/right_accuracy"
LOCALISATION_F1 = "localisation/processbench_f1"
LOCALISATION_BASELINE = "localisation/step_accuracy_{baseline}"

# data
DATA_EXPERT_ERROR_RATE = "data/expert_error_rate"

# reward and discriminator
REWARD_MEAN = "reward/mean"
REWARD_STD = "reward/std"
REWARD_OUTCOME = "reward/outcome"
REWARD_VERIFIABLE = "reward/verifiable_{name}"
REWARD_CLIPPED_SHARE = "reward/clipped_share"
REWARD_DRIFT = "reward/drift"
REWARD_UNSCORED = "reward/unscored_samples"
DISCRIMINATOR_LOSS = "discriminator/loss"
DISCRIMINATOR_AUROC = "discriminator/auroc"
DISCRIMINATOR_ACCURACY = "discriminator/accuracy"
DISCRIMINATOR_POSITIVE_LOGIT = "discriminator/positive_logit"
DISCRIMINATOR_NEGATIVE_LOGIT = "discriminator/negative_logit"
DISCRIMINATOR_GRAD_NORM = "discriminator/grad_norm"
DISCRIMINATOR_LEARNING_RATE = "discriminator/learning_rate"
DISCRIMINATOR_PENALTY = "discriminator/gradient_penalty"
DISCRIMINATOR_VERSION = "discriminator/version"
DISCRIMINATOR_DROPPED_PERTURBATIONS = "discriminator/dropped_perturbations"
DISCRIMINATOR_WARMUP_STEP = "discriminator/warmup_step"

# policy
POLICY_LOSS = "policy/loss"
POLICY_KL = "policy/kl"
POLICY_ENTROPY = "policy/entropy"
POLICY_CLIP_SHARE = "policy/clip_share"
POLICY_RATIO_MEAN = "policy/ratio_mean"
POLICY_IMPORTANCE_WEIGHT = "policy/importance_weight"
POLICY_GRAD_NORM = "policy/grad_norm"
POLICY_LEARNING_RATE = "policy/learning_rate"
POLICY_VERSION = "policy/version"
POLICY_TOKENS = "policy/tokens"
POLICY_PADDING_SHARE = "policy/padding_share"

# rollouts
ROLLOUT_TOKENS_PER_SECOND = "rollout/tokens_per_second"
ROLLOUT_TOKENS = "rollout/tokens"
ROLLOUT_REPLICAS = "rollout/replicas"
ROLLOUT_STALENESS = "rollout/staleness"
ROLLOUT_COMPLETION_TOKENS = "rollout/completion_tokens"
ROLLOUT_TRUNCATED = "rollout/truncated_share"
ROLLOUT_FAILED_GROUPS = "rollout/failed_groups"
ROLLOUT_DROPPED_GROUPS = "rollout/dropped_groups"
ROLLOUT_LOGPROB_GAP = "rollout/logprob_gap"
ROLLOUT_GAP_TOKENS = "rollout/logprob_gap_tokens"
SYNC_LOGPROB_GAP = "sync/logprob_gap"

# checkpoints, which ranks write beside training; what training waits for them is time/checkpoint
CHECKPOINT_WRITE_SECONDS = "checkpoint/write_seconds"
CHECKPOINT_BYTES = "checkpoint/bytes"

# where the time of a step goes
TIME_ROLLOUT = "time/rollout"
TIME_SCORE = "time/score"
TIME_DISCRIMINATOR = "time/discriminator"
TIME_POLICY = "time/policy"
TIME_SYNC = "time/sync"
TIME_CHECKPOINT = "time/checkpoint"
TIME_EVALUATION = "time/evaluation"
TIME_OTHER = "time/other"
TIME_STEP = "time/step"

MEASURES_MACHINE = ("time/", ROLLOUT_TOKENS_PER_SECOND, ROLLOUT_REPLICAS, "checkpoint/")
"""Beginnings of names that measure the machine and differ each time."""

LONGEST_NAME = 250
"""MLflow's limit."""


def legal_name(name: str) -> str:
    """`name` with everything replaced that MLflow refuses in names of metrics, parameters and tags."""
    legal = re.sub(r"[^\w./: -]", "_", name, flags=re.ASCII)
    parts = [part for part in legal.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)[:LONGEST_NAME].rstrip("/") or "_"


class PhaseTimer:
    """Splits the wall time of a step into phases that add up exactly to `time/step`."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._started = time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - start

    def seconds(self, name: str) -> float:
        return self._phases.get(name, 0.0)

    def finish(self) -> dict[str, float]:
        """All phases, `time/other` for what no phase claimed, and `time/step` for the whole."""
        step = time.perf_counter() - self._started
        return {**self._phases, TIME_OTHER: step - sum(self._phases.values()), TIME_STEP: step}


def mean(values: list[float]) -> float:
    """Arithmetic mean; NaN for no values, so that a missing quantity is never a silent zero."""
    return sum(values) / len(values) if values else float("nan")
