"""Choosing among samples by the reward: against its baselines, against the number of samples, and the top k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.evaluation.bootstrap import bootstrap
from rairl_ray.evaluation.passing import oracle_curve, pass_at_k
from rairl_ray.evaluation.reranking import rerank_at_k, rerank_curve
from rairl_ray.report.arrays import Samples, samples, scored
from rairl_ray.report.collect import Evaluation
from rairl_ray.report.labels import label_of, number_of, pattern_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import legend_below, line_looks, new_figure, percent_axis, whole_ticks

RULES = (
    names.EVAL_RANDOM_AT_1,
    names.EVAL_RERANK_AT_1,
    names.EVAL_WEIGHTED_MAJORITY_AT,
    names.EVAL_MAJORITY_AT,
    names.EVAL_SHORTEST_AT_1,
    names.EVAL_LONGEST_AT_1,
    names.EVAL_LOGPROB_AT_1,
    names.EVAL_ORACLE_AT,
)
"""Ways to choose one sample of a problem, in the table's order."""

RESAMPLES = 300

_BAND_LIMIT = 2_000_000
"""Problems times samples squared up to which the curve has a band; beyond, it would take minutes."""


def reranking_table(evaluation: Evaluation) -> list[Part]:
    """Every way to choose one of a problem's samples."""
    rows: list[Sequence[Cell]] = []
    for rule in RULES:
        for metric, entry in evaluation.summary.items():
            if pattern_of(rule).match(metric):
                problems = Number(value=entry["n"], kind="count") if "n" in entry else None
                rows.append((label_of(metric)[0], number_of(metric, entry), problems))
    if not rows:
        raise Absent("the summary has no reranking")
    return [
        Table(
            name="reranking",
            title="One answer from all samples",
            columns=("chosen by", "right", "problems"),
            rows=rows,
            note="In brackets: 95% bootstrap intervals over problems. Random choice is its expectation.",
        )
    ]


def selector_table(evaluation: Evaluation) -> list[Part]:
    """Whether any of the k best by the reward is right, for every selector (reward-weighted pass@k)."""
    found: dict[tuple[str, int], Number] = {}
    for metric, entry in evaluation.summary.items():
        match = pattern_of(names.EVAL_RERANK_AT).match(metric)
        if match:
            found[match["selector"], int(match["k"])] = number_of(metric, entry)
    if not found:
        raise Absent("the summary has no selectors: no reward scored the units of these rows")
    ks = sorted({k for _, k in found})
    selectors = list(dict.fromkeys(selector for selector, _ in found))
    rows = [(selector, *(found.get((selector, k)) for k in ks)) for selector in selectors]
    return [
        Table(
            name="reward_weighted_pass_at_k",
            title="Reward-weighted pass@k, by selector",
            columns=("selector", *(f"top {k}" for k in ks)),
            rows=rows,
            note="Chance that any of the k samples with the highest score is right.",
        )
    ]


def reranking_figures(evaluation: Evaluation) -> list[Part]:
    """Correctness of the chosen sample against the number of samples, and of the top k against pass@k."""
    scored(evaluation.rows)
    table = samples(evaluation.rows)
    if table.correct_PN.shape[1] < 2:
        raise Absent("each problem has one sample; reranking needs several")
    return [_against_samples(table), _top_k(table)]


def _against_samples(table: Samples) -> Figure:
    correct_PN, scores_PN = table.correct_PN, table.scores_PN
    problems, count = correct_PN.shape
    tokens_PN = np.array([[row.tokens for row in group] for group in table.groups], dtype=np.float64)
    curves: dict[str, np.ndarray] = {
        "best by reward": rerank_curve(scores_PN, correct_PN),
        "random choice": np.full(count, correct_PN.mean()),
        "shortest": rerank_curve(-tokens_PN, correct_PN),
        "oracle": oracle_curve(correct_PN),
    }
    rows = [row for group in table.groups for row in group]
    if all(row.policy_logprobs for row in rows):
        likely = np.array([np.mean(row.policy_logprobs or [np.nan]) for row in rows]).reshape(correct_PN.shape)
        curves["most probable"] = rerank_curve(likely, correct_PN)
    band = None
    if problems * count**2 <= _BAND_LIMIT:
        each = [rerank_curve(s[None], c[None]) for s, c in zip(scores_PN, correct_PN, strict=True)]
        band = np.array([bootstrap(values, RESAMPLES, ("report", "rerank")) for values in np.array(each).T])
    return Figure(
        name="reranking_curve",
        title="Reranking against the number of samples",
        drawing=_lines(curves, band, "samples to choose from", "chosen sample right (%)"),
        note="Expected over all subsets of the samples." + _BAND_NOTE * (band is not None),
    )


def _top_k(table: Samples) -> Figure:
    correct_PN = table.correct_PN
    count = correct_PN.shape[1]
    best = [rerank_at_k(table.scores_PN, correct_PN, k) for k in range(1, count + 1)]
    band = np.array([bootstrap(values, RESAMPLES, ("report", "top k")) for values in best])
    by_chance = [
        np.mean([pass_at_k(count, int(m), k) for m in correct_PN.sum(axis=1)]) for k in range(1, count + 1)
    ]
    curves = {"the k best by reward": band[:, 0], "k at random (pass@k)": np.array(by_chance)}
    return Figure(
        name="reward_weighted_pass_at_k_curve",
        title="Reward-weighted pass@k",
        drawing=_lines(curves, band, "k", "any of k right (%)"),
        note=_BAND_NOTE.strip(),
    )


_BAND_NOTE = " Band: 95% bootstrap interval over problems."


def _lines(curves: Mapping[str, np.ndarray], band: np.ndarray | None, across: str, up: str):  # type: ignore[no-untyped-def]
    """Curves over 1..N; the band belongs to the first."""
    drawing, axes = new_figure()
    for index, ((name, values), look) in enumerate(zip(curves.items(), line_looks(len(curves)), strict=True)):
        ns = np.arange(1, len(values) + 1)
        axes.plot(ns, 100 * values, label=name, **look)
        if index == 0 and band is not None:
            axes.fill_between(ns, 100 * band[:, 1], 100 * band[:, 2], color=look["color"], alpha=0.15, lw=0)
    axes.set(xlabel=across, ylabel=up)
    whole_ticks(axes)
    percent_axis(axes)
    legend_below(axes)
    return drawing
