"""Which trials a scheduler stops, and when the GPU hours of a sweep are spent; nothing is run."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.actors.placement import PlacementPlan
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep import budget, supervise
from rairl_ray.sweep.budget import GpuMeter
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import Trial, sweep_folder, trial_folder, trials
from rairl_ray.sweep.result import trial_state
from rairl_ray.sweep.run import Halt, Progress
from rairl_ray.sweep.schedulers import scheduler_of
from rairl_ray.sweep.supervise import ENDED, REPORT
from tests.runs import ROOT
from tests.sweeps import of_tune, written

METRIC = "eval/pass_at_1"


class Compared:
    """A sweep under its scheduler, which hears reports without Tune."""

    def __init__(self, folder: Path, seeds: int = 3, **settings: Any) -> None:
        overrides = {"warm_start": None, "eval.every": 1}
        text = written(folder, scheduler=settings, overrides=overrides, seeds=list(range(seeds)))
        self.file = load_sweep(text)
        self.planned = trials(self.file)
        self.scheduler = scheduler_of(self.file)
        self.scheduler.set_search_properties(METRIC, self.file.modes[0])
        self.known = {item.id: of_tune(self.file, item) for item in self.planned}
        for trial in self.known.values():
            self.scheduler.on_trial_add(None, trial)

    def report(self, item: Trial, number: int, value: float) -> str:
        result = {REPORT: number, METRIC: value, "step": 10 * number, "training_iteration": 1}
        return str(self.scheduler.on_trial_result(None, self.known[item.id], result))

    def end(self, item: Trial, value: float) -> str:
        result = {METRIC: value, "step": ENDED, "training_iteration": 1}
        action = str(self.scheduler.on_trial_result(None, self.known[item.id], result))
        self.scheduler.on_trial_complete(None, self.known[item.id], result)
        return action

    @property
    def stopped(self) -> list[Trial]:
        return [item for item in self.planned if trial_state(self.file, item) == "stopped early"]


def test_asha_marks_what_it_stops_and_compares_up_to_longest(tmp_path: Path) -> None:
    run = Compared(tmp_path, type="asha", grace=1, reduction=2, longest=2)
    good, bad, late, ends, *_ = run.planned
    said = [run.report(item, 1, value) for item, value in ((good, 0.9), (bad, 0.1), (late, 0.95))]
    assert said == ["CONTINUE", "STOP", "CONTINUE"]
    assert [run.report(good, number, 0.0) for number in (2, 3, 9)] == ["CONTINUE"] * 3
    assert run.end(ends, 0.0) == "CONTINUE", "the final evaluation compares nothing"
    assert run.stopped == [bad]


def test_a_bracket_of_hyperband_begins_later_and_is_the_same_after_a_resume(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    settings: dict[str, Any] = {"type": "hyperband", "grace": 1, "reduction": 2, "longest": 8, "brackets": 3}
    run, again = Compared(tmp_path, seeds=20, **settings), Compared(tmp_path / "again", seeds=20, **settings)

    def first_rung(compared: Compared, item: Trial) -> int:
        return int(compared.scheduler._trial_info[item.id]._rungs[-1][0])

    rungs = {item.id: first_rung(run, item) for item in run.planned}
    assert rungs == {item.id: first_rung(again, item) for item in again.planned}
    assert set(rungs.values()) == {1, 2, 4}, "one bracket compares from report 1, one from 2, one from 4 on"
    for value, item in enumerate(reversed(run.planned)):
        run.report(item, 1, -value)
    assert run.stopped and {rungs[item.id] for item in run.stopped} == {1}
    early = [item for item in run.planned if rungs[item.id] == 2]
    for value, item in enumerate(reversed(early)):
        run.report(item, 2, -value)
    assert {rungs[item.id] for item in run.stopped} == {1, 2}


def test_median_stops_whose_best_is_below_the_median_of_means(tmp_path: Path) -> None:
    run = Compared(tmp_path, seeds=2, type="median", grace=2, min_samples=3)
    *others, last = run.planned
    for item, values in zip(others, [(0.2, 0.4), (0.4, 0.6), (0.6, 0.8)], strict=True):
        assert [run.report(item, number, value) for number, value in enumerate(values, 1)] == ["CONTINUE"] * 2
    # means from report 2 on: 0.4, 0.6, 0.8
    assert run.report(last, 1, 0.1) == "CONTINUE", "before the grace"
    assert run.report(last, 2, math.nan) == "CONTINUE", "an evaluation without the metric decides nothing"
    assert run.report(last, 3, 0.59) == "CONTINUE", "nobody else has come as far"
    for item in others:
        for number in (3, 4):
            run.report(item, number, 0.6)
        run.end(item, 0.0)
    assert run.report(last, 3, 0.59) == "CONTINUE", "made again after a failure: decided already"
    assert run.report(last, 4, 0.59) == "STOP" and run.stopped == [last]


@given(data=st.data())
@settings(max_examples=12, deadline=None)
@pytest.mark.parametrize(
    "kind",
    [
        {"type": "asha", "grace": 1, "reduction": 2, "longest": 4},
        {"type": "hyperband", "grace": 1, "reduction": 2, "longest": 8, "brackets": 3},
        {"type": "median", "grace": 1, "min_samples": 2},
    ],
    ids=lambda kind: kind["type"],
)
def test_a_resume_decides_as_the_uninterrupted_sweep(kind: dict[str, Any], data: st.DataObject) -> None:
    """Reports of trials that run side by side, a kill at some moment, and rows that are made again after it."""
    with TemporaryDirectory() as name:
        place = Path(name)
        calm, killed = (Compared(made(place / which), seeds=4, **kind) for which in ("calm", "killed"))
        values = st.floats(0, 1, width=16)
        order = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=40), "whose report")
        moment, lost = data.draw(st.integers(0, len(order)), "kill"), data.draw(st.integers(0, 2), "rows lost")
        heard: dict[str, list[float]] = {item.id: [] for item in calm.planned}
        stopped: set[str] = set()
        for turn, which in enumerate(order):
            if turn == moment:
                killed = Compared(place / "killed", seeds=4, **kind)
                for item in killed.planned:  # from the checkpoint on, the same reports again
                    first = max(0, len(heard[item.id]) - lost)
                    for number, value in enumerate(heard[item.id][first:], first + 1):
                        assert item.id in stopped or killed.report(item, number, value) == "CONTINUE"
            item = calm.planned[which]
            if item.id in stopped:
                continue
            heard[item.id].append(data.draw(values, "value"))
            number, value = len(heard[item.id]), heard[item.id][-1]
            action = calm.report(item, number, value)
            row = RunFolder(trial_folder(killed.file, item.id))
            row.create()
            row.append_metrics(number, {METRIC: value})
            assert killed.report(item, number, value) == action
            stopped |= {item.id} if action == "STOP" else set()
        assert [item.id for item in calm.stopped] == [item.id for item in killed.stopped]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_reports_are_counted_over_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "t")
    folder.create()
    for step in range(1, 6):
        folder.append_metrics(step, {"m": step / 10} if step % 2 else {"other": 0.0})
    # the resumed run goes back to step 2 and makes the rows after it again
    code = (
        "import sys, time; from rairl_ray.runfolder import RunFolder; f = RunFolder(sys.argv[1]);"
        "f.truncate_to_step(2); time.sleep(1); [f.append_metrics(s, {'m': s}) for s in (3, 4, 5)]"
    )
    monkeypatch.setattr(supervise, "_command", lambda *_: [sys.executable, "-c", code, str(folder.root)])
    monkeypatch.setattr(supervise, "POLL_SECONDS", 0.05)
    heard: list[dict[str, float]] = []
    monkeypatch.setattr(supervise.tune, "report", heard.append)
    spec = {
        "folder": str(folder.root),
        "log": str(tmp_path / "log"),
        "metrics": ["m"],
        "cwd": str(ROOT),
        "stops": [],
        "failures": 0,
    }
    supervise.run_trial(spec)
    *reports, last = heard
    assert [(row["step"], row[REPORT]) for row in reports] == [(3, 2), (4, 3), (5, 4)]
    assert last["step"] == ENDED and REPORT not in last


# --- the budget ------------------------------------------------------------------------------------


def budgeted(folder: Path, hours: float) -> SweepFile:
    file = load_sweep(written(folder, budget={"gpu_hours": hours}))
    sweep_folder(file).mkdir(parents=True, exist_ok=True)
    return file


def test_gpu_hours_count_running_trials_over_all_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(budget.time, "monotonic", lambda: now)
    file = budgeted(tmp_path, 4.0)
    one, two, *_ = (of_tune(file, item) for item in trials(file))
    progress = Progress(file, 4, Display("sw", 4))
    halt = Halt(file, progress)
    progress.on_trial_start(0, [], one)
    now += 3600
    progress.on_trial_start(0, [], two)
    now += 3600
    assert progress.meter.hours() == pytest.approx(0.5 + 1.0) and not halt.stop_all()
    progress.on_trial_complete(0, [], one)
    # killed: the next process knows what had been spent when the last trial ended
    again = Progress(file, 4, Display("sw", 4))
    now += 3600
    assert again.meter.hours() == pytest.approx(1.5)
    again.on_trial_start(0, [], two)
    now += 5 * 3600
    assert Halt(file, again).stop_all(), "0.5 GPUs for 5 hours"
    plan = PlacementPlan(bundles=({"GPU": 1.0},), strategy="PACK", roles={}, device="gpu")
    with pytest.raises(
        ConfigError, match=r"budget\.gpu_hours=4: the sweep has held GPUs for 4\.00 hours already"
    ):
        GpuMeter(file).check(plan)
    GpuMeter(budgeted(tmp_path, 9.0)).check(plan)


def test_gpu_hours_without_a_gpu_are_refused(tmp_path: Path) -> None:
    plan = PlacementPlan(bundles=({"CPU": 1.0},), strategy="PACK", roles={}, device="cpu")
    with pytest.raises(ConfigError, match=r"^budget\.gpu_hours=4: the trials' placement has no GPU; use"):
        GpuMeter(budgeted(tmp_path, 4.0)).check(plan)
    GpuMeter(load_sweep(written(tmp_path))).check(plan)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"type": "hyperband", "grace": 3, "longest": 20},
         r"grace=3: it, and grace \* reduction\^2 reports, where bracket 2 begins, must be at most longest=20"),
        ({"type": "hyperband", "brackets": 1}, r"scheduler\.brackets: must be greater than or equal to 2"),
        ({"type": "asha", "brackets": 2}, r"scheduler\.brackets: type=asha has the keys grace"),
        ({"type": "median", "reduction": 2}, r"scheduler\.reduction: type=median has the keys grace"),
        ({"type": "median", "min_samples": 0}, r"scheduler\.min_samples: must be greater than 0"),
        ({"grace": 2}, r"scheduler\.grace: type=none has no keys; take it out"),
        ({"type": "bohb"}, r"scheduler\.type: must be 'none', 'asha'"),
    ],
)  # fmt: skip
def test_a_bad_scheduler_is_one_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_sweep(written(tmp_path, scheduler=changes))
    assert len(str(error.value).splitlines()) == 1 and "sweep.yaml" in str(error.value)


def test_bad_gpu_hours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget\.gpu_hours: must be greater than 0"):
        load_sweep(written(tmp_path, budget={"gpu_hours": 0}))
