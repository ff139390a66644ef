"""What people call a metric: labels of the names in `rairl_ray/metrics.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Literal

from rairl_ray import metrics as names
from rairl_ray.report.parts import Number

Kind = Literal["plain", "percent", "count", "p"]

_KNOWN: list[tuple[str, str, Kind]] = [
    (names.EVAL_PASS_AT, "pass@{k}", "percent"),
    (names.EVAL_RERANK_AT_1, "best by reward", "percent"),
    (names.EVAL_RERANK_AT, "{selector}: any of the top {k} of {n}", "percent"),
    (names.EVAL_RANDOM_AT_1, "random choice", "percent"),
    (names.EVAL_MAJORITY_AT, "majority of {n}", "percent"),
    (names.EVAL_WEIGHTED_MAJORITY_AT, "reward-weighted majority of {n}", "percent"),
    (names.EVAL_SHORTEST_AT_1, "shortest", "percent"),
    (names.EVAL_LONGEST_AT_1, "longest", "percent"),
    (names.EVAL_LOGPROB_AT_1, "most probable to the policy", "percent"),
    (names.EVAL_ORACLE_AT, "oracle of {n}", "percent"),
    (names.EVAL_CATEGORY_PASS_AT_1, "pass@1, {category}", "percent"),
    (names.EVAL_FORMAT, "well-formed", "percent"),
    (names.EVAL_TRUNCATED, "truncated", "percent"),
    (names.EVAL_COMPLETION_TOKENS, "tokens a completion", "plain"),
    (names.DISCRIMINATOR_AUROC, "AUROC right/wrong", "plain"),
    (names.CALIBRATION_AUROC, "AUROC right/wrong", "plain"),
    (names.CALIBRATION_AUROC_WITHIN, "AUROC within a problem", "plain"),
    (names.CALIBRATION_AUROC_LENGTH, "AUROC within a length", "plain"),
    (names.CALIBRATION_AUROC_FORMAT, "AUROC within a format", "plain"),
    (names.CALIBRATION_ECE, "ECE", "plain"),
    (names.CALIBRATION_BRIER, "Brier score", "plain"),
    (names.CALIBRATION_T, "Welch's t, right against wrong", "plain"),
    (names.CALIBRATION_P, "p of the t-test", "p"),
    (names.LOCALISATION_STEP_ACCURACY, "wrong step found", "percent"),
    (names.LOCALISATION_CHANCE, "by chance", "percent"),
    (names.LOCALISATION_NORMALISED, "above chance", "percent"),
    (names.LOCALISATION_HIT_AT_1, "hit@1 within {tokens} tokens", "percent"),
    (names.LOCALISATION_RIGHT_ACCURACY, "right traces called right", "percent"),
    (names.LOCALISATION_F1, "ProcessBench F1", "percent"),
    (names.LOCALISATION_HIT_CHANCE, "hit@1 within {tokens} tokens, by chance", "percent"),
    (names.LOCALISATION_BASELINE, "wrong step found by {baseline}", "percent"),
    (names.REWARD_MEAN, "mean reward", "plain"),
    (names.DISCRIMINATOR_LOSS, "discriminator loss", "plain"),
    (names.DISCRIMINATOR_ACCURACY, "discriminator accuracy", "plain"),
    (names.POLICY_LOSS, "policy loss", "plain"),
    (names.POLICY_KL, "KL to the reference", "plain"),
    (names.POLICY_ENTROPY, "policy entropy", "plain"),
    (names.ROLLOUT_COMPLETION_TOKENS, "tokens a completion", "plain"),
    (names.ROLLOUT_TOKENS_PER_SECOND, "rollout tokens per second", "plain"),
]


@cache
def pattern_of(name: str) -> re.Pattern[str]:
    """What metrics of a name with `{k}`, `{category}`, ... look like; the braces are its groups."""
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>.+?)", re.escape(name)) + r"\Z", re.DOTALL)


def label_of(metric: str) -> tuple[str, Kind]:
    """(what people call it, how its numbers are shown); the name itself for a metric that has no label."""
    for name, label, kind in _KNOWN:
        match = pattern_of(name).match(metric)
        if match:
            return label.format(**match.groupdict()), kind
    return metric, "plain"


def rank_of(metric: str) -> int:
    """Place of a metric among those that have labels, for a table's order."""
    return next((i for i, (name, _, _) in enumerate(_KNOWN) if pattern_of(name).match(metric)), len(_KNOWN))


def number_of(metric: str, entry: Mapping[str, float]) -> Number:
    """A summary's entry as a cell."""
    low, high = entry.get("low", float("nan")), entry.get("high", float("nan"))
    return Number(value=entry["value"], low=low, high=high, kind=label_of(metric)[1])
