"""How the reward tells right from wrong: calibration, distributions, and what it goes along with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing

from rairl_ray.evaluation.calibration import ece, reliability, score_histograms, sigmoid, welch_t_test
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.report.arrays import score_of, scored
from rairl_ray.report.collect import Evaluation
from rairl_ray.report.labels import label_of, number_of
from rairl_ray.report.parts import Absent, Cell, Figure, Number, Part, Table
from rairl_ray.report.style import DIVERGING, NEUTRAL, RIGHT, WIDTH, WRONG, legend_below, new_figure
from rairl_ray.report.tables import cell_text

BINS = 10


def calibration_table(evaluation: Evaluation) -> list[Part]:
    """The summary's calibration metrics."""
    prefixes = ("calibration/", "discriminator/")
    found = {m: entry for m, entry in evaluation.summary.items() if m.startswith(prefixes)}
    if not found:
        raise Absent("no reward scored these rows")
    rows: list[Sequence[Cell]] = [
        (label_of(metric)[0], number_of(metric, entry), Number(value=entry.get("n", np.nan), kind="count"))
        for metric, entry in found.items()
    ]
    return [
        Table(
            name="calibration",
            title="Calibration",
            columns=("metric", "value", "problems"),
            rows=rows,
            note="Probability = sigmoid of the score. Within a length (or format) only samples alike in it are "
            "compared: what is left is not owed to it. In brackets: 95% bootstrap intervals over problems.",
        )
    ]


def reliability_diagram(evaluation: Evaluation) -> list[Part]:
    """Share of right samples against the probability, and how many samples each bin has."""
    rows = scored(evaluation.rows)
    correct, probabilities = _correct(rows), sigmoid(_scores(rows))
    bins = reliability(correct, probabilities, BINS)
    drawing = Drawing(figsize=(WIDTH, 3.0), layout="constrained")
    axes, below = drawing.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 100], [0, 100], color=NEUTRAL, ls="--", lw=1, label="perfect calibration")
    filled = [b for b in bins if b.count]
    axes.plot(
        [100 * b.confidence for b in filled], [100 * b.accuracy for b in filled],
        color=RIGHT, marker="o", label="the reward",
    )  # fmt: skip
    axes.set(xlim=(0, 100), ylim=(-3, 103), ylabel="right (%)", xticks=range(0, 101, 20))
    below.bar([50 * (b.low + b.high) for b in bins], [b.count for b in bins], width=80 / BINS, color=RIGHT)
    below.set(xlabel="probability by the reward (%)", ylabel="samples")
    legend_below(axes)
    error = ece(correct, probabilities, bins=BINS)
    note = f"{len(rows):,} samples, expected calibration error {error:.3f} over {BINS} bins."
    return [Figure(name="reliability", title="Reliability diagram", drawing=drawing, note=note)]


def score_histogram(evaluation: Evaluation) -> list[Part]:
    """Scores of right and of wrong samples, with Welch's t-test."""
    rows = scored(evaluation.rows)
    correct, scores = _correct(rows), _scores(rows)
    edges, right, wrong = score_histograms(correct, scores)
    drawing, axes = new_figure()
    for counts, name, colour, hatch in (
        (wrong, f"wrong ({wrong.sum():,})", WRONG, "///"),
        (right, f"right ({right.sum():,})", RIGHT, None),
    ):
        share = 100 * counts / max(1, counts.sum())
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.35, lw=0, hatch=hatch)
        axes.stairs(share, edges, color=colour, lw=1.2, label=name, ls="--" if hatch else "-")
    axes.set(xlabel="score of the sample", ylabel="samples of the class (%)")
    legend_below(axes)
    t, df, p = welch_t_test(scores[correct], scores[~correct])
    if np.isfinite(t):
        shown = cell_text(Number(value=p, kind="p"))
        note = f"Welch's t-test: t = {t:.2f}, {df:.0f} degrees of freedom, p {_equals(shown)}. "
        note += "It takes samples as independent; those of one problem are not."
    else:
        note = "No t-test: it needs two right and two wrong samples."
    return [
        Figure(name="score_histogram", title="Scores of right and wrong samples", drawing=drawing, note=note)
    ]


def _equals(text: str) -> str:
    return text if text.startswith("<") else f"= {text}"


def correlation_matrix(evaluation: Evaluation) -> list[Part]:
    """Pearson correlations of score, correctness, format, length and each verifiable reward."""
    rows = evaluation.rows
    columns = _columns(rows)
    if len(columns) < 2:
        raise Absent("fewer than two of score, correctness, format and length vary in these rows")
    labels = list(columns)
    size = len(labels)
    values = np.full((size, size), np.nan)
    for i, a in enumerate(columns.values()):
        for j, b in enumerate(columns.values()):
            both = np.isfinite(a) & np.isfinite(b)
            if both.sum() > 1 and a[both].std() > 0 and b[both].std() > 0:
                values[i, j] = np.corrcoef(a[both], b[both])[0, 1]
    drawing, axes = new_figure(height=min(4.5, 1.4 + 0.32 * size), width=WIDTH)
    axes.imshow(values, cmap=DIVERGING, vmin=-1, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        text = "–" if not np.isfinite(value) else f"{value:.2f}"
        colour = "white" if np.isfinite(value) and abs(value) > 0.7 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=6 if size > 7 else 7, color=colour)
    axes.set_xticks(range(size), labels, rotation=35, ha="right")
    axes.set_yticks(range(size), labels)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    table = Table(
        name="format_correlations",
        title="Correlations",
        columns=("", *labels),
        rows=[
            (label, *(Number(value=float(x)) for x in row)) for label, row in zip(labels, values, strict=True)
        ],
    )
    note = "Pearson correlations over samples. What never varies is left out."
    figure = Figure(name="format_correlation", title="What goes along with what", drawing=drawing, note=note)
    return [figure, table]


def _columns(rows: Sequence[EvalRow]) -> dict[str, np.ndarray]:
    """Name -> [R] of everything that varies."""
    nan = float("nan")
    kinds = sorted({kind for row in rows for kind in row.verifiable_rewards or {}})
    columns = {
        "score": [score_of(row) for row in rows],
        "right": [float(row.correct) for row in rows],
        "well-formed": [float(row.format_ok) for row in rows],
        "truncated": [float(row.finish_reason == "length") for row in rows],
        "tokens": [float(row.tokens) for row in rows],
        "log-prob.": [float(np.mean(row.policy_logprobs)) if row.policy_logprobs else nan for row in rows],
        **{kind[:14]: [float((row.verifiable_rewards or {}).get(kind, nan)) for row in rows] for kind in kinds},
    }
    arrays = {name: np.array(values) for name, values in columns.items()}
    return {name: a for name, a in arrays.items() if len(set(a[np.isfinite(a)].tolist())) > 1}


def _correct(rows: Sequence[EvalRow]) -> np.ndarray:
    return np.array([row.correct for row in rows], dtype=bool)


def _scores(rows: Sequence[EvalRow]) -> np.ndarray:
    return np.array([score_of(row) for row in rows])
