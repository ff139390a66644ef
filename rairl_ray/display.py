"""What a person sees of a run: a live bar in a terminal, plain lines elsewhere. It can never end a run."""

from __future__ import annotations

import functools
import io
import re
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Concatenate, ParamSpec

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rairl_ray import metrics as names

P = ParamSpec("P")

SHOWN: dict[str, Callable[[float], str]] = {
    names.EVAL_PASS_AT_1: lambda x: f"pass@1 {100 * x:.1f}%",
    names.REWARD_MEAN: lambda x: f"reward {x:+.3f}",
    names.DISCRIMINATOR_AUROC: lambda x: f"AUROC {x:.3f}",
    names.ROLLOUT_TOKENS_PER_SECOND: lambda x: f"{x:,.0f} tokens/s",
}
"""Metrics on the status line; each keeps its last value until there is a newer one."""

# Model text and file names may hold escape sequences; they must not reach a terminal or a log.
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _harmless(
    method: Callable[Concatenate[Display, P], None],
) -> Callable[Concatenate[Display, P], None]:
    """A closed pipe, an odd encoding or a flaw in drawing costs the display, not the run."""

    @functools.wraps(method)
    def call(self: Display, /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.broken:
            return
        try:
            method(self, *args, **kwargs)
        except Exception:
            self.broken = True
            self._stop_live()

    return call


class Display:
    """Progress of one run. `total_steps` counts the whole run, `done_steps` what a resumed one already has."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        *,
        done_steps: int = 0,
        console: Console | None = None,
        seconds_between_lines: float = 5.0,
    ) -> None:
        self._title, self._total, self._done = title, total_steps, done_steps
        self._seconds_between_lines = seconds_between_lines
        self._first, self._started = done_steps, time.monotonic()
        self._phase = "starting"
        self._values: dict[str, float] = {}
        self._last_line = float("-inf")
        self._live: Live | None = None
        self.broken = False
        self._console = console or Console()
        # Rich's own answer to a closed pipe is SystemExit, even from its drawing thread.
        self._console.on_broken_pipe = self._on_broken_pipe  # type: ignore[method-assign]
        self._terminal = self._console.is_terminal and not self._console.is_dumb_terminal

    @_harmless
    def start(self) -> None:
        """Begin to draw. Everything else works without it, too, as plain lines."""
        self._started = time.monotonic()
        if self._terminal and self._live is None:
            live = Live(get_renderable=self._draw, console=self._console, refresh_per_second=4)
            live.start()
            self._live = live

    @_harmless
    def phase(self, name: str, total_steps: int | None = None, done_steps: int = 0) -> None:
        """What the run is doing. With `total_steps` the bar counts this phase's own steps from now on."""
        if name != self._phase and self._live is None:
            self._line(f"{self._title}: {name}")
        self._phase = name
        if total_steps is not None:
            self._total, self._done, self._first = total_steps, done_steps, done_steps
            self._started = time.monotonic()

    @_harmless
    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` steps are done. Metrics that the status line does not show are ignored."""
        self._done = step
        self.show(metrics)
        now = time.monotonic()
        if self._live is None and (now - self._last_line >= self._seconds_between_lines or step >= self._total):
            self._last_line = now
            self._line(f"{self._title}: {self._status()}")

    @_harmless
    def show(self, metrics: Mapping[str, float]) -> None:
        """New values for the status line without a step."""
        self._values |= {name: float(metrics[name]) for name in SHOWN if name in metrics}

    @_harmless
    def note(self, text: str) -> None:
        """One message that stays: a warning, a path, an event."""
        self._line(text)

    @_harmless
    def table(self, title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> None:
        """A result table: one line a row, the cells of `columns`; a missing cell stays empty."""
        table = table_of(title, rows, columns, box.SIMPLE if self._terminal else box.ASCII2)
        if self._terminal:
            self._console.print(table)
            return
        # Drawn apart, at the width it needs: a log file has no width to wrap to.
        buffer = Console(file=io.StringIO(), width=1000, force_terminal=False, color_system=None)
        buffer.print(table)
        for line in buffer.file.getvalue().splitlines():  # type: ignore[attr-defined]
            if line.strip():
                self._line(line.rstrip())

    @_harmless
    def finish(self, next_steps: Sequence[str] = ()) -> None:
        """Stop drawing and say where to look next."""
        self._stop_live()
        for text in next_steps:
            self._line(f"  {text}")

    def __enter__(self) -> Display:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_live()

    # --- inside ----------------------------------------------------------------------------------

    def _line(self, text: str) -> None:
        text = _clean(text)
        if self._terminal:
            self._console.print(Text(text), soft_wrap=True)
            return
        encoding = getattr(self._console.file, "encoding", None) or "utf-8"
        self._console.file.write(text.encode(encoding, "replace").decode(encoding) + "\n")
        self._console.file.flush()

    def _draw(self) -> RenderableType:
        """Called by the drawing thread, which must not meet an exception either."""
        try:
            bar = ProgressBar(total=max(1, self._total), completed=self._done, width=40)
            return Group(
                bar, Text(_clean(f"{self._title}: {self._status()}"), no_wrap=True, overflow="ellipsis")
            )
        except Exception:
            return Text("")

    def _status(self) -> str:
        parts = [self._phase, f"step {self._done}/{self._total}", f"ETA {self._eta()}"]
        # A copy: the drawing thread reads while `step` writes.
        values = dict(self._values)
        return "  ".join(parts + [show(values[name]) for name, show in SHOWN.items() if name in values])

    def _eta(self) -> str:
        steps = self._done - self._first
        if steps <= 0:
            return "?"
        return clock((time.monotonic() - self._started) / steps * max(0, self._total - self._done))

    def _on_broken_pipe(self) -> None:
        self._console.quiet = self.broken = True

    def _stop_live(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            try:
                live.stop()
            except Exception:
                self.broken = True


def table_of(
    title: str, rows: Sequence[Mapping[str, object]], columns: Sequence[str], lines: box.Box = box.SIMPLE
) -> Table:
    """A table to draw: one line a row, the cells of `columns`; a missing cell stays empty."""
    table = Table(title=_clean(title), box=lines, title_justify="left")
    for column in columns:
        numeric = all(isinstance(row.get(column, 0.0), int | float) for row in rows)
        table.add_column(Text(_clean(column)), justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(_clean(_cell(row.get(column)))) for column in columns))
    return table


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _clean(text: str) -> str:
    return _CONTROL.sub("", str(text))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
