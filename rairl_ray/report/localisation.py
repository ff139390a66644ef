"""Where the reward sees the error: tables, how far it misses, and the traces themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rairl_ray.evaluation.bootstrap import bootstrap
from rairl_ray.report.arrays import rewards_of
from rairl_ray.report.collect import Evaluation, LocalisedTrace
from rairl_ray.report.heatmap import SHOWN_CHARACTERS, cut_note, heatmap_figure, pieces_of
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table, Trace, Traces, View
from rairl_ray.report.style import RIGHT, WRONG, legend_below, new_figure, whole_ticks

SHOWN = 3

MARKS = "Double line below: from the error to the end of its step. Dashed line above: the step that is named."


def localisation_table(evaluation: Evaluation) -> list[Part]:
    """The summary's localisation metrics."""
    found = {m: entry for m, entry in evaluation.summary.items() if m.startswith("localisation/")}
    if not found:
        raise Absent("the summary has no localisation metrics; launch.py localise writes them")
    rows: list[Sequence[Cell]] = []
    mixed = any(label_of(metric)[1] != "percent" for metric in found)
    for metric, entry in found.items():
        label, kind = label_of(metric)
        traces = Number(value=entry["n"], kind="count") if "n" in entry else None
        rows.append(
            (f"{label} (%)" if mixed and kind == "percent" else label, number_of(metric, entry), traces)
        )
    return [
        Table(
            name="localisation",
            title="Localisation of the first error",
            columns=("metric", "value", "traces"),
            rows=rows,
            note="The step named is the one with the largest downward step of the reward; "
            "in brackets 95% bootstrap intervals over traces.",
        )
    ]


def localisation_details(evaluation: Evaluation) -> list[Part]:
    """Accuracy by the number of steps, distance of the named step, and traces with their error marked."""
    traces = evaluation.localised
    scored = [t for t in traces if t.first_error_step is not None and t.predicted_step is not None]
    wrong = [t for t in scored if 0 <= _label(t) < len(t.step_char_ends)]
    if not wrong:
        raise Absent("no trace has an error in one of its steps")
    return [_by_steps(wrong), _distances(wrong), *_marked(wrong)]


def _label(trace: LocalisedTrace) -> int:
    return -1 if trace.first_error_step is None else trace.first_error_step


def _named(trace: LocalisedTrace) -> int:
    return -1 if trace.predicted_step is None else trace.predicted_step


def _by_steps(traces: Sequence[LocalisedTrace]) -> Table:
    rows: list[Sequence[Cell]] = []
    counts = sorted({len(t.step_char_ends) for t in traces})
    edges = sorted({int(x) for x in np.quantile(counts, [0, 0.2, 0.4, 0.6, 0.8])})
    for low, high in zip(edges, [*edges[1:], counts[-1] + 1], strict=True):
        group = [t for t in traces if low <= len(t.step_char_ends) < high]
        if not group:
            continue
        hits = [float(t.predicted_step == t.first_error_step) for t in group]
        value, lower, upper = bootstrap(hits, 1000, ("report", "localisation", low))
        chance = float(np.mean([1 / len(t.step_char_ends) for t in group]))
        rows.append(
            (
                f"{low}" if high - low == 1 else f"{low} to {high - 1}",
                Number(value=len(group), kind="count"),
                Number(value=value, low=lower, high=upper, kind="percent"),
                Number(value=chance, kind="percent"),
            )
        )
    return Table(
        name="localisation_by_steps",
        title="Wrong step found, by the number of steps",
        columns=("steps of the trace", "traces", "found", "by chance"),
        rows=rows,
    )


def _distances(traces: Sequence[LocalisedTrace]) -> Figure:
    """How many steps lie between the named and the true step, against a uniform guess."""
    named = [t for t in traces if _named(t) >= 0]
    if not named:
        raise Absent("the reward named no step in any trace")
    offsets = np.array([_named(t) - _label(t) for t in named])
    reach = int(min(10, np.abs(offsets).max(initial=1)))
    places = np.arange(-reach, reach + 1)
    chance = np.zeros(len(places))
    for trace in named:
        steps = len(trace.step_char_ends)
        for guess in range(steps):
            place = int(np.clip(guess - _label(trace), -reach, reach)) + reach
            chance[place] += 1 / steps / len(named)
    shares = np.bincount(np.clip(offsets, -reach, reach) + reach, minlength=len(places)) / len(named)
    drawing, axes = new_figure()
    axes.bar(places, 100 * shares, width=0.8, color=RIGHT, label="the reward")
    axes.plot(places, 100 * chance, color=WRONG, marker="s", ls="--", label="a uniform guess")
    axes.set(xlabel="named step − wrong step", ylabel="traces (%)")
    whole_ticks(axes)
    legend_below(axes)
    note = "" if reach < 10 else "Ends: ten steps and more."
    return Figure(name="localisation_distance", title="Distance of the named step", drawing=drawing, note=note)


def _marked(traces: Sequence[LocalisedTrace]) -> list[Part]:
    sizes = np.concatenate([np.abs(rewards_of(t.unit_scores)) for t in traces])
    sizes = sizes[np.isfinite(sizes)]
    limit = float(np.percentile(sizes, 98)) if len(sizes) else 0.0
    parts: list[Part] = []
    for name, title, hit in (
        ("found", "Errors that the reward finds", True),
        ("missed", "Errors that it misses", False),
    ):
        picked = [t for t in traces if (t.predicted_step == t.first_error_step) == hit][:SHOWN]
        shown = [_trace(t, limit) for t in picked]
        parts.append(Traces(title=title, traces=shown, note=MARKS if shown else "There are none."))
        if shown:
            parts.append(heatmap_figure(f"localisation_{name}", f"{title}: one trace", shown[0].views[0]))
    return parts


def _trace(trace: LocalisedTrace, limit: float) -> Trace:
    begins = [0, *trace.step_char_ends]

    def span(step: int) -> tuple[int, int] | None:
        return (begins[step], begins[step + 1]) if 0 <= step < len(trace.step_char_ends) else None

    error, predicted = span(_label(trace)), span(_named(trace))
    if error is not None and trace.edit_char is not None and error[0] <= trace.edit_char < error[1]:
        error = (trace.edit_char, error[1])
    values = rewards_of(trace.unit_scores)
    pieces = pieces_of(trace.text, trace.unit_char_ends, values, limit, error=error, predicted=predicted)
    facts = [
        f"{len(trace.step_char_ends)} steps",
        f"first wrong step {_label(trace) + 1}",
        f"named step {_named(trace) + 1}" if _named(trace) >= 0 else "no step named",
    ]
    return Trace(
        heading=trace.prompt_id,
        facts=facts,
        question=trace.question[:SHOWN_CHARACTERS],
        views=[View(name="raw rewards", pieces=pieces, limit=limit)],
        note=cut_note(trace.text),
    )
