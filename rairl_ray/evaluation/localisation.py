"""Where a trace goes wrong, read from its rewards (METHOD 6).

The predicted wrong step is the one with the LARGEST DOWNWARD STEP of the reward: its value minus the value
of the step before. The first step has none before it, and is compared with the mean of the others: that
leaves the prediction as it is when a constant is added to the reward (a discriminator's offset says nothing
about place), where a comparison with 0 would accuse the first step of every trace of low reward. The price:
with a reward that stays low once it fell, an error in the first step shows no drop and is a guess.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.evaluation.bootstrap import Summary, bootstrap

_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_LINE = re.compile(r"[^\n]*\S[^\n]*(?:\n\s*)?")


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

    A step in which no unit ends takes the next unit behind it (METHOD 2's backfill), or the last one.
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


def predicted_step(values: np.ndarray) -> np.ndarray:
    """[S] probabilities of each step being named: equal shares among those with the largest downward step."""
    changes = step_changes(values)
    # Equal rewards must stay a tie after the rounding of a mean.
    largest = changes <= changes.min() + 1e-9 * (1.0 + np.abs(values).max())
    return largest / largest.sum()


def localise(cases: Sequence[InjectedError], *, resamples: int = 1000, key: tuple[object, ...] = ()) -> Summary:
    """Step accuracy (expected over ties) and chance, the mean of 1 / steps, over the same traces.

    Traces whose error lies in no step (but in the answer) or that have no unit are left out; n counts the rest.
    """
    hits: list[float] = []
    chances: list[float] = []
    for case in cases:
        wrong = step_of(case.edit_char, case.step_char_ends)
        if wrong is None or len(case.unit_rewards) == 0:
            continue
        values = step_values(case.step_char_ends, case.unit_char_ends, case.unit_rewards)
        hits.append(float(predicted_step(values)[wrong]))
        chances.append(1.0 / len(case.step_char_ends))
    summary: Summary = {}
    for name, numbers in ((names.LOCALISATION_STEP_ACCURACY, hits), (names.LOCALISATION_CHANCE, chances)):
        value, low, high = bootstrap(numbers, resamples, key)
        summary[name] = {"value": value, "low": low, "high": high, "n": len(numbers)}
    return summary
