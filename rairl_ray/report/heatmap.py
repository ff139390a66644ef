"""Token heatmaps: samples in which each unit carries its reward, on the page and as a drawing."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.patches import Rectangle

from rairl_ray.algorithms.advantages import discounted_sums
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.report.arrays import rewards_of, score_of
from rairl_ray.report.collect import Evaluation
from rairl_ray.report.parts import Absent, Figure, Part, Piece, Trace, Traces, View
from rairl_ray.report.safety import visible
from rairl_ray.report.style import WIDTH, level_colour, level_of, new_figure

SHOWN_CHARACTERS = 6000
"""Of a longer text the page shows the beginning, and says so."""

SAMPLES = 3
"""Traces of each kind on the page."""

GAMMA = 0.95
"""Discount of the second reading where no configuration gives one."""

READ = "Blue: reward above 0; orange: below. ∎ is the end of the text. “Numbers” shows each reward."

_COLUMNS, _LINES, _LINE_POINTS = 54, 48, 9.5


def samples_parts(evaluation: Evaluation, gamma: float = GAMMA) -> list[Part]:
    """The best right and worst wrong samples by the reward, then those on which it errs most.

    Without rewards: right and wrong samples as they come.
    """
    rows = evaluation.rows
    kinds: list[tuple[str, str, list[EvalRow]]] = [
        ("best_right", "Best right samples", [row for row in rows if row.correct]),
        ("worst_wrong", "Worst wrong samples", [row for row in rows if not row.correct]),
        ("best_wrong", "Wrong samples that the reward likes best", [row for row in rows if not row.correct]),
        ("worst_right", "Right samples that the reward likes least", [row for row in rows if row.correct]),
    ]
    scored = [row for row in rows if np.isfinite(score_of(row)) and row.unit_scores is not None]
    limits = {name: _limit(scored, name, gamma) for name in _READINGS} if scored else {}
    parts: list[Part] = []
    for name, title, group in kinds[: 4 if scored else 2]:
        group = [row for row in group if not scored or np.isfinite(score_of(row))]
        sign = -1 if name.startswith("best") else 1
        group = sorted(group, key=lambda row: sign * score_of(row)) if scored else group
        picked = _of_different_problems(group)
        title = title if scored else title.removeprefix("Best ").removeprefix("Worst ").capitalize()
        if not picked:
            parts.append(Traces(title=title, traces=[], note="There are none."))
            continue
        traces = [_trace_of(row, limits, gamma) for row in picked]
        parts.append(Traces(title=title, traces=traces, note=READ if scored else ""))
        if scored and name in ("best_right", "worst_wrong"):
            parts += [
                heatmap_figure(f"heatmap_{name}_{reading.split()[0]}", f"{title[:-1]}: {reading}", view)
                for reading, view in zip(_READINGS, traces[0].views, strict=True)
            ]
    return parts


_READINGS = ("raw rewards", "discounted rewards")


def _limit(rows: Sequence[EvalRow], reading: str, gamma: float) -> float:
    """End of the colour scale: the 98th percentile of the size; one outlier must not whiten the rest."""
    values = [np.abs(_read(rewards_of(row.unit_scores or ()), reading, gamma)) for row in rows[:2000]]
    flat = np.concatenate(values) if values else np.zeros(0)
    flat = flat[np.isfinite(flat)]
    return float(np.percentile(flat, 98)) if len(flat) else 0.0


def _read(rewards_U: np.ndarray, reading: str, gamma: float) -> np.ndarray:
    if reading == _READINGS[0]:
        return rewards_U
    return discounted_sums(np.nan_to_num(rewards_U), gamma)


def _of_different_problems(rows: Sequence[EvalRow]) -> list[EvalRow]:
    """The first SAMPLES rows of distinct problems."""
    first: dict[str, EvalRow] = {}
    for row in rows:
        first.setdefault(row.prompt_id, row)
        if len(first) == SAMPLES:
            break
    return list(first.values())


def _trace_of(row: EvalRow, limits: Mapping[str, float], gamma: float) -> Trace:
    facts = [
        "right" if row.correct else "wrong",
        f"answer found: {_short(row.extracted)}",
        f"gold answer: {_short(row.answer)}",
        f"{row.tokens} tokens",
        f"policy version {row.policy_version}",
    ]
    if np.isfinite(score_of(row)):
        facts.insert(1, f"score {score_of(row):+.3f}")
    if row.finish_reason == "length":
        facts.append("truncated")
    rewards, ends = rewards_of(row.unit_scores or ()), list(row.unit_char_ends or ())
    if len(rewards) and len(rewards) == len(ends) and limits:
        views = [
            View(
                name=reading if reading == _READINGS[0] else f"{reading} still to come (gamma {gamma:g})",
                pieces=pieces_of(row.generation, ends, _read(rewards, reading, gamma), limits[reading]),
                limit=limits[reading],
            )
            for reading in _READINGS
        ]
    else:
        views = [View(name="text", pieces=[Piece(text=row.generation[:SHOWN_CHARACTERS])], limit=float("nan"))]
    return Trace(
        heading=f"{row.prompt_id}, sample {row.generation_idx}",
        facts=facts,
        question=row.question[:SHOWN_CHARACTERS],
        views=views,
        note=cut_note(row.generation),
    )


def cut_note(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return ""
    return f"Cut: the first {SHOWN_CHARACTERS:,} of {len(text):,} characters are shown."


def pieces_of(
    text: str,
    unit_char_ends: Sequence[int],
    values_U: np.ndarray,
    limit: float,
    *,
    error: tuple[int, int] | None = None,
    predicted: tuple[int, int] | None = None,
) -> list[Piece]:
    """A text cut where a unit, the error or the predicted step begins or ends.

    error, predicted: [from, to) in characters. Units that end in one place share it: the last reward shows
    there, and the earlier ones, like that of the end of the text, stand beside it as a piece of their own.
    """
    shown = min(len(text), SHOWN_CHARACTERS)
    ends = [min(int(end), len(text)) for end in unit_char_ends]
    marks = [edge for span in (error, predicted) if span is not None for edge in span]
    edges = sorted({0, shown, *(x for x in (*ends, *marks) if 0 <= x <= shown)})
    pieces: list[Piece] = []
    for start, end in pairwise(edges):
        unit = bisect_right(ends, start)
        value = float(values_U[unit]) if unit < len(ends) else float("nan")
        inside = [span is not None and span[0] <= start < span[1] for span in (error, predicted)]
        tags = ["error" * (inside[0] and start == error[0])] if error else []
        tags += ["named by the reward" * (inside[1] and start == predicted[0])] if predicted else []
        piece = Piece(
            text=text[start:end],
            level=level_of(value, limit) if np.isfinite(value) else None,
            reward=f"{value:+.2f}" if np.isfinite(value) and end == ends[unit] else "",
            mark=("", "error", "predicted", "both")[inside[0] + 2 * inside[1]],
            tag=", ".join(tag for tag in tags if tag),
        )
        pieces.append(piece)
    # The end-of-sequence token has no characters.
    if shown == len(text) and len(ends) > 1 and ends[-1] == ends[-2] and np.isfinite(values_U[-1]):
        value = float(values_U[-1])
        pieces.append(Piece(text="∎", level=level_of(value, limit), reward=f"{value:+.2f}"))
    return pieces


def heatmap_figure(name: str, title: str, view: View) -> Figure:
    """The pieces of one view, drawn in lines of fixed width; long texts are cut."""
    placed: list[tuple[int, int, str, Piece]] = []
    line = column = 0
    for piece in view.pieces:
        for text in _fitting(piece.text, column):
            if text == "\n":
                line, column = line + 1, 0
                continue
            placed.append((line, column, text, piece))
            column += len(text)
    last = max((at[0] for at in placed), default=0)
    if not placed:
        raise Absent("the sample is empty")
    lines = min(last + 1, _LINES)
    drawing, axes = new_figure(height=(lines * _LINE_POINTS + 34) / 72)
    axes.set(xlim=(0, _COLUMNS), ylim=(lines + 0.2, -0.2))
    axes.axis("off")
    for line, column, text, piece in placed:
        if line >= lines:
            break
        colour = "#ffffff" if piece.level is None else level_colour(piece.level)
        axes.add_patch(Rectangle((column, line), len(text), 0.94, color=colour, lw=0))
        if piece.mark in ("error", "both"):
            axes.plot([column, column + len(text)], [line + 0.96] * 2, color="black", lw=1.2)
        if piece.mark in ("predicted", "both"):
            axes.plot([column, column + len(text)], [line + 0.02] * 2, color="black", lw=0.8, ls=(0, (2, 1)))
        size = 72 * WIDTH * 0.95 / _COLUMNS / 0.602
        axes.text(column, line + 0.72, text, family="DejaVu Sans Mono", fontsize=size, va="baseline")
    _scale(axes, view.limit)
    note = "" if last < _LINES else f"Cut after {_LINES} lines."
    return Figure(name=name, title=title, drawing=drawing, note=note, place="files")


def _fitting(text: str, column: int) -> list[str]:
    """Pieces of a text that fit into lines from a column on, with "\\n" between lines."""
    found: list[str] = []
    for number, row in enumerate(visible(text).replace("\t", "  ").split("\n")):
        if number:
            found.append("\n")
            column = 0
        while column + len(row) > _COLUMNS:
            room = _COLUMNS - column
            found += [row[:room], "\n"] if room else ["\n"]
            row, column = row[room:], 0
        if row:
            found.append(row)
            column += len(row)
    return found


def _scale(axes, limit: float) -> None:  # type: ignore[no-untyped-def]
    """The colour scale below the text."""
    points = 1 / 72 / axes.figure.get_figheight()
    bar = axes.inset_axes((0.3, -14 * points, 0.4, 7 * points))
    for index, level in enumerate(range(-10, 11)):
        bar.add_patch(Rectangle((index, 0), 1, 1, color=level_colour(level), lw=0))
    bar.set(xlim=(0, 21), ylim=(0, 1), yticks=[], xticks=[0, 10.5, 21])
    bar.set_xticklabels([f"{-limit:.2f}", "0", f"+{limit:.2f}"])
    bar.tick_params(length=2, pad=1.5)
    bar.grid(False)


def _short(text: str | None, length: int = 60) -> str:
    if text is None:
        return "none"
    return text if len(text) <= length else f"{text[:length]}…"
