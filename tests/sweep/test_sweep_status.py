"""How a sweep stands and how it is stopped from another shell, by its folders alone; nothing is trained."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import main
from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.display import Display
from rairl_ray.errors import UserError
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep import run, status, supervise
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import SAVED, Trial, planned, stop_mark, sweep_folder, trial_folder, trials
from rairl_ray.sweep.status import SweepDisplay, blocks, find_sweep, headline, look, show_status
from rairl_ray.sweep.stopping import ask_to_stop, forget_requests, listening, stop_request
from tests.runs import ROOT
from tests.sweep.test_sweep_folders import of_tune
from tests.sweeps import end, written


def started(tmp_path: Path, **changes: Any) -> SweepFile:
    """A sweep as its folder says."""
    file = load_sweep(written(tmp_path, **changes))
    sweep_folder(file).mkdir(parents=True)
    (sweep_folder(file) / SAVED).write_text(file.model_dump_json())
    return file


def begin(file: SweepFile, item: Trial, *rows: dict[str, float], holder: str | None = None) -> RunFolder:
    folder = RunFolder(trial_folder(file, item.id))
    folder.create()
    folder.write_config(dump_yaml(load_config(item.base, item.overrides)))
    for row in rows:
        folder.append_metrics(int(row["step"]), {key: x for key, x in row.items() if key != "step"})
    if holder:
        (folder.root / ".lock").write_text(holder)
    return folder


def told(file: SweepFile) -> str:
    output = io.StringIO()
    show_status(file, Display(file.name, 0, console=Console(file=output, width=80)))
    return output.getvalue()


ALIVE = f"process {os.getpid()} on {socket.gethostname()}"


def test_each_state_is_told_from_the_folders(tmp_path: Path) -> None:
    file = started(tmp_path, seeds=[0, 1, 2, 3], overrides={"warm_start": None, "trainer.steps": 9})
    ended, runs, early, killed, failed, begins, _, asked = made = trials(file)
    assert list(planned(file)) == [item.id for item in made]
    end(file, ended, {"eval/pass_at_1": 0.5})
    warm = {"step": 0, "time/step": 900.0}
    begin(file, runs, warm, {"step": 4, "time/step": 20.0, "eval/pass_at_1": 0.7}, holder=ALIVE)
    begin(file, early, {"step": 2, "eval/pass_at_1": 0.1})
    stop_mark(file, early.id).parent.mkdir()
    stop_mark(file, early.id).touch()
    begin(file, killed, {"step": 1}, holder=f"process 999999999 on {socket.gethostname()}")
    begin(file, failed, {"step": 1}).event("failed: DataError: row 3")
    (sweep_folder(file) / "logs").mkdir()
    (sweep_folder(file) / "logs" / f"{begins.id}.log").write_text("")
    begin(file, asked, {"step": 3})
    stop_request(file, asked.id).parent.mkdir()
    stop_request(file, asked.id).touch()
    with RunFolder(sweep_folder(file)).lock():
        seen = look(file)
        assert f"run by {ALIVE}" in told(file)
    assert [item.trial for item in seen] == [item.id for item in made]
    assert [item.state for item in seen] == [
        "finished", "running", "stopped early", "unfinished", "failed", "starting", "not started", "stopped",
    ]  # fmt: skip
    one = seen[1]
    # the warm-up's step took 900 s; five steps of 20 s are left
    assert (one.step, one.steps, one.value, one.seconds_left) == (4, 9, 0.7, 100.0)
    assert [item.step for item in seen] == [None, 4, 2, 1, 1, None, None, 3]
    (block,) = blocks(file, seen)
    assert block.title == f"eval/pass_at_1, max; best so far: {runs.id} 0.7"
    assert block.rows[1] == {
        "trial": runs.id, "state": "running", "step": "4/9", "eval/pass_at_1": "0.7", "ETA": "0:01:40",
    }  # fmt: skip
    assert headline(file, seen) == (
        "sw: 8 trials: 1 running, 1 starting, 1 finished, 1 stopped early, 1 stopped, 1 unfinished, 1 failed, "
        "1 not started"
    )
    # once nobody runs the sweep a trial that only has a log failed before it had a folder
    assert look(file)[5].state == "failed" and "does not run" in told(file)


def test_five_hundred_trials_stay_readable(tmp_path: Path) -> None:
    file = started(tmp_path, space={"policy.learning_rate": [i * 1e-6 for i in range(1, 501)]}, seeds=[0])
    made = trials(file)
    for index, item in enumerate(made[:30]):
        end(file, item, {"eval/pass_at_1": index / 100})
    for item in made[30:50]:
        begin(file, item, {"step": 1}, holder=ALIVE)
    for item in made[50:60]:
        begin(file, item).event("failed: no")
    with RunFolder(sweep_folder(file)).lock():
        text = told(file)
    lines = text.splitlines()
    assert lines[0] == "sw: 500 trials: 20 running, 30 finished, 10 failed, 440 not started"
    assert len(lines) < 50 and "running (16 of 20)" in text and "failed (5 of 10)" in text
    best = [line for line in lines if "finished" in line and made[29].id in line]
    assert "best so far (5 of 30)" in text and len(best) == 1 and "0.29" in best[0]
    assert made[24].id not in text and "\x1b" not in text


def test_a_long_metrics_file_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = started(tmp_path)
    monkeypatch.setattr(status, "TAIL_BYTES", 100)
    rows = [{"step": step, "eval/pass_at_1": step / 100} for step in range(1, 50)]
    folder = begin(file, trials(file)[0], *rows)
    with open(folder.metrics, "a") as output:
        output.write('{"step": 50, "eval/pa')
    seen = look(file)[0]
    assert (seen.step, seen.value) == (49, 0.49)


def test_the_live_display_is_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = started(tmp_path)
    begin(file, trials(file)[0], {"step": 2, "eval/pass_at_1": 0.25}, holder=ALIVE)
    display = SweepDisplay(file, 4)
    console = Console(file=io.StringIO(), width=160)
    console.print(display._draw())
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "sw: 4 trials: 1 running, 3 not started" in drawn and "0.25" in drawn
    # it looks every few seconds, and a folder that cannot be read leaves what was there
    monkeypatch.setattr(status, "look", lambda file: pytest.fail("too early"))
    assert display._draw() is not None
    monkeypatch.setattr(status, "look", lambda file: 1 / 0)
    monkeypatch.setattr(status, "SECONDS_BETWEEN_LOOKS", 0.0)
    console.print(display._draw())
    assert console.file.getvalue().count("1 running") == 2  # type: ignore[attr-defined]


def test_a_sweep_is_found_by_file_folder_or_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = started(tmp_path, name="deep/sw")
    monkeypatch.chdir(tmp_path)
    for text in ("sweep.yaml", "runs/deep/sw", "deep/sw"):
        found = find_sweep(text)
        assert sweep_folder(found) == sweep_folder(file) and planned(found) == planned(file)
    with pytest.raises(UserError, match=r"^deep/sv: no such sweep; nearest: deep/sw$"):
        find_sweep("deep/sv")
    other = written(tmp_path, name="new")
    with pytest.raises(UserError, match="has not been started"):
        find_sweep(other)
    # a folder that was moved is where it is now
    os.rename("runs", "old")
    assert sweep_folder(find_sweep("old/deep/sw")) == tmp_path / "old" / "deep" / "sw"
    with pytest.raises(UserError, match="runs/ has none; name its file or its folder"):
        find_sweep("deep/sw")


# --- stopping --------------------------------------------------------------------------------------


def test_what_cannot_be_stopped_is_one_line(tmp_path: Path) -> None:
    file = started(tmp_path)
    first, second, *_ = trials(file)
    with pytest.raises(UserError, match=r"^--stop sw: it does not run; "):
        ask_to_stop(file, None)
    end(file, first, {})
    with RunFolder(sweep_folder(file)).lock():
        with pytest.raises(UserError, match=rf"--trial {first.id}: has ended \(finished\)"):
            ask_to_stop(file, first.id)
        with pytest.raises(UserError, match=rf"--trial {second.id[:-1]}: no trial of sw; nearest: {second.id}"):
            ask_to_stop(file, second.id[:-1])
        assert ask_to_stop(file, second.id[-6:]).startswith(f"{second.id} stops with a checkpoint")
        assert stop_request(file, second.id).exists() and not stop_request(file).exists()
        assert "go on with --resume" in ask_to_stop(file, None)
        assert stop_request(file).exists()
    forget_requests(file)
    assert not stop_request(file).parent.exists()


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `launch.py sweep ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["launch.py", "sweep", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def test_the_command_line_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path)
    assert command(monkeypatch, "--status", "--trial", "x", file) == 2
    said = capsys.readouterr().err
    assert "--trial goes with --stop" in said and said.count("\n") == 1
    assert command(monkeypatch, "--stop", file) == 2
    said = capsys.readouterr().err
    assert "has not been started" in said and said.count("\n") == 1
    started(tmp_path)
    assert command(monkeypatch, "--status", file) == 0
    assert "sw: 4 trials: 4 not started" in capsys.readouterr().out


def test_a_look_needs_no_heavy_library() -> None:
    """It is asked again and again."""
    code = "import sys, rairl_ray.sweep.status\nassert not {'torch', 'ray', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_watched_run_saves_and_leaves_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets one SIGTERM and all the time that it needs; nothing counts as a failure."""
    folder, request, reports = tmp_path / "run", tmp_path / "stop", list[dict[str, float]]()
    folder.mkdir()
    code = (
        "import os, signal, sys, time\nfrom pathlib import Path\n"
        f"run = Path({str(folder)!r})\n"
        "def leave(*_):\n    time.sleep(0.5)\n    (run / 'saved').touch()\n    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, leave)\n(run / 'on').touch()\ntime.sleep(60)\n"
    )
    monkeypatch.setattr(supervise, "_command", lambda spec, folder: [sys.executable, "-c", code])
    monkeypatch.setattr(supervise.tune, "report", reports.append)
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)
    spec: dict[str, Any] = {
        "folder": str(folder),
        "log": str(tmp_path / "log"),
        "metrics": ["m"],
        "cwd": str(ROOT),
    }
    spec |= {"failures": 2, "stops": [str(request)]}

    def ask() -> None:
        while not (folder / "on").exists():
            time.sleep(0.05)
        request.touch()

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    supervise.run_trial(spec)
    asking.join()
    assert (folder / "saved").exists() and [report["step"] for report in reports] == [supervise.ENDED]
    # one that is to start only now does not
    (folder / "saved").unlink()
    supervise.run_trial(spec)
    assert not (folder / "saved").exists() and len(reports) == 2


@pytest.mark.parametrize("by_file", [False, True])
def test_the_first_signal_asks_and_the_second_ends(by_file: bool, tmp_path: Path) -> None:
    file = started(tmp_path)
    output = io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    with listening(file, Display("sw", 0, console=Console(file=output))):
        if by_file:
            stop_request(file).parent.mkdir()
            stop_request(file).touch()
        else:
            os.kill(os.getpid(), signal.SIGINT)
        deadline = time.monotonic() + 60
        while "stopping" not in output.getvalue():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert stop_request(file).exists()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_sweep_ends_when_its_last_trial_has_left(tmp_path: Path) -> None:
    file = started(tmp_path)
    item, output = trials(file)[0], io.StringIO()
    progress = run.Progress(file, 4, Display("sw", 4, console=Console(file=output, width=300)))
    halt = run.Halt(file, progress)
    progress.on_trial_start(0, [], of_tune(file, item))
    stop_request(file).parent.mkdir()
    stop_request(file).touch()
    assert not halt.stop_all()
    progress.on_trial_complete(0, [], of_tune(file, item))
    assert halt.stop_all() and "stopped; --resume goes on with it" in output.getvalue()
    forget_requests(file)
    assert not halt.stop_all()
