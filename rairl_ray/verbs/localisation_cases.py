"""Traces to find the first wrong step in, the values of their steps, and how often the named one is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.completion_format import THINK_OPEN
from rairl_ray.data.tasks import make_task
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.evaluation.localisation import (
    ARGMIN,
    Baseline,
    InjectedError,
    Readout,
    StepTrace,
    baseline_summary,
    baseline_values,
    injected_errors,
    predicted_step,
    step_char_ends,
    step_of,
    step_summary,
    step_values,
)
from rairl_ray.evaluation.localisation import localise as localise_injected
from rairl_ray.evaluation.localisation_files import read_labelled_steps
from rairl_ray.runfolder import Summary

BASELINES: dict[Baseline, str] = {"logprob": "token_logprobs", "entropy": "token_entropies"}
"""What the policy alone says -> the column of its row that holds it."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A trace to look for the wrong step in."""

    id: str
    question: str
    text: str
    step_char_ends: Sequence[int]
    first_error: int | None
    """Index of the first wrong step; -1: all are right; None: unknown, or in no step."""
    edit_char: int | None = None
    """Injected error: its first character."""
    finished: bool = True
    step_scores: Sequence[float] | None = None
    """[S] scores that the file brought."""


# --- traces ----------------------------------------------------------------------------------------


def labelled_cases(file: Path, config: RunConfig, scores: str | None) -> list[Case]:
    """The file's traces, their steps inside an open think block: a reward reads what it was trained on."""
    opening = f"{THINK_OPEN}\n"
    return [
        Case(
            id=trace.id,
            question=trace.question,
            text=f"{opening}{trace.completion}\n",
            step_char_ends=[len(opening) + end for end in trace.step_char_ends[:-1]]
            + [len(opening) + trace.step_char_ends[-1] + 1],
            first_error=trace.first_error,
            finished=False,
            step_scores=trace.step_scores,
        )
        for trace in read_labelled_steps(
            file, scores=scores, labels="required", on_bad_row=config.data.on_bad_row
        )
    ]


def injected_cases(config: RunConfig) -> list[Case]:
    """Held-out experts with one error each, the same ones as in the run's own evaluation.

    Raises:
        DataError: the task has no held-out expert that could be corrupted.
    """
    cases: list[Case] = []
    task = make_task(config.data, config.seed)
    for trace in injected_errors(task.eval, config):
        assert trace.edit_char is not None
        ends = step_char_ends(trace.text)
        case = Case(
            id=trace.prompt.id,
            question=trace.prompt.question,
            text=trace.text,
            step_char_ends=ends,
            first_error=step_of(trace.edit_char, ends),
            edit_char=trace.edit_char,
        )
        cases.append(case)
    if not cases:
        raise DataError(
            f"data.task={task.name}: no held-out expert could be given an error; name a labelled file: "
            "`localise RUN FILE`"
        )
    return cases


# --- numbers ---------------------------------------------------------------------------------------


def summarise(
    cases: Sequence[Case], values: Sequence[Sequence[float] | np.ndarray | None], config: RunConfig
) -> Summary:
    """Step accuracy, chance and what goes with it, over the traces with values and a labelled step."""
    traces = _step_traces(cases, values)
    if not traces:
        raise DataError("no trace has both a label in one of its steps and a score; nothing can be judged")
    settings: dict[str, Any] = {"resamples": config.eval.bootstrap, "key": (config.seed, "localise")}
    summary = step_summary(traces, readout_of(config), **settings)
    argmin = step_summary(traces, ARGMIN, **settings)[names.LOCALISATION_STEP_ACCURACY]
    return summary | {names.LOCALISATION_BASELINE.format(baseline="argmin"): argmin}


def injected_summary(
    cases: Sequence[Case], rewards: Sequence[dict[str, Any]], read: Sequence[dict[str, Any]], config: RunConfig
) -> Summary:
    """Hit@1 within `eval.localisation_hit_tokens`, counted in the policy's tokens; nothing without a policy."""
    errors = [
        InjectedError(
            step_char_ends=case.step_char_ends,
            edit_char=case.edit_char,
            unit_char_ends=units["unit_char_ends"],
            unit_rewards=units["unit_scores"],
            token_char_ends=row["token_char_ends"],
        )
        for case, units, row in zip(cases, rewards, read, strict=False)
        if case.edit_char is not None and "unit_scores" in units
    ]
    if not errors:
        return {}
    found = localise_injected(
        errors,
        readout_of(config),
        hit_tokens=config.eval.localisation_hit_tokens,
        resamples=config.eval.bootstrap,
        key=(config.seed, "localise"),
    )
    return {name: value for name, value in found.items() if "hit" in name}


def policy_summary(cases: Sequence[Case], read: Sequence[dict[str, Any]], config: RunConfig) -> Summary:
    summary: Summary = {}
    for baseline, column in BASELINES.items():
        values = [
            baseline_values(baseline, case.step_char_ends, row["token_char_ends"], row[column])
            for case, row in zip(cases, read, strict=False)
        ]
        traces = _step_traces(cases, values) if values else []
        if traces:
            summary |= baseline_summary(
                baseline, traces, resamples=config.eval.bootstrap, key=(config.seed, "localise")
            )
    return summary


def _step_traces(
    cases: Sequence[Case], values: Sequence[Sequence[float] | np.ndarray | None]
) -> list[StepTrace]:
    return [
        StepTrace(values=value, first_error=case.first_error)
        for case, value in zip(cases, values, strict=True)
        if value is not None and case.first_error is not None
    ]


def values_of_case(case: Case, units: dict[str, Any]) -> np.ndarray | None:
    if "unit_scores" not in units:
        return None
    return step_values(case.step_char_ends, units["unit_char_ends"], units["unit_scores"])


def readout_of(config: RunConfig) -> Readout:
    kind, threshold = config.eval.localisation_readout, config.eval.localisation_threshold
    if kind == "threshold" and threshold is None:
        raise ConfigError("eval.localisation_readout=threshold: needs eval.localisation_threshold; set it")
    return Readout(type=kind, threshold=threshold)


def row_of(
    case: Case, units: dict[str, Any] | None, values: Sequence[float] | np.ndarray | None, readout: Readout
) -> dict[str, Any]:
    """One line of localisation.jsonl."""
    named = None if values is None else predicted_step(np.asarray(values), readout)
    return {
        "prompt_id": case.id,
        "question": case.question,
        "text": case.text,
        "step_char_ends": list(case.step_char_ends),
        "step_scores": None if values is None else [float(value) for value in values],
        "unit_char_ends": (units or {}).get("unit_char_ends"),
        "unit_scores": (units or {}).get("unit_scores"),
        "first_error_step": case.first_error,
        "predicted_step": None if named is None else (int(named.argmax()) if named.any() else -1),
        "edit_char": case.edit_char,
        **({"error": units["error"]} if units and "error" in units else {}),
    }
