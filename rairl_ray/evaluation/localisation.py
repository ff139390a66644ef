"""Where a trace goes wrong, read from its rewards (docs/method.md 6).

The predicted wrong step is the one with the LARGEST DOWNWARD STEP of the reward: its value minus the value
of the step before. The first step has none before it, and is compared with the mean of the others: that
leaves the prediction as it is when a constant is added to the reward (a discriminator's offset says nothing
about place), where a comparison with 0 would accuse the first step of every trace of low reward. The price:
with a reward that stays low once it fell, an error in the first step shows no drop and is a guess.

A trace that may be right needs a prediction "no error" as well: the fall, or the smallest value, must pass the
read-out's threshold. The threshold is given, never chosen on the labels that it is judged by.
Dimension letters: S steps of a trace, U scored units, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.algorithms.negatives import perturb
from rairl_ray.config.schema import Eval, RunConfig
from rairl_ray.config.variants import complete
from rairl_ray.evaluation.bootstrap import Interval, Summary, entry, interval, mean_entry, resampled_sums
from rairl_ray.types import Demonstration, Trace

_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_LINE = re.compile(r"[^\n]*\S[^\n]*(?:\n\s*)?")

Baseline = Literal["logprob", "entropy"]


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How the values of a trace's steps become its predicted first wrong step."""

    type: Literal["largest_drop", "argmin", "threshold"] = "largest_drop"
    threshold: float | None = None
    """No error is predicted unless: `largest_drop`: the value falls by more than this; `argmin`: the smallest
    value is below it; `threshold`: any value is below it, and the first such step is named. None: the first two
    name a step of every trace; `threshold` needs a number."""

    def __post_init__(self) -> None:
        if self.type == "threshold" and self.threshold is None:
            raise ValueError("the read-out threshold needs a threshold")


LARGEST_DROP, ARGMIN = Readout(), Readout(type="argmin")


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """One trace with the value of each step and its label."""

    values: Sequence[float] | np.ndarray
    """[S] finite, lower is worse."""
    first_error: int
    """Index of the first wrong step; -1: the trace is right."""


@dataclass(frozen=True, kw_only=True)
class InjectedError:
    """One trace with one known error, and the reward of its units."""

    step_char_ends: Sequence[int]
    """[S] character end (exclusive) of each reasoning step, increasing."""
    edit_char: int
    """Offset of the error's first character."""
    unit_char_ends: Sequence[int] | np.ndarray
    """[U] character end (exclusive) of each scored unit, non-decreasing."""
    unit_rewards: Sequence[float] | np.ndarray
    """[U]"""
    token_char_ends: Sequence[int] | np.ndarray | None = None
    """[T] character end (exclusive) of each completion token, in whose number Hit@1 measures distance."""


def injected_errors(rows: Sequence[Demonstration], config: RunConfig) -> list[Trace]:
    """Experts of the first `eval.localisation_traces` held-out rows with one error each, where one can be made.

    The same ones in every evaluation of a seed, whatever training perturbs.
    """
    traces: list[Trace] = []
    for row in rows[: config.eval.localisation_traces]:
        key = (config.seed, row.prompt.id, "localisation")
        copies, _ = perturb(row, count=1, kinds=config.eval.localisation_kinds, key=key)
        traces += [Trace(prompt=row.prompt, text=copy.text, edit_char=copy.edit_char) for copy in copies]
    return traces


def step_char_ends(text: str) -> list[int]:
    """Character ends of the reasoning steps: the lines of the think block that are not blank.

    A line takes its line end and blank lines after it. Without a think block the whole text counts.
    """
    block = _THINK.search(text)
    start, end = block.span(1) if block else (0, len(text))
    return [match.end() for match in _LINE.finditer(text, start, end)]


def step_of(char: int, step_char_ends: Sequence[int]) -> int | None:
    """Index of the step that holds a character; None behind the last step (say, in the answer)."""
    step = int(np.searchsorted(step_char_ends, char, side="right"))
    return step if step < len(step_char_ends) else None


def step_values(
    step_char_ends: Sequence[int],
    unit_char_ends: Sequence[int] | np.ndarray,
    unit_rewards: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """[S]: a step's value is the mean reward of the units that end in it.

    A step in which no unit ends takes the next unit behind it (backfill, docs/method.md 2), or the last one.
    Raises ValueError for a trace without units and for rewards that are not finite.
    """
    ends, rewards = np.asarray(unit_char_ends), np.asarray(unit_rewards, dtype=np.float64)
    if len(rewards) == 0 or len(rewards) != len(ends) or not np.isfinite(rewards).all():
        raise ValueError(f"step_values: {len(rewards)} rewards for {len(ends)} units, all must be finite")
    last = np.searchsorted(ends, step_char_ends, side="right")
    first = np.concatenate([[0], last[:-1]])
    values = [
        rewards[a:b].mean() if a < b else rewards[min(a, len(rewards) - 1)]
        for a, b in zip(first, last, strict=True)
    ]
    return np.array(values)


def step_changes(values: np.ndarray) -> np.ndarray:
    """[S]: a step's value minus the one before; the first one's minus the mean of the others (0 if alone)."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return np.zeros(len(values))
    return np.concatenate([[values[0] - values[1:].mean()], np.diff(values)])


def predicted_step(values: np.ndarray, readout: Readout = LARGEST_DROP) -> np.ndarray:
    """[S] probabilities of each step being named: equal shares among those that tie, all 0 for "no error"."""
    return READOUTS[readout.type](np.asarray(values, dtype=np.float64), readout)


def _below_threshold(values: np.ndarray, readout: Readout) -> np.ndarray:
    below = values < readout.threshold
    return np.asarray(below & (np.cumsum(below) == 1), dtype=np.float64)


def _largest_drop(values: np.ndarray, readout: Readout) -> np.ndarray:
    return _worst(values, step_changes(values), -1, readout)


def _argmin(values: np.ndarray, readout: Readout) -> np.ndarray:
    return _worst(values, values, 1, readout)


def _worst(values: np.ndarray, badness: np.ndarray, sign: int, readout: Readout) -> np.ndarray:
    """The steps of the smallest `badness`; none unless that is below `sign` times the threshold."""
    if readout.threshold is not None and not badness.min() < sign * readout.threshold:
        return np.zeros(len(values))
    # Equal rewards must stay a tie after the rounding of a mean.
    worst = badness <= badness.min() + 1e-9 * (1.0 + np.abs(values).max())
    return np.asarray(worst / worst.sum())


READOUTS: dict[str, Callable[[np.ndarray, Readout], np.ndarray]] = {
    "largest_drop": _largest_drop,
    "argmin": _argmin,
    "threshold": _below_threshold,
}
"""Values of the steps [S] -> [S] probabilities of each being named."""
complete(f"{__name__}.READOUTS", READOUTS, Eval, "localisation_readout")


# --- labelled steps --------------------------------------------------------------------------------


def step_summary(
    traces: Sequence[StepTrace],
    readout: Readout = LARGEST_DROP,
    *,
    resamples: int = 1000,
    key: tuple[object, ...] = (),
) -> Summary:
    """Step accuracy on the wrong traces, chance, and above chance; with right traces ProcessBench's F1 too.

    Accuracy is expected over ties; "no error" for a wrong trace is a miss. Chance is the mean of 1 / steps over
    the same traces, above chance (accuracy - chance) / (1 - chance). A right trace is hit by "no error"; F1 is
    the harmonic mean of the accuracies on wrong and on right traces. Intervals are over traces.
    """
    named = [predicted_step(np.asarray(trace.values), readout) for trace in traces]
    wrong = np.array([trace.first_error >= 0 for trace in traces], dtype=bool)
    hits = np.array(
        [
            prediction[trace.first_error] if trace.first_error >= 0 else 1.0 - prediction.sum()
            for prediction, trace in zip(named, traces, strict=True)
        ]
    )
    chances = np.array([1.0 / len(trace.values) for trace in traces if trace.first_error >= 0])
    summary = {
        names.LOCALISATION_STEP_ACCURACY: mean_entry(hits[wrong], resamples, key),
        names.LOCALISATION_CHANCE: mean_entry(chances, resamples, key),
        names.LOCALISATION_NORMALISED: entry(
            _above_chance(hits[wrong], chances, resamples, key), int(wrong.sum())
        ),
    }
    if not wrong.all():
        summary[names.LOCALISATION_RIGHT_ACCURACY] = mean_entry(hits[~wrong], resamples, key)
        summary[names.LOCALISATION_F1] = entry(_f1(hits, wrong, resamples, key), len(traces))
    return summary


def baseline_summary(
    baseline: Baseline, traces: Sequence[StepTrace], *, resamples: int = 1000, key: tuple[object, ...] = ()
) -> Summary:
    """Step accuracy of the step with the smallest value (`baseline_values`), beside that of a reward."""
    found = step_summary(traces, ARGMIN, resamples=resamples, key=key)
    return {names.LOCALISATION_BASELINE.format(baseline=baseline): found[names.LOCALISATION_STEP_ACCURACY]}


def baseline_values(
    baseline: Baseline,
    step_char_ends: Sequence[int],
    token_char_ends: Sequence[int] | np.ndarray,
    token_values: Sequence[float] | np.ndarray,
) -> np.ndarray:
    """[S] what the policy alone says of each step: mean log-probability, or minus the mean entropy, a token.

    token_values [T]: the policy's log-probability of each completion token, or its entropy there, in nats.
    """
    sign = 1.0 if baseline == "logprob" else -1.0
    return step_values(step_char_ends, token_char_ends, sign * np.asarray(token_values, dtype=np.float64))


def _above_chance(hits: np.ndarray, chances: np.ndarray, n: int, key: tuple[object, ...]) -> Interval:
    if len(hits) == 0:
        return float("nan"), float("nan"), float("nan")
    accuracy, chance = _sums(np.stack([hits, chances], axis=1), n, key) / len(hits)
    with np.errstate(divide="ignore", invalid="ignore"):  # nothing is above chance where all have one step
        draws = np.where(chance < 1.0, (accuracy - chance) / (1.0 - chance), np.nan)
    return interval(float(draws[0]), draws[1:])


def _sums(values: np.ndarray, n: int, key: tuple[object, ...]) -> np.ndarray:
    """[M, 1 + B]: the sums of values [P, M] over all traces, then over those of each resample."""
    return np.vstack([values.sum(axis=0), resampled_sums(values, n, key)]).T


def _f1(hits: np.ndarray, wrong: np.ndarray, n: int, key: tuple[object, ...]) -> Interval:
    found, of, passed, others = _sums(np.stack([hits * wrong, wrong, hits * ~wrong, ~wrong], axis=1), n, key)
    with np.errstate(divide="ignore", invalid="ignore"):  # NaN where a resample lacks a class
        a, b = found / of, passed / others
        draws = np.where(a + b == 0.0, 0.0, 2 * a * b / (a + b))
    return interval(float(draws[0]), draws[1:])


# --- injected errors -------------------------------------------------------------------------------


def localise(
    cases: Sequence[InjectedError],
    readout: Readout = LARGEST_DROP,
    *,
    hit_tokens: Sequence[int] = (),
    resamples: int = 1000,
    key: tuple[object, ...] = (),
) -> Summary:
    """`step_summary` of traces with one injected error, and Hit@1 within each of hit_tokens tokens.

    Traces whose error lies in no step (but in the answer) or that have no unit are left out; n counts the rest.
    Hit@1 counts the errors in answers too, over the traces whose tokens are given.
    """
    cases = [case for case in cases if len(case.unit_rewards) > 0]
    traces = [
        StepTrace(
            values=step_values(case.step_char_ends, case.unit_char_ends, case.unit_rewards), first_error=wrong
        )
        for case in cases
        if (wrong := step_of(case.edit_char, case.step_char_ends)) is not None
    ]
    summary = step_summary(traces, readout, resamples=resamples, key=key)
    for within in hit_tokens:
        pairs = [hit_at_1(case, within, readout) for case in cases if case.token_char_ends is not None]
        hits, chances = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        summary[names.LOCALISATION_HIT_AT_1.format(tokens=within)] = mean_entry(hits, resamples, key)
        summary[names.LOCALISATION_HIT_CHANCE.format(tokens=within)] = mean_entry(chances, resamples, key)
    return summary


def hit_at_1(case: InjectedError, within: int, readout: Readout = LARGEST_DROP) -> tuple[float, float]:
    """(hit, chance): whether the unit that the read-out names ends within so many tokens of the edit.

    The read-out is applied to units as it is to steps, expected over ties; chance is the share of units that
    end so near. Raises ValueError where the case has no tokens.
    """
    if case.token_char_ends is None:
        raise ValueError("hit_at_1: the case has no token_char_ends")
    ends = np.asarray(case.token_char_ends)
    edit = np.searchsorted(ends, case.edit_char, side="right")
    units = np.minimum(np.searchsorted(ends, case.unit_char_ends, side="left"), len(ends) - 1)
    near = np.abs(units - edit) <= within
    named = predicted_step(np.asarray(case.unit_rewards), readout)
    return float(named[near].sum()), float(near.mean())
