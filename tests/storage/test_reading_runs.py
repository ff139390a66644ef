"""Verbs on a run in a bucket: what they fetch of it, where their results go, and forks of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rairl_ray import mirror as mirror_module
from rairl_ray.checkpoint import verify
from rairl_ray.config.load import dump_yaml, load_config, read_saved
from rairl_ray.errors import ConfigError, ModelError, ResumeError, RunFailure
from rairl_ray.mirror import Mirror
from rairl_ray.report.report import make_report
from rairl_ray.runfolder import RunFolder, read_summary
from rairl_ray.storage import STAGING_ENV, Store, staging_folder
from rairl_ray.sweep.status import find_sweep
from rairl_ray.trainer.fork import fork_of, take_over
from rairl_ray.trainer.outputs import at_hand, mirrored
from rairl_ray.verbs.evaluate import evaluate
from rairl_ray.verbs.localise import localise
from rairl_ray.verbs.score import score
from rairl_ray.verbs.transfer import transfer
from tests.finished import finished_run
from tests.mlflow_server import free_port
from tests.remote_runs import NAME, SECRET, Machine, contents, make_run
from tests.report_material import make_run as make_reported
from tests.runs import ROOT
from tests.s3_server import Line, refusing_all

VERBS: dict[str, Callable[[str], object]] = {
    "evaluate RUN": lambda uri: evaluate(NAME, [f"output_dir={uri}"]),
    "evaluate URI": lambda uri: evaluate(f"{uri}/{NAME}"),
    "score": lambda uri: score(NAME, ROOT / "README.md", ROOT / "none.jsonl", [f"output_dir={uri}"]),
    "localise": lambda uri: localise(NAME, overrides=[f"output_dir={uri}"]),
    "transfer": lambda uri: transfer([NAME], ["demo/b"], [f"output_dir={uri}"]),
    "report": lambda uri: make_report([f"{uri}/{NAME}"]),
    "fork": lambda uri: fork_of(f"{NAME}@2", [f"output_dir={uri}"]),
    "status": lambda uri: find_sweep("sweeps/none", [f"output_dir={uri}"]),
}


def machine(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Be a machine whose staging folder is this one."""
    monkeypatch.setenv(STAGING_ENV, str(folder))


@pytest.fixture
def run(uri: str, tmp_path: Path) -> Machine:
    """A finished run over there, made on a machine that is still up."""
    trained = Machine(uri, tmp_path / "trained")
    make_run(trained.folder, (2, 4))
    (trained.folder / "final" / "policy" / "model.safetensors").write_text("weights")
    trained.mirror.sync()
    return trained


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_a_bucket_that_is_not_there_is_one_line(verb: str, uri: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"output_dir=s3://no-such-bucket/runs.*: make the|make the bucket"
    ) as said:
        VERBS[verb]("s3://no-such-bucket/runs")
    assert str(said.value).startswith("output_dir=s3://no-such-bucket/") and "\n" not in str(said.value)
    assert not (tmp_path / "staging").exists()


def test_refused_credentials_are_one_line(uri: str, run: Machine, server: str) -> None:
    for name, overrides in ((NAME, [f"output_dir={uri}"]), (f"{uri}/{NAME}", [])):
        with refusing_all(server), pytest.raises(ConfigError, match="AWS_ACCESS_KEY_ID") as caught:
            evaluate(name, overrides)
        assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_not_over_there_is_one_line(uri: str, run: Machine) -> None:
    with pytest.raises(ModelError, match=f"{uri}/demo/none: nothing of a run is there"):
        evaluate(f"{uri}/demo/none")
    with pytest.raises(ModelError, match="demo/other/thing: neither a run folder"):
        evaluate("demo/other/thing", [f"output_dir={uri}"])
    with pytest.raises(ConfigError, match="must be a file of this machine"):
        score(NAME, ROOT / "README.md", Path(f"{uri}/out.jsonl"), [f"output_dir={uri}"])


# --- a run is fetched, its evaluation arrives --------------------------------------------------------


@pytest.mark.parametrize("named", ["name", "URI", "URI of the policy"])
def test_a_run_is_at_hand_without_its_checkpoints(named: str, uri: str, run: Machine) -> None:
    text = {"name": NAME, "URI": f"{uri}/{NAME}", "URI of the policy": f"{uri}/{NAME}/final/policy"}[named]
    staged = staging_folder(uri) / NAME
    before = run.there()
    with at_hand([text], [f"output_dir={uri}"] if named == "name" else [], print) as here:
        assert here.runs == [str(staged / "final" / "policy" if named.endswith("policy") else staged)]
        assert here.overrides == [f"output_dir={staging_folder(uri)}"]
    expected = {name for name in contents(run.folder) if not name.startswith("checkpoints/")}
    assert contents(staged).keys() == expected and run.there() == before
    assert (staged / "config.yaml").read_text() == f"output_dir: {staging_folder(uri)}\nname: {NAME}\n"


def test_an_evaluation_arrives_beside_a_run_that_another_machine_goes_on_writing(
    uri: str, run: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluated(on: str, file: str) -> Path:
        machine(monkeypatch, tmp_path / on)
        with at_hand([NAME], [f"output_dir={uri}"], lambda _text: None) as here:
            folder = Path(here.runs[0]) / "evaluations" / "generate"
            here.keep(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "settings.json").write_text("{}")
            (folder / file).write_text(file)
        return folder

    evaluated("first", "rows-1.jsonl")
    make_run(run.folder, (6,))  # It is trained on meanwhile, and prunes over there what it no longer has.
    run.mirror.sync()
    assert run.warnings == [] and "checkpoints/step-000006/manifest.json" in run.there()
    second = evaluated("second", "rows-2.jsonl")
    assert contents(second).keys() == {"settings.json", "rows-1.jsonl", "rows-2.jsonl"}  # It went on there.
    assert {f"evaluations/generate/{name}" for name in contents(second)} <= run.there().keys()
    again = evaluated("first", "rows-3.jsonl")
    assert contents(again).keys() == {"settings.json", "rows-1.jsonl", "rows-2.jsonl", "rows-3.jsonl"}
    assert (again.parents[1] / "evaluations" / "generate~1").is_dir()  # Its own older state was not lost.


def test_two_machines_at_one_evaluation_are_told(
    uri: str, run: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(folder: Path, file: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(file)

    machine(monkeypatch, tmp_path / "first")
    words = [f"output_dir={uri}"]
    with (
        pytest.raises(RunFailure, match="another process writes there now"),
        at_hand([NAME], words, lambda _text: None) as one,
    ):
        folder = Path(one.runs[0]) / "evaluations" / "x"
        one.keep(folder)
        write(folder, "first")
        while "evaluations/x/settings.json" not in run.there():
            pass
        machine(monkeypatch, tmp_path / "second")
        with at_hand([NAME], words, lambda _text: None) as two:
            theirs = Path(two.runs[0]) / "evaluations" / "x"
            two.keep(theirs)
            write(theirs, "second")
        write(folder, "late")
    assert run.store.read(f"{NAME}/evaluations/x/settings.json") == b"second"


def test_a_lost_connection_fails_the_verb_and_the_same_command_uploads_the_rest(
    uri: str, server: str, run: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "PATIENCE_SECONDS", 1.0)
    line = Line(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.uri)
    words = [f"output_dir={uri}"]
    with pytest.raises(RunFailure, match="the same command again uploads") as caught:  # noqa: SIM117
        with at_hand([NAME], words, lambda _text: None) as here:
            folder = Path(here.runs[0]) / "evaluations" / "x"
            here.keep(folder)
            line.cut()
            folder.mkdir(parents=True)
            (folder / "settings.json").write_text("{}")
    assert SECRET not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    with at_hand([NAME], words, lambda _text: None) as here:
        here.keep(folder)
    assert run.store.read(f"{NAME}/evaluations/x/settings.json") == b"{}"
    line.mend()


def test_only_what_changed_over_there_is_fetched_again(
    uri: str, run: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, fetched = [f"output_dir={uri}"], list[str]()
    download = Store.download
    monkeypatch.setattr(
        Store, "download", lambda self, name, target: (fetched.append(name), download(self, name, target))
    )
    with at_hand([NAME], words, print) as here:
        staged = Path(here.runs[0])
    assert f"{NAME}/final/policy/model.safetensors" in fetched
    kept = staged / "evaluations" / "x"
    kept.mkdir(parents=True)
    (kept / ".mirror").write_text('{"token": "t", "before": null, "goes_on": false}')
    fetched.clear()
    with at_hand([NAME], words, print):
        assert fetched == []
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 5}\n')
    run.mirror.sync()
    with at_hand([NAME], words, print):
        assert fetched == [f"{NAME}/metrics.jsonl"]
    assert contents(staged)["metrics.jsonl"] == contents(run.folder)["metrics.jsonl"]
    assert (kept / ".mirror").is_file() and not (staged.parent / "run~1").exists()


def test_a_copy_that_was_read_goes_on_from_the_newest_checkpoint(
    uri: str, run: Machine, tmp_path: Path
) -> None:
    with at_hand([NAME], [f"output_dir={uri}"], print):
        pass
    make_run(run.folder, (6,))
    run.mirror.sync()
    staging = staging_folder(uri)
    here = Machine(uri, staging)
    assert here.mirror.resume(NAME) == staging / NAME
    assert [path.name for path in (here.folder / "checkpoints").glob("step-*")] == ["step-000006"]
    make_run(here.folder, (8,))
    here.mirror.sync()
    (run.folder / "late").touch()
    run.mirror.sync()
    assert "another process writes there now" in run.warnings[0] and "late" not in run.there()


def test_the_base_of_an_adapter_is_fetched_with_it(uri: str, run: Machine, tmp_path: Path) -> None:
    base = str(tmp_path / "trained" / "demo" / "first" / "final" / "policy")
    adapter = Machine(uri, tmp_path / "trained")
    adapter.mirror = Mirror(adapter.store, tmp_path / "trained", ["demo/first", "demo/adapter"], print)
    for name in ("first", "adapter"):
        make_run(tmp_path / "trained" / "demo" / name, ())
    file = tmp_path / "trained/demo/adapter/final/policy/adapter_config.json"
    file.write_text(json.dumps({"base_model_name_or_path": base}))
    adapter.mirror.look()
    adapter.mirror.sync()
    with at_hand(["demo/adapter"], [f"output_dir={uri}"], print) as here:
        staged = Path(here.runs[0])
    said = json.loads((staged / "final" / "policy" / "adapter_config.json").read_text())
    assert (Path(said["base_model_name_or_path"]) / "config.json").is_file()
    assert Path(said["base_model_name_or_path"]).is_relative_to(staging_folder(uri))


def test_a_reward_that_a_run_starts_from_is_fetched_by_its_name(uri: str, run: Machine) -> None:
    words = ["model.discriminator.path=demo/run", f"output_dir={uri}", "name=demo/frozen"]
    config = load_config(ROOT / "experiments/demo/airl.yaml", [*words, "warm_start=null"])
    with mirrored(config, None, lambda _text: None) as (inner, _):
        assert (Path(inner.output_dir) / "demo" / "run" / "final" / "policy" / "config.json").is_file()
    assert "another" not in str(run.warnings) and not run.store.names("demo/frozen")


# --- whole verbs ------------------------------------------------------------------------------------


def test_given_completions_are_evaluated_beside_their_run_over_there(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verb itself, with a real policy's tokenizer; where all is given no actor is needed."""
    rows = tmp_path / "given.jsonl"
    row = {"question": "1 + 1 = ?", "answer": "2", "generation": "<answer>\n2\n</answer>"}
    rows.write_text("".join(json.dumps({**row, "reward_model_score": score}) + "\n" for score in (0.5, 0.7)))
    trained = tmp_path / "trained"
    finished_run(trained, "tiny")
    mirror = Mirror(Store(uri), trained, ["tiny"], print)
    mirror.look()
    mirror.sync()
    mode = ["eval.mode=pregenerated_policy_and_reward", f"eval.input={rows}", "eval.k=[1]"]
    machine(monkeypatch, tmp_path / "first")
    assert evaluate("tiny", [f"output_dir={uri}", *mode]) == 0
    place = "tiny/evaluations/pregenerated_policy_and_reward-given"
    assert {"rows.jsonl", "summary.json", "settings.json", ".mirror"} == Store(uri).names(place).keys()
    machine(monkeypatch, tmp_path / "second")
    monkeypatch.setattr("rairl_ray.verbs.evaluate.Evaluation._make", lambda *_: pytest.fail("made again"))
    assert evaluate(f"{uri}/tiny", mode) == 0
    summary = read_summary(staging_folder(uri) / place / "summary.json")
    assert summary["eval/pass_at_1"]["n"] == 1


@pytest.mark.usefixtures("undrawn")
def test_a_report_goes_beside_its_run_and_takes_nothing_over(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Machine(uri, tmp_path / "trained")
    trained.mirror.names = ("reported",)
    make_reported(tmp_path / "trained" / "reported", steps=2)
    weights = tmp_path / "trained" / "reported" / "final" / "policy" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_text("weights")
    trained.mirror.look()
    trained.mirror.sync()
    mark = trained.store.read("reported/.mirror")
    machine(monkeypatch, tmp_path / "reader")
    paths, _ = make_report([f"{uri}/reported"])
    assert paths[0] == staging_folder(uri) / "reported" / "report" / "index.html"
    page = trained.store.read("reported/report/index.html") or b""
    assert page == paths[0].read_bytes() and b"reported" in page
    assert not (staging_folder(uri) / "reported" / "final" / "policy" / "model.safetensors").exists()
    (tmp_path / "trained" / "reported" / "more").touch()
    trained.mirror.sync()
    assert trained.warnings == [] and trained.store.read("reported/.mirror") == mark


# --- forks ------------------------------------------------------------------------------------------


@pytest.fixture
def forkable(uri: str, tmp_path: Path) -> Machine:
    """A run over there with a whole configuration, whose policy is that of another run."""
    trained = Machine(uri, tmp_path / "trained")
    trained.mirror = Mirror(trained.store, tmp_path / "trained", ["demo/first", NAME], trained.warnings.append)
    make_run(tmp_path / "trained" / "demo" / "first", ())
    start = f"model.policy.path={tmp_path}/trained/demo/first/final/policy"
    words = [
        f"output_dir={tmp_path}/trained",
        start,
        "model.policy.build=null",
        "trainer.steps=9",
        f"name={NAME}",
    ]
    make_run(trained.folder, (2, 4, 8), keep=9)
    config = load_config(ROOT / "experiments/demo/airl.yaml", [*words, f"name={NAME}"])
    (trained.folder / "config.yaml").write_text(dump_yaml(config))
    trained.mirror.look()
    trained.mirror.sync()
    return trained


@pytest.mark.parametrize("named", ["name", "URI"])
def test_a_fork_starts_from_a_checkpoint_over_there(named: str, uri: str, forkable: Machine) -> None:
    changes = ["advantage.gamma=0.6", "name=demo/fork"]
    if named == "name":
        fork = fork_of(f"{NAME}@4", [*changes, f"output_dir={uri}"])
    else:
        fork = fork_of(f"{uri}/{NAME}@4", changes)
    staging = staging_folder(uri)
    assert fork.checkpoint == staging / NAME / "checkpoints" / "step-000004" and verify(fork.checkpoint) is None
    assert [path.name for path in fork.checkpoint.parent.glob("step-*")] == ["step-000004"]
    assert fork.config.output_dir == uri and fork.config.advantage.gamma == 0.6
    assert fork.config.model.policy.path == f"{staging}/demo/first/final/policy"
    assert (staging / "demo" / "first" / "final" / "policy" / "config.json").is_file()
    with mirrored(fork.config, None, lambda _text: None) as (inner, _):
        folder = RunFolder(Path(inner.output_dir) / "demo" / "fork")
        folder.create()
        take_over(fork, folder)
        folder.write_config(dump_yaml(inner))
    origin = json.loads(forkable.store.read("demo/fork/fork.json") or b"")
    assert origin["run"] == f"{uri}/{NAME}" and origin["step"] == 4
    assert "checkpoints/step-000004/manifest.json" in forkable.store.names("demo/fork")

    shutil.rmtree(staging)  # On another machine the fork goes on, with the policy that it names.
    config = read_saved(forkable.folder / "config.yaml").model_copy(
        update={"output_dir": uri, "name": "demo/fork", "warm_start": None}
    )
    policy = config.model.policy.model_copy(update={"path": f"{uri}/demo/first/final/policy"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"policy": policy})})
    with mirrored(config, "demo/fork", lambda _text: None) as (inner, _):
        assert inner.model.policy.path == f"{staging}/demo/first/final/policy"
        assert (staging / "demo" / "first" / "final" / "policy" / "config.json").is_file()
        assert RunFolder(staging / "demo" / "fork").read_fork() == {**origin, "run": str(staging / NAME)}


def test_a_step_that_is_not_there_names_its_neighbours(uri: str, forkable: Machine) -> None:
    with pytest.raises(ResumeError, match="no checkpoint of step 5; the nearest: 4 and 8"):
        fork_of(f"{NAME}@5", [f"output_dir={uri}"])
    forkable.store.write(f"{NAME}/checkpoints/step-000004/policy/shard-0.bin", b"x" * 800)
    with pytest.raises(ResumeError, match=r"step-000004 is damaged.*the other steps: 2, 8"):
        fork_of(f"{NAME}@4", [f"output_dir={uri}"])
    with pytest.raises(ResumeError, match=f"demo/none nor {uri}/demo/none is a run folder"):
        fork_of("demo/none@4", [f"output_dir={uri}"])


# --- last: pyarrow lets a new client wait for the requests of others that hang ------------------------


def test_nobody_there_is_one_line(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match=r"cannot be read: .*check the network and AWS_ENDPOINT_URL"):
        evaluate(NAME, [f"output_dir={uri}"])
