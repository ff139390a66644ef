"""What the folders of a sweep say, and what a sweep does with Tune; nothing is run."""

from __future__ import annotations

import io
import json
import math
import pickle
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.display import Display
from rairl_ray.errors import ResumeError, RunFailure
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep import run, supervise
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.points import stop_mark, sweep_folder, trial_folder, trial_log, trials
from rairl_ray.sweep.result import conclude, trial_state
from rairl_ray.sweep.run import Progress
from rairl_ray.sweep.stopping import forget_requests, stop_request
from rairl_ray.trainer.run_context import code_version
from tests.runs import ROOT
from tests.sweeps import DEMO, SFT, end, of_tune, table, written


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "cluster", lambda config: pytest.fail("something is to be run"))


@pytest.mark.usefixtures("nothing_starts")
def test_best_is_the_winner_in_full(tmp_path: Path) -> None:
    space = {
        "reward.density.every": [5, 9],
        "reward.clip": [None],
        "trainer.steps": {"grid": [8], "when": {"reward.density.every": 5}},
    }
    overrides = {"reward.density": "interval", "warm_start": str(SFT), "trainer.steps": 3}
    text = written(tmp_path, space=space, overrides=overrides, mode="min")
    file = load_sweep(text)
    planned = trials(file)
    for item, value in zip(planned, [math.nan, 0.4, 0.2, 0.3], strict=True):
        end(file, item, {"eval/pass_at_1": value})
    (sweep_folder(file) / run.SAVED).write_text(file.model_dump_json())
    assert run.sweep(file, resume=True) == 0
    best = load_config(sweep_folder(file) / "best.yaml")
    assert best == planned[2].config.model_copy(update={"name": "sw-best"})
    assert best.warm_start == str(SFT) and best.reward.clip is None
    assert best.reward.density.every == 9 and best.trainer.steps == 3
    summary = json.loads((sweep_folder(file) / "summary.json").read_text())
    assert summary["best"]["trial"] == planned[2].id and summary["states"] == {"finished": 4}
    assert len(table(sweep_folder(file))) == 4


@pytest.mark.usefixtures("nothing_starts")
def test_a_resume_refuses_a_base_that_has_changed(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text(f"base: {DEMO}\ntrainer: {{steps: 5}}\n")
    file = load_sweep(written(tmp_path, base=str(base), overrides={"warm_start": str(SFT)}))
    for item in trials(file):
        end(file, item, {"eval/pass_at_1": 0.5})
    (sweep_folder(file) / run.SAVED).write_text(file.model_dump_json())
    assert run.sweep(file, resume=True) == 0
    base.write_text(f"base: {DEMO}\ntrainer: {{steps: 6, checkpoint_every: 2}}\n")
    with pytest.raises(ResumeError, match=r"in trainer\.steps \(run: 5, now: 6\);"):
        run.sweep(file, resume=True)
    base.write_text(f"base: {DEMO}\ntrainer: {{steps: 5, checkpoint_every: 2}}\n")
    assert run.sweep(file, resume=True) == 0


@pytest.mark.usefixtures("nothing_starts")
def test_one_process_works_on_a_sweep(tmp_path: Path) -> None:
    file = load_sweep(written(tmp_path))
    with pytest.raises(ResumeError, match="is no sweep; leave --resume out"):
        run.sweep(file, resume=True)
    assert not sweep_folder(file).exists()
    sweep_folder(file).mkdir(parents=True)
    with RunFolder(sweep_folder(file)).lock(), pytest.raises(ResumeError, match="is writing to"):
        run.sweep(file)


def test_states_and_the_exit_code(tmp_path: Path) -> None:
    file = load_sweep(written(tmp_path))
    planned, display = trials(file), Display("sw", 4)
    sweep_folder(file).mkdir(parents=True)
    with pytest.raises(RunFailure, match="no trial finished"):
        conclude(file, planned, display)
    end(file, planned[0], {"eval/pass_at_1": math.nan, "calibration/ece": 0.1})
    with pytest.raises(RunFailure, match=r"metric=eval/pass_at_1: .*; there are calibration/ece$"):
        conclude(file, planned, display)
    end(file, planned[1], {"eval/pass_at_1": 0.5})
    assert conclude(file, planned, display) == 1
    for item in planned[1:]:
        stop_mark(file, item.id).parent.mkdir(exist_ok=True)
        stop_mark(file, item.id).touch()
    assert conclude(file, planned, display) == 0
    states = [row["state"] for row in table(sweep_folder(file))]
    assert states == ["finished", "finished", "stopped early", "stopped early"]
    # the reward is the last thing that an airl run writes
    (RunFolder(trial_folder(file, planned[0].id)).final_reward_model / "reward.json").unlink()
    assert trial_state(file, planned[0]) == "unfinished"


# --- under Tune ------------------------------------------------------------------------------------


def test_telling_of_a_trial_never_raises(tmp_path: Path) -> None:
    file = load_sweep(written(tmp_path))
    item, output = trials(file)[0], io.StringIO()
    told = Progress(file, 4, Display("sw", 4, console=Console(file=output, width=300)))
    told.on_trial_error(0, [], of_tune(file, item))
    told.on_trial_complete(0, [], of_tune(file, item))
    trial_log(file, item.id).parent.mkdir(parents=True)
    trial_log(file, item.id).write_text("one\nDataError: row 3\n\n")
    told.on_trial_complete(0, [], of_tune(file, item))
    end(file, item, {"eval/rerank_at_1": 0.5})
    told.on_trial_complete(0, [], of_tune(file, item))
    unheard = of_tune(file, item)
    unheard.last_result = None
    told.on_trial_complete(0, [], unheard)
    pickle.loads(pickle.dumps(told)).on_trial_complete(0, [], of_tune(file, item))
    said = " ".join(output.getvalue().split())
    assert "lost; the worker that watched it died" in said
    assert "No such file" in said and "failed; DataError: row 3" in said
    assert said.count("eval/pass_at_1=nan") == 2


def test_a_metric_that_no_trial_has_stops_the_sweep_at_the_first_one(tmp_path: Path) -> None:
    file, output = load_sweep(written(tmp_path, metric="eval/passed")), io.StringIO()
    item = trials(file)[0]
    display = Display("sw", 4, console=Console(file=output, width=300))
    end(file, item, {"eval/pass_at_1": 0.5})
    Progress(file, 4, display).on_trial_complete(0, [], of_tune(file, item))
    assert not stop_request(file).exists(), "trials of other algorithms may have it"
    Progress(file, 4, display, alike=True).on_trial_complete(0, [], of_tune(file, item))
    said = "metric=eval/passed: no trial will have it, so the sweep stops; there are eval/pass_at_1"
    assert stop_request(file).exists() and output.getvalue().count(said) == 1
    forget_requests(file)
    good = file.model_copy(update={"metric": "eval/pass_at_1"})
    Progress(good, 4, display, alike=True).on_trial_complete(0, [], of_tune(file, item))
    assert not stop_request(file).exists()


def test_a_resume_under_another_version_of_the_code_is_said(tmp_path: Path) -> None:
    output, file = io.StringIO(), tmp_path / "code_version"
    display = Display("sw", 4, console=Console(file=output, width=300))
    run._tell_other_code(file, display)
    run._tell_other_code(file, display)
    assert output.getvalue() == "" and file.read_text().strip() == code_version()
    file.write_text("an earlier one\n")
    run._tell_other_code(file, display)
    assert f"the sweep was started by code an earlier one, this is {code_version()}" in output.getvalue()
    assert file.read_text() == "an earlier one\n"


def test_a_run_that_fails_is_started_again_as_often_as_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, log, told = tmp_path / "trials" / "t", tmp_path / "logs" / "t.log", list[dict[str, float]]()
    code = f"import os; print(os.path.exists({str(folder)!r})); raise SystemExit(3)"
    monkeypatch.setattr(supervise, "_command", lambda spec, folder: [sys.executable, "-c", code])
    monkeypatch.setattr(supervise.tune, "report", told.append)
    spec = {
        "folder": str(folder),
        "log": str(log),
        "metrics": ["m"],
        "cwd": str(ROOT),
        "stops": [],
        "failures": 2,
    }
    supervise.run_trial(spec)
    # the log lies outside the run folder, which the run itself makes
    assert log.read_text() == "False\n" * 3 and not folder.exists()
    assert [row["step"] for row in told] == [supervise.ENDED] and math.isnan(told[0]["m"])


def test_an_interrupted_warm_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = load_sweep(written(tmp_path, overrides={"warm_start": str(SFT)}))
    item, asked = trials(file)[0], list[str | None]()
    monkeypatch.setattr(run, "train", lambda config, resume: asked.append(resume) or 0)
    run.train_warm_start(file, item, Display("sw", 4))
    earlier = run.warm_start(file, item)
    assert earlier is not None
    folder = RunFolder(Path(earlier.output_dir) / earlier.name)
    folder.create()
    folder.write_config(dump_yaml(earlier))
    run.train_warm_start(file, item, Display("sw", 4))
    assert asked == [None, str(folder.root)]
