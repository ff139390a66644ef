"""One look for all figures: column width, 8 pt, colours that the colour-blind can tell apart."""

from __future__ import annotations

import io
from itertools import cycle, islice
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 3.3
"""Inches: one column of a two-column paper."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette without its yellow, which is too light for lines."""

RIGHT, WRONG, NEUTRAL = "#0072B2", "#D55E00", "#777777"
LINE_STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)), (0, (7, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

LEVELS = 10
"""Steps of the heatmap's scale on either side of 0."""

DIVERGING = LinearSegmentedColormap.from_list("orange_blue", (WRONG, "#ffffff", RIGHT))
"""For what lies around 0, as in the heatmaps: orange below, blue above."""

_NEGATIVE, _POSITIVE = np.array([241, 150, 60]), np.array([100, 170, 230])

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "rairl",
    "text.parse_math": False,
    "savefig.dpi": 300,
}
"""matplotlib's settings while a report is made. Type 42: a PDF's text stays text."""

_NO_DATE: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
    "svg": {"Date": None, "Creator": None},
}


def new_figure(height: float = 2.3, width: float = WIDTH) -> tuple[Figure, Axes]:
    """An empty figure of column width with one pair of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def image(figure: Figure, kind: str) -> bytes:
    """The figure as png, pdf or svg; the same bytes for the same figure."""
    if figure.get_layout_engine() is not None:
        # Laid out once and not anew for each format: that is most of the time.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, metadata=_NO_DATE[kind])
    return buffer.getvalue()


def percent_axis(axes: Axes) -> None:
    """Keep a vertical axis of percentages from magnifying what is all one value."""
    low, high = axes.get_ylim()
    if high - low < 2:
        middle = (low + high) / 2
        axes.set_ylim(max(-1.0, middle - 5), middle + 5)


def level_of(value: float, limit: float) -> int:
    """Step of the diverging scale, -LEVELS..LEVELS; values beyond the limit take its end."""
    if not limit > 0:
        return 0
    return int(np.clip(round(LEVELS * value / limit), -LEVELS, LEVELS))


def level_colour(level: int) -> str:
    """Hex colour of a step: orange below 0, white, blue above; black text is legible on each."""
    end = _POSITIVE if level > 0 else _NEGATIVE
    share = abs(level) / LEVELS
    red, green, blue = (round(float(255 + share * (c - 255))) for c in end)
    return f"#{red:02x}{green:02x}{blue:02x}"


def line_looks(count: int) -> list[dict[str, Any]]:
    """Colour and dash for each of several lines, so that neither alone has to tell them apart."""
    looks = zip(COLOURS, LINE_STYLES, strict=True)
    return [{"color": colour, "linestyle": dash} for colour, dash in islice(cycle(looks), count)]


def legend_below(axes: Axes) -> None:
    """A legend under the axes, where it hides no line."""
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1:
        short = [shortened(label, 44) for label in labels]
        longest = max(map(len, short))
        columns = 1 if longest > 22 else 3 if longest <= 10 and len(short) == 3 else 2
        rows = -(-len(short) // columns)
        figure = axes.get_figure(root=True)
        assert figure is not None
        figure.set_figheight(figure.get_figheight() + 0.15 * max(0, rows - 2))
        figure.legend(
            handles, short, loc="outside lower center", ncols=columns, handlelength=2.4, columnspacing=1.0
        )


def shortened(text: str, length: int) -> str:
    """A label that fits; its middle gives way."""
    return text if len(text) <= length else f"{text[: length // 2 - 1]}…{text[-length // 2 :]}"


def whole_ticks(axes: Axes) -> None:
    """Ticks of the horizontal axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
