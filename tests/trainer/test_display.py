"""The display in a terminal and without one; whatever happens to it, the run goes on."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

import pytest
from rich.console import Console

from rairl_ray.display import Display

METRICS = {
    "eval/pass_at_1": 0.612,
    "reward/mean": 0.25,
    "discriminator/auroc": 0.8312,
    "rollout/tokens_per_second": 1234.0,
    "policy/loss": 0.1,
}
ROWS = [{"run": "sft", "pass@1": 0.557, "n": 256}, {"run": "airl [bold]", "pass@1": 0.65912345}]


def plain(**options: float) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    return Display("demo", 100, console=Console(file=file, force_terminal=False), **options), file  # type: ignore[arg-type]


def terminal() -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    return Display("demo", 100, console=Console(file=file, force_terminal=True, width=200)), file


def whole_run(display: Display) -> None:
    with display:
        display.phase("rollout")
        for step in range(1, 101):
            display.step(step, METRICS if step == 1 else {})
        display.note("checkpoint saved \x1b[31mred\x1b[0m\x07 in runs/demo")
        display.table("Result", ROWS, ["run", "pass@1", "n"])
        display.finish(["launch.py report runs/demo"])


def test_plain_lines_have_everything_and_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    display, file = plain(seconds_between_lines=0.0)
    whole_run(display)
    text = file.getvalue()
    assert not display.broken
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    steps = [line for line in text.splitlines() if " step " in f" {line} "]
    assert len(steps) == 100
    for piece in (
        "demo: rollout",
        "step 100/100",
        "pass@1 61.2%",
        "reward +0.250",
        "AUROC 0.831",
        "1,234 tokens/s",
    ):
        assert piece in steps[-1]
    assert "ETA 0:00:00" in steps[-1]
    assert "checkpoint saved red in runs/demo" in text and "launch.py report runs/demo" in text
    assert "airl [bold]" in text and "0.6591" in text and "256" in text


def test_plain_lines_are_few_and_the_last_step_is_among_them() -> None:
    display, file = plain(seconds_between_lines=3600.0)
    for step in range(1, 101):
        display.step(step, METRICS)
    assert [re.findall(r"step (\d+)/100", line) for line in file.getvalue().splitlines()] == [["1"], ["100"]]


def test_a_long_table_row_is_one_line_without_a_terminal() -> None:
    display, file = plain()
    display.table("Result", [{"run": "x" * 300, "value": 1.0}], ["run", "value"])
    assert any("x" * 300 in line and "1" in line for line in file.getvalue().splitlines())


def test_terminal_draws_status_notes_and_table() -> None:
    display, file = terminal()
    whole_run(display)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert not display.broken and "\x1b[" in file.getvalue()
    for piece in (
        "step 100/100",
        "pass@1 61.2%",
        "AUROC 0.831",
        "checkpoint saved red in runs/demo",
        "airl [bold]",
    ):
        assert piece in text
    assert "\x07" not in text and "\x1b[31mred" not in file.getvalue()
    assert (
        file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1
    )  # the cursor comes back


def test_the_cursor_comes_back_and_the_error_goes_on_after_an_exception() -> None:
    display, file = terminal()
    with pytest.raises(KeyboardInterrupt), display:
        display.step(1, METRICS)
        raise KeyboardInterrupt
    assert "\x1b[?25h" in file.getvalue()
    for thread in threading.enumerate():
        if "Refresh" in type(thread).__name__:
            thread.join(timeout=10)
            assert not thread.is_alive()


def test_eta_counts_from_where_a_resume_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("rairl_ray.display.time.monotonic", lambda: now[0])
    file = io.StringIO()
    display = Display("demo", 100, done_steps=40, console=Console(file=file), seconds_between_lines=0.0)
    display.step(40, {})
    now[0] = 100.0
    display.step(50, {})
    display.phase("warm-up", total_steps=20)
    now[0] = 110.0
    display.step(5, {})
    lines = file.getvalue().splitlines()
    assert "ETA ?" in lines[0] and "ETA 0:08:20" in lines[1]
    assert "step 5/20" in lines[-1] and "ETA 0:00:30" in lines[-1]


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


@pytest.mark.parametrize("force", [True, False])
def test_a_closed_pipe_never_ends_a_run(force: bool) -> None:
    display = Display(
        "demo", 100, console=Console(file=Broken(), force_terminal=force), seconds_between_lines=0.0
    )
    whole_run(display)
    assert display.broken


def test_bad_values_and_narrow_encodings_never_end_a_run(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w", encoding="ascii") as file:
        display = Display("démo → x", 10, console=Console(file=file, force_terminal=False))
        display.note("β")
        display.table("Tabelle ü", [{"ä": "→"}], ["ä"])
        display.step(1, {"reward/mean": float("nan")})
    assert "d?mo ? x" in (tmp_path / "log").read_text() and "nan" in (tmp_path / "log").read_text()
    display, _ = plain()
    display.step(1, {"reward/mean": "no number"})  # type: ignore[dict-item]
    display.step(2, {})
    assert display.broken
