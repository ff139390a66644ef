"""What a page is made of: tables, figures, traces, and the parts that are missing with their reason."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from matplotlib.figure import Figure as Drawing

from rairl_ray.errors import UserError


class Absent(Exception):
    """A part that cannot be made from what the files hold; the message says what is missing."""


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number of a table with its 95% interval, or its standard deviation over seeds."""

    value: float
    low: float = math.nan
    high: float = math.nan
    std: float = math.nan
    kind: Literal["plain", "percent", "count", "p"] = "plain"
    """How it is shown: a share is a percent, a p value has its own form. CSV files hold the raw value."""


Cell = str | Number | None


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows under named columns; also written as Markdown, LaTeX and CSV."""

    name: str
    """File name without its ending; unique on the page."""
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing; also written as PNG and PDF."""

    name: str
    title: str
    drawing: Drawing
    note: str = ""
    place: Literal["page", "files"] = "page"
    """`files`: the page shows the same as text, which needs no drawing."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A run of characters of a trace under one reward."""

    text: str
    level: int | None = None
    """-LEVELS..LEVELS of the colour scale; None where no unit covers the text."""
    reward: str = ""
    """Shown with the last piece of a unit."""
    mark: Literal["", "error", "predicted", "both"] = ""
    tag: str = ""
    """A word before the piece, such as `error`."""


@dataclass(frozen=True, kw_only=True)
class View:
    """The pieces of one trace under one reading of its rewards."""

    name: str
    pieces: Sequence[Piece]
    limit: float
    """The reward at the end of the colour scale; NaN where there are no rewards."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One sample as the page shows it."""

    heading: str
    facts: Sequence[str]
    question: str
    views: Sequence[View]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Traces:
    """A few samples under one title."""

    title: str
    traces: Sequence[Trace]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Plain text to be unfolded, such as a configuration."""

    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Missing:
    """A part that could not be made, and why."""

    title: str
    reason: str
    fault: Literal["input", "report"] = "input"
    """`report`: an error that nobody expected, which a person should look at."""


Part = Table | Figure | Traces | Listing | Missing


@dataclass(frozen=True, kw_only=True)
class Section:
    """Parts under one heading."""

    title: str
    parts: Sequence[Part] = field(default_factory=list)
    intro: str = ""


def attempt(title: str, make: Callable[[], Sequence[Part]]) -> list[Part]:
    """The parts that `make` returns, or one that says why there are none. One bad part never ends a report."""
    try:
        return list(make())
    except (Absent, UserError) as missing:
        return [Missing(title=title, reason=str(missing).splitlines()[0])]
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"could not be made: {type(error).__name__}: {error} ({place.name}, line {place.lineno})"
        return [Missing(title=title, reason=reason, fault="report")]
