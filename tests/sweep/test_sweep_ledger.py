"""A sweep's parent run in MLflow: its children, its end, a resume, a kill, and a server that is not there."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.display import Display
from rairl_ray.errors import RunFailure
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.ledger import PARENT, Ledger, below
from rairl_ray.sweep.points import Trial, sweep_folder, trial_folder, trials
from rairl_ray.sweep.result import conclude
from rairl_ray.tracking.tracker import Tracker
from tests.mlflow_server import free_port
from tests.runs import ROOT
from tests.sweeps import DEMO, end, written
from tests.tracked import empty_database, eventually, runs, sqlite


@pytest.fixture
def file(tmp_path: Path) -> SweepFile:
    (tmp_path / "runs" / "sw").mkdir(parents=True)
    (tmp_path / "runs" / "mlflow.db").write_bytes(empty_database())
    return load_sweep(written(tmp_path, seeds=[3]))


def ledger(file: SweepFile, output: io.StringIO | None = None) -> Ledger:
    display = Display("sw", 2, console=Console(file=output or io.StringIO(), width=300))
    return Ledger(file, trials(file)[0].config, display)


def train(file: SweepFile, item: Trial, parent: str | None, value: float) -> str:
    """The trial's run as its own process tracks it; the run's id."""
    config = load_config(item.base, [*item.overrides, below(file, item, parent)])
    folder = RunFolder(trial_folder(file, item.id))
    folder.create()
    folder.write_config(dump_yaml(config))
    tracker = Tracker(warn=pytest.fail)
    tracker.start(config, folder.root)
    tracker.log({"eval/pass_at_1": value}, 1)
    tracker.finish("FINISHED")
    assert tracker.run_id is not None
    return tracker.run_id


def test_trials_are_children_and_a_resume_goes_on_with_the_same_runs(file: SweepFile, tmp_path: Path) -> None:
    first, second = planned = trials(file)
    display = Display("sw", 2, console=Console(file=io.StringIO()))
    made = ledger(file)
    with made.open():
        children = [train(file, first, made.parent(), 0.25)]
        end(file, first, {"eval/pass_at_1": 0.25})
        assert conclude(file, planned, display) == 1
    client = sqlite(tmp_path / "runs")
    (parent,) = set(runs(client)) - set(children)
    assert client.get_run(parent).info.status == "FAILED"
    assert client.get_run(parent).info.run_name == "sw"

    made = ledger(file)
    with made.open():
        assert eventually(lambda: client.get_run(parent).info.status == "RUNNING")
        children.append(train(file, second, made.parent(), 0.75))
        end(file, second, {"eval/pass_at_1": 0.75})
        assert conclude(file, planned, display) == 0
        made.status = "FINISHED"
    assert runs(client) == dict.fromkeys([parent, *children], "FINISHED")
    for item, child in zip(planned, children, strict=True):
        tags = client.get_run(child).data.tags
        assert tags[PARENT] == parent and tags["rairl.trial"] == item.id and tags["rairl.sweep"] == "sw"
        assert tags["rairl.density"] == item.config.reward.density.type
        assert (tags["rairl.task"], tags["rairl.seed"]) == (item.config.data.task, "3")
        assert tags["rairl.backbone"].startswith("built: ")
    run = client.get_run(parent).data
    assert run.metrics["eval/pass_at_1"] == 0.75
    assert (run.metrics["trials/finished"], run.metrics["trials/not started"]) == (2, 0)
    assert run.params["metric"] == "eval/pass_at_1"
    there = {item.path for item in client.list_artifacts(parent)}
    assert there == {"sweep.yaml", "table.csv", "best.yaml", "summary.json"}
    best = Path(client.download_artifacts(parent, "best.yaml")).read_text()
    assert best == (sweep_folder(file) / "best.yaml").read_text()
    assert "tags: {}" in best, "a run of the best configuration would be taken for a trial"


@pytest.mark.parametrize(
    ("error", "status"), [(RunFailure("no trial finished"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_sweep_that_ends_early_is_not_left_running(
    error: BaseException, status: str, file: SweepFile, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), ledger(file).open():
        raise error
    assert list(runs(sqlite(tmp_path / "runs")).values()) == [status]


def test_the_run_of_a_killed_sweep_is_closed_by_the_next_run(file: SweepFile, tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from tests.sweep.test_sweep_ledger import ledger, load_sweep\n"
        "file = load_sweep(sys.argv[1])\nmade = ledger(file)\n"
        "with made.open():\n    made.parent()\n    os._exit(9)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sweep.yaml")], cwd=ROOT, check=False)
    client = sqlite(tmp_path / "runs")
    assert killed.returncode == 9 and list(runs(client).values()) == ["RUNNING"]
    other = load_config(DEMO, ["warm_start=null", f"output_dir={file.output_dir}", "name=other"])
    folder = RunFolder(Path(file.output_dir) / "other")
    folder.create()
    folder.write_config(dump_yaml(other))
    tracker = Tracker(warn=pytest.fail)
    tracker.start(other, folder.root)
    assert eventually(lambda: "KILLED" in runs(client).values())
    tracker.finish("FINISHED")
    assert sorted(runs(client).values()) == ["FINISHED", "KILLED"]


def test_a_dead_server_costs_warnings_and_no_tracking_nothing(tmp_path: Path) -> None:
    tracking = {"tracking.uri": f"http://127.0.0.1:{free_port()}", "tracking.flush_seconds": 1}
    file = load_sweep(written(tmp_path, overrides={"warm_start": None, **tracking}))
    sweep_folder(file).mkdir(parents=True)
    output = io.StringIO()
    made = ledger(file, output)
    with made.open():
        assert made.parent() is None
    assert output.getvalue().count("MLflow gave the sweep no run in 1 s") == 1
    assert "MLflow has not received everything" in output.getvalue()
    assert PARENT not in below(file, trials(file)[0], None)
    file = load_sweep(written(tmp_path, overrides={"warm_start": None, "tracking.uri": "none"}, name="off"))
    sweep_folder(file).mkdir(parents=True)
    output = io.StringIO()
    made = ledger(file, output)
    with made.open():
        assert made.parent() is None
    assert output.getvalue() == ""
    # a folder that cannot be made is no reason to end either
    file = load_sweep(
        written(tmp_path, name="full", overrides={"warm_start": None, "tracking.flush_seconds": 0})
    )
    sweep_folder(file).mkdir(parents=True)
    (sweep_folder(file) / "ledger").write_text("")
    output = io.StringIO()
    with ledger(file, output).open():
        pass
    assert "tracking of the sweep is off: " in output.getvalue()
