"""A sweep in a bucket: its folder and its trials' states on any machine, and one that is killed and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rairl_ray import metrics as names
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.config.load import dump_yaml, load_config, read_saved
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, ResumeError, UserError
from rairl_ray.mirror import Mirror
from rairl_ray.runfolder import RunFolder, write_summary
from rairl_ray.storage import STAGING_ENV, Store, staging_folder
from rairl_ray.sweep import remote, run, supervise
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import Trial, started_with, sweep_folder, trial_folder, trial_log, trials
from rairl_ray.sweep.remote import bring_trials, mirrored_sweep
from rairl_ray.sweep.result import FINISHED, NOT_STARTED, UNFINISHED, trial_state
from rairl_ray.sweep.status import find_sweep, look, show_status
from rairl_ray.sweep.stopping import stop_request
from rairl_ray.trainer.outputs import staged
from tests.mlflow_server import free_port
from tests.remote_runs import SECRET
from tests.runs import ROOT, TINY_AIRL, launch, launch_background
from tests.sweeps import SFT, end, table, written
from tests.trainer.test_checkpoint import save

WITHOUT_MLFLOW = {"warm_start": None, "tracking.uri": "none"}


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Be a machine whose staging folder is this one."""
    monkeypatch.setenv(STAGING_ENV, str(folder))


def made(file: SweepFile, item: Trial, value: float | None) -> None:
    """A trial's run as its own process leaves it, here and over there; None: killed after a checkpoint."""
    folder = RunFolder(trial_folder(file, item.id))
    folder.create()
    folder.write_config(dump_yaml(staged(load_config(item.base, started_with(file, item)))))
    folder.append_metrics(2, {names.POLICY_LOSS: 1.0, "eval/pass_at_1": 0.25})
    save(CheckpointStore(folder.root, keep=2), 2)
    if value is not None:
        folder.final_policy.mkdir(parents=True)
        (folder.final_policy / "model.safetensors").write_text("weights")
        (folder.final_policy / "config.json").write_text("{}")
        folder.final_reward_model.mkdir()
        (folder.final_reward_model / "reward.json").write_text("{}")
        write_summary(folder.evaluation("final") / "summary.json", {"eval/pass_at_1": {"value": value}})
    mirror = Mirror(Store(file.output_dir), staging_folder(file.output_dir), [config_name(file, item)], print)
    mirror.look()
    mirror.sync()


def config_name(file: SweepFile, item: Trial) -> str:
    return f"{file.name}/trials/{item.id}"


def killed_sweep(text: str, finished: int, unfinished: int = 0) -> tuple[SweepFile, list[Trial]]:
    """A sweep that was killed, with so many trials; its folder is over there."""
    file = load_sweep(text)
    planned = trials(file)
    with mirrored_sweep(file, False, lambda _text: None):
        folder = sweep_folder(file)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / run.SAVED).write_text(file.model_dump_json(indent=1) + "\n")
        stop_request(file).parent.mkdir()
        stop_request(file).touch()
        for number, item in enumerate(planned[: finished + unfinished]):
            made(file, item, None if number >= finished else number / 10)
            trial_log(file, item.id).parent.mkdir(exist_ok=True)
            trial_log(file, item.id).write_text(f"said by {number}\n")
    return file, planned


def spec_of(file: SweepFile, item: Trial) -> dict[str, Any]:
    return {
        "folder": str(trial_folder(file, item.id)), "log": str(trial_log(file, item.id)), "fork": None,
        "base": item.base, "overrides": [*started_with(file, item)],
        "stops": [str(stop_request(file)), str(stop_request(file, item.id))], **remote.spec_for(file),
    }  # fmt: skip


def test_another_machine_finds_the_sweep_and_how_its_trials_stand(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW)
    _, planned = killed_sweep(text, 2, 1)
    store = Store(uri)
    there = {name for name in store.names("sw") if not name.startswith("trials/")}
    logs = {f"logs/{item.id}.log" for item in planned[:3]}
    assert there == {".mirror", "sweep.json", "stop_requests/sweep", *logs}

    machine(monkeypatch, tmp_path / "reader")
    for asked in (("sw", [f"output_dir={uri}"]), (f"{uri}/sw", []), (text, [])):
        found = find_sweep(*asked)
        assert [seen.state for seen in look(found)] == ["finished", "finished", "stopped", "not started"]
        assert [seen.value for seen in look(found)][:3] == [0.0, 0.1, 0.25]
    show_status(found, Display("sw", 0))
    assert "2 finished" in capsys.readouterr().out
    weights = list((staging_folder(uri) / "sw").rglob("*.safetensors"))
    assert weights == [] and not list((staging_folder(uri) / "sw").rglob("step-000002"))
    with pytest.raises(UserError, match="no such sweep"):
        find_sweep("none", [f"output_dir={uri}"])

    machine(monkeypatch, tmp_path / "second")
    file = load_sweep(text)
    with mirrored_sweep(file, True, lambda _text: None):
        states = [trial_state(file, item) for item in planned]
        assert states == [FINISHED, FINISHED, UNFINISHED, NOT_STARTED]
        assert not store.names("sw/stop_requests"), "it was answered"
        for item in planned:
            run._refuse_other_run(file, item)


def test_a_resume_elsewhere_repeats_no_finished_trial_and_leaves_its_results_over_there(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bases may lie in another checkout; what is in them counts."""
    monkeypatch.setattr(run, "cluster", lambda _config: pytest.fail("something is to be run"))
    text = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW)
    _, planned = killed_sweep(text, 4)
    with pytest.raises(ConfigError, match="is a sweep already; add --resume"):
        run.sweep(load_sweep(text))
    machine(monkeypatch, tmp_path / "second")
    with pytest.raises(ConfigError, match="is a sweep already; add --resume"):
        run.sweep(load_sweep(text))
    shutil.copytree(ROOT / "experiments" / "demo", tmp_path / "elsewhere" / "demo")
    text = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW, base="elsewhere/demo/airl.yaml")
    assert run.sweep(load_sweep(text), resume=True) == 0
    rows = table(staging_folder(uri) / "sw")
    assert [row["state"] for row in rows] == ["finished"] * 4
    store = Store(uri)
    assert json.loads(store.read("sw/summary.json") or b"")["best"]["trial"] == planned[3].id
    best = yaml.safe_load(store.read("sw/best.yaml") or b"")
    assert best["output_dir"] == uri and best["name"] == "sw-best" and store.read("sw/table.csv") is not None
    with pytest.raises(ResumeError, match="contradicts the sweep in space"):
        other = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW, space={"trainer.steps": [1]})
        run.sweep(load_sweep(other), resume=True)


def test_a_trial_goes_on_on_a_node_that_has_nothing_of_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(tmp_path, output_dir=uri, overrides={**WITHOUT_MLFLOW, "warm_start": str(SFT)})
    file, (finished, unfinished, fresh, _) = killed_sweep(text, 1, 1)
    specs = [spec_of(file, item) for item in (finished, unfinished, fresh)]
    monkeypatch.setattr(supervise.ray, "get_runtime_context", lambda: type("Here", (), {"gcs_address": "x:1"}))

    machine(monkeypatch, tmp_path / "node")
    one, two, three = (remote.on_this_node(spec) for spec in specs)
    above = staging_folder(uri) / "sw"
    assert above.is_relative_to(tmp_path / "node")
    assert supervise.finished(RunFolder(one["folder"]))
    assert two["folder"] == str(above / "trials" / unfinished.id) and two["log"].startswith(f"{above}/logs/")
    words = supervise._command(two, RunFolder(two["folder"]))
    assert words[-2:] == ["--resume", two["folder"]] and f'output_dir="{uri}"' in words
    assert "--resume" not in supervise._command(three, RunFolder(three["folder"]))
    # The shared warm start is named by its place over there: each node fetches it.
    start = next(word for word in words if word.startswith("model.policy.path="))
    assert start.startswith(f'model.policy.path="{uri}/sw/warm_starts/sft-')
    saved = read_saved(RunFolder(two["folder"]).config)
    assert str(saved.model.policy.path).startswith(f"{above}/warm_starts/sft-")


def test_the_sweeps_process_and_a_trial_on_another_node_hear_of_each_other(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.0)
    text = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW)
    file, (item, *_) = killed_sweep(text, 0)
    spec = spec_of(file, item)
    machine(monkeypatch, tmp_path / "node")
    there = remote.on_this_node(spec)
    assert supervise._asked(there)
    Store(uri).delete("sw/stop_requests/sweep")
    remote._looked.clear()
    assert not supervise._asked(there)
    made(file, item, 0.5)
    Path(there["log"]).parent.mkdir(parents=True)
    Path(there["log"]).write_text("said on a node\n")
    remote.send_log(there)

    machine(monkeypatch, tmp_path / "staging")
    assert trial_state(file, item) == NOT_STARTED
    bring_trials(file, [item.id], print)
    assert trial_state(file, item) == FINISHED and trial_log(file, item.id).read_text() == "said on a node\n"
    bring_trials(file, [item.id], lambda _text: pytest.fail("it was asked again"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    notes: list[str] = []
    bring_trials(file, ["another"], notes.append)
    assert notes[0].startswith("how another ended could not be fetched")


@pytest.mark.parametrize(("place", "processes"), [("bucket", 2), ("folder", 1)])
def test_a_trial_that_did_not_arrive_whole_is_resumed_to_upload_the_rest(
    place: str, processes: int, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"output_dir": uri} if place == "bucket" else {}
    file = load_sweep(written(tmp_path, overrides=WITHOUT_MLFLOW, **changes))
    item, codes, reports = trials(file)[0], iter([1, 0]), list[dict[str, float]]()
    sweep_folder(file).mkdir(parents=True)  # as the sweep's process has made it

    def ended(_spec: dict[str, Any], _folder: RunFolder) -> int:
        if not trial_folder(file, item.id).exists():
            end(file, item, {"eval/pass_at_1": 0.5})
        return next(codes)

    monkeypatch.setattr(supervise, "_run", ended)
    monkeypatch.setattr(supervise.tune, "report", reports.append)
    supervise.run_trial({**spec_of(file, item), "metrics": ["eval/pass_at_1"], "failures": 1})
    assert reports == [{"eval/pass_at_1": 0.5, "step": supervise.ENDED}]
    assert len(list(codes)) == 2 - processes


def test_what_did_not_arrive_of_a_finished_trial_goes_up_with_the_resume(uri: str, tmp_path: Path) -> None:
    text = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW)
    file, (one, two, *_) = killed_sweep(text, 2)
    store, lost = Store(uri), f"sw/trials/{one.id}/final/policy/config.json"
    store.delete(lost)
    with mirrored_sweep(file, True, lambda _text: None):
        assert store.read(lost) == b"{}"
        store.delete(lost)
        store.delete(f"sw/trials/{two.id}/final/policy/config.json")
        store.write(f"sw/trials/{two.id}/.mirror", b"of another machine")
    assert store.read(lost) == b"{}"
    assert store.read(f"sw/trials/{two.id}/final/policy/config.json") is None
    assert not store.names(f"sw/trials/{two.id}~1")


def test_a_sweep_that_was_taken_over_stops(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(tmp_path, output_dir=uri, overrides=WITHOUT_MLFLOW)
    file, _ = killed_sweep(text, 0)
    stop_request(file).unlink()
    with (
        pytest.raises(Exception, match="another process writes there now"),
        mirrored_sweep(file, True, lambda _text: None),
    ):
        first = sweep_folder(file)
        (first / "mine").touch()
        machine(monkeypatch, tmp_path / "second")
        with mirrored_sweep(file, True, lambda _text: None):
            (sweep_folder(file) / "theirs").touch()
        machine(monkeypatch, tmp_path / "staging")
        deadline = time.monotonic() + 60
        while not stop_request(file).exists():
            (first / "mine").touch()
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_population_needs_a_folder(uri: str, tmp_path: Path) -> None:
    scheduler = {"type": "pbt"}
    overrides = {**WITHOUT_MLFLOW, "eval.every": 1, "trainer.checkpoint_every": 1}
    space = {"policy.learning_rate": [1e-4, 1e-3]}
    text = written(tmp_path, output_dir=uri, scheduler=scheduler, overrides=overrides, space=space, seeds=[0])
    with pytest.raises(ConfigError, match=r"output_dir=s3://.*scheduler.type=pbt .* give a folder"):
        load_sweep(text)


@pytest.mark.slow
@pytest.mark.cluster
def test_a_sweep_killed_on_one_machine_ends_on_another(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides: dict[str, Any] = {"warm_start": None, "tracking.uri": "none", "trainer.steps": 4}
    overrides |= dict(
        yaml.safe_load(word.replace("=", ": ", 1)).popitem() for word in TINY_AIRL if "steps=2" not in word
    )
    text = written(tmp_path, output_dir=uri, overrides=overrides, seeds=[0], max_concurrent=1)
    process = launch_background("sweep", text)
    store, file = Store(uri), load_sweep(text)
    one, two = (item.id for item in trials(file))
    deadline = time.monotonic() + 500
    while not [name for name in store.names(f"sw/trials/{two}") if name.endswith("manifest.json")]:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = store.names(f"sw/trials/{one}")

    machine(monkeypatch, tmp_path / "another")
    done = launch("sweep", text, "--resume")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = staging_folder(uri) / "sw"
    assert [row["state"] for row in table(folder)] == ["finished", "finished"]
    assert store.names(f"sw/trials/{one}") == before, "a finished trial was repeated"
    steps = [
        row["step"] for row in RunFolder(folder / "trials" / two).read_metrics() if names.POLICY_LOSS in row
    ]
    assert steps == [1, 2, 3, 4]
    log = (folder / "logs" / f"{two}.log").read_text()
    assert store.read("sw/best.yaml") is not None and store.read(f"sw/logs/{two}.log") is not None
    assert not store.names(f"sw/trials/{two}~1"), f"it was begun anew: {log}"
    assert SECRET not in done.stdout + done.stderr + log
