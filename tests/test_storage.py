"""A remote `output_dir` against a real S3 server: what is refused, what arrives, what others find."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rairl_ray import metrics as names
from rairl_ray import mirror as mirror_module
from rairl_ray.checkpoint import MANIFEST, CheckpointStore, verify
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError, ResumeError, RunFailure
from rairl_ray.mirror import Mirror
from rairl_ray.runfolder import RunFolder
from rairl_ray.storage import STAGING_ENV, Store, staging_folder, within
from rairl_ray.sweep.file import load_sweep
from rairl_ray.trainer.fork import fork_of
from rairl_ray.trainer.outputs import mirrored
from rairl_ray.verbs.score import reward_of
from rairl_ray.verbs.target import find_target
from rairl_ray.verbs.transfer import transfer
from tests.mlflow_server import free_port
from tests.runs import ROOT, TINY_AIRL, launch, launch_background
from tests.s3_server import BUCKET, Line, refusing_all, s3_server
from tests.test_checkpoint import save

SECRET = "planted-secret-of-the-test"
NAME = "demo/run"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def uri(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A prefix of this test alone. The options are those of a user with a server of his own."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv(STAGING_ENV, str(tmp_path / "staging"))
    monkeypatch.setattr(mirror_module, "PAUSE_SECONDS", 0.2)
    return f"s3://{BUCKET}/{abs(hash(request.node.name))}"


def make_run(root: Path, steps: tuple[int, ...] = (2,), keep: int = 2) -> CheckpointStore:
    """A run folder as a trainer leaves it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(f"output_dir: {root.parents[1]}\nname: {NAME}\n")
    with open(root / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)
    (root / "final" / "policy").mkdir(parents=True, exist_ok=True)
    (root / "final" / "policy" / "config.json").write_text("{}")
    (root / ".lock").write_text("process 1 on here")
    (root / "final" / ".policy-x1").mkdir(exist_ok=True)
    (root / "final" / ".policy-x1" / "model.safetensors").write_text("half")
    (root / "checkpoints" / ".tmp-step-000009-aa").mkdir(parents=True, exist_ok=True)
    (root / "checkpoints" / ".tmp-step-000009-aa" / "half").write_text("half")
    store = CheckpointStore(root, keep)
    for step in steps:
        save(store, step)
    return store


class Machine:
    """A staging folder and what mirrors it."""

    def __init__(self, uri: str, staging: Path) -> None:
        self.store, self.warnings = Store(uri), list[str]()
        self.mirror = Mirror(self.store, staging, [NAME], self.warnings.append)
        self.mirror.look()
        self.folder = staging / NAME

    def there(self) -> dict[str, int]:
        return {name: facts.size for name, facts in self.store.names(NAME).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part == "latest" for part in path.parts[len(folder.parts) :])
    }


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("ftp://host/runs", "no known scheme; give a folder or one of s3://, gs://, file://"),
        ("s3://KEY:hidden@bucket/runs", "set AWS_ACCESS_KEY_ID"),
        ("s3://bucket/runs?secret_key=hidden", "set AWS_ACCESS_KEY_ID"),
        ("s3:///runs", "names no bucket"),
    ],
)
def test_a_uri_that_cannot_be_used_is_one_line_without_its_secrets(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Store(uri)
    text = str(caught.value)
    assert text.startswith("output_dir=") and said in text
    assert "hidden" not in text and "\n" not in text


def test_a_missing_bucket_ends_the_command_before_anything_starts(uri: str, tmp_path: Path) -> None:
    done = launch("train", "experiments/demo/sft.yaml", "output_dir=s3://no-such-bucket/runs")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "output_dir=s3://no-such-bucket/runs" in line and "make the bucket" in line
    assert not (tmp_path / "staging").exists()


@pytest.mark.parametrize(
    "refused",
    [
        lambda uri: find_target("demo/airl", [f"output_dir={uri}"]),
        lambda uri: find_target("experiments/demo/airl.yaml", [f"output_dir={uri}"]),
        lambda uri: reward_of("demo/airl", [f"output_dir={uri}"]),
        lambda uri: transfer(["demo/a"], ["demo/b"], [f"output_dir={uri}"]),
        lambda uri: load_sweep("experiments/sweeps/demo.yaml", [f"output_dir={uri}"]),
        lambda uri: fork_of("demo/airl@2", [f"output_dir={uri}"]),
    ],
    ids=["evaluate RUN", "evaluate CONFIG", "score", "transfer", "sweep", "fork"],
)
def test_what_needs_a_folder_says_so(refused: Callable[[str], object]) -> None:
    with pytest.raises(
        ConfigError, match=r"^output_dir=s3://bucket/runs: .* needs a folder; .*output_dir=FOLDER"
    ):
        refused("s3://bucket/runs")


def test_refused_credentials_are_one_line(uri: str, server: str) -> None:
    with refusing_all(server), pytest.raises(ConfigError, match="set AWS_ACCESS_KEY_ID") as caught:
        Store(uri).probe()
    assert SECRET not in str(caught.value)
    Store(uri).probe()
    assert Store(uri).names("") == {}  # The probe left nothing.


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir=file://.*cannot be written"):
        Store(f"file://{tmp_path}/file/runs").probe()


def test_what_hangs_is_left_behind() -> None:
    assert within(0.05, lambda: time.sleep(5)) == "no answer within 0.05 s"
    assert within(5, lambda: None) is None


# --- what arrives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["s3", "file"])
def test_a_run_arrives_whole_and_comes_back_on_another_machine(uri: str, scheme: str, tmp_path: Path) -> None:
    place = uri if scheme == "s3" else f"file://{tmp_path}/remote"
    here = Machine(place, tmp_path / "here")
    make_run(here.folder, (2, 4))
    here.mirror.sync()
    local = contents(here.folder)
    assert here.there().keys() == local.keys() | {".mirror"}
    config = here.store.read(f"{NAME}/config.yaml")
    assert config == f"output_dir: {place}\nname: {NAME}\n".encode()

    elsewhere = Machine(place, tmp_path / "elsewhere")
    assert elsewhere.mirror.fetch(NAME) == elsewhere.folder
    # The newest checkpoint alone, and paths of that machine.
    expected = {name: data for name, data in local.items() if "step-000002" not in name}
    expected["config.yaml"] = f"output_dir: {tmp_path}/elsewhere\nname: {NAME}\n".encode()
    assert contents(elsewhere.folder) == expected
    assert verify(elsewhere.folder / "checkpoints" / "step-000004") is None


def recorded(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names in the order in which `store` uploads and deletes ("-name") them from now on."""
    order: list[str] = []
    upload, delete = store.upload, store.delete
    monkeypatch.setattr(
        store, "upload", lambda source, name, moved: (upload(source, name, moved), order.append(name))
    )
    monkeypatch.setattr(store, "delete", lambda name: (delete(name), order.append(f"-{name}")))
    return order


def test_the_manifest_is_last_and_old_checkpoints_go_after_it(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(uri, tmp_path)
    saved = make_run(here.folder, (2,), keep=1)
    here.mirror.sync()
    save(saved, 4)
    order = recorded(here.store, monkeypatch)
    here.mirror.sync()
    new = [i for i, name in enumerate(order) if "step-000004" in name and name[0] != "-"]
    old = [i for i, name in enumerate(order) if name.startswith(f"-{NAME}/checkpoints/step-000002")]
    assert order[new[-1]].endswith("step-000004/manifest.json") and len(new) == len(old) == 5
    assert min(old) > max(new)
    assert order[old[0]].endswith("manifest.json")  # What is half removed looks unfinished.
    order.clear()
    here.mirror.sync()
    assert order == []  # Nothing changed.
    save(saved, 4)
    here.mirror.sync()
    assert order[0] == f"-{NAME}/checkpoints/step-000004/manifest.json"  # Made again: unfinished until whole.
    assert here.there().keys() == contents(here.folder).keys() | {".mirror"}


def test_a_checkpoint_that_is_pruned_while_it_is_uploaded_arrives_and_stays_until_the_next(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Machine(uri, tmp_path)
    saved = make_run(here.folder, (2,), keep=1)
    upload = here.store.upload

    def prune_meanwhile(source: Path, name: str, moved: Callable[[int], None]) -> None:
        upload(source, name, moved)
        if "step-000002/policy" in name:
            save(saved, 4)

    monkeypatch.setattr(here.store, "upload", prune_meanwhile)
    here.mirror.sync()
    assert not (here.folder / "checkpoints" / "step-000002").exists()
    other = Machine(uri, tmp_path / "other")
    other.mirror.fetch(NAME)
    assert verify(other.folder / "checkpoints" / "step-000002") is None
    here.mirror.sync()
    assert {name.split("/")[1] for name in here.there() if "step-" in name} == {"step-000004"}


def test_a_connection_lost_in_a_checkpoint_leaves_the_older_one_and_is_made_good(
    uri: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = Line(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.uri)
    here = Machine(uri, tmp_path / "here")
    saved = make_run(here.folder, (2,))
    here.mirror.sync()
    save(saved, 4)
    upload = here.store.upload

    def cut_meanwhile(source: Path, name: str, moved: Callable[[int], None]) -> None:
        upload(source, name, moved)
        if "step-000004/policy" in name and not here.warnings:
            line.cut()

    monkeypatch.setattr(here.store, "upload", cut_meanwhile)
    here.mirror.start()
    deadline = time.monotonic() + 120
    while not here.warnings:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    other = Machine(uri, tmp_path / "other")
    other.mirror.fetch(NAME)
    assert [path.name for path in (other.folder / "checkpoints").glob("step-*")] == ["step-000002"]
    assert any("step-000004" in name for name in other.there()), "nothing of it had been uploaded"
    line.mend()
    assert here.mirror.finish() is None
    assert here.there().keys() == contents(here.folder).keys() | {".mirror"}
    first, last = here.warnings  # One warning, however often it was tried.
    assert "training goes on, uploads are tried again" in first and "uploads go on" in last


def test_a_checkpoint_that_was_damaged_over_there_is_skipped(uri: str, tmp_path: Path) -> None:
    here = Machine(uri, tmp_path / "here")
    make_run(here.folder, (2, 4))
    here.mirror.sync()
    here.store.write(f"{NAME}/checkpoints/step-000004/policy/shard-0.bin", b"x" * 800)
    other = Machine(uri, tmp_path / "other")
    other.mirror.fetch(NAME)
    assert [path.name for path in (other.folder / "checkpoints").glob("step-*")] == ["step-000002"]
    assert "step-000004: broken checkpoint is skipped" in other.warnings[0]


# --- whose copy it is -------------------------------------------------------------------------------


def test_a_run_that_went_on_elsewhere_comes_back_newer_and_the_older_process_stops(
    uri: str, tmp_path: Path
) -> None:
    first = Machine(uri, tmp_path / "first")
    make_run(first.folder, (2,))
    first.mirror.sync()
    second = Machine(uri, tmp_path / "second")
    second.mirror.fetch(NAME)
    make_run(second.folder, (4,), keep=1)
    second.mirror.sync()
    (first.folder / "late").touch()
    first.mirror.sync()
    assert "another process writes there now" in first.warnings[0] and "late" not in first.there()
    first.mirror.start()
    assert "another process writes there now" in (first.mirror.finish() or "")
    again = Machine(uri, tmp_path / "first")
    again.mirror.fetch(NAME)
    assert "continued elsewhere" in again.warnings[0]
    assert (tmp_path / "first" / f"{NAME}~1" / "checkpoints" / "step-000002").is_dir()
    assert (again.folder / "checkpoints" / "step-000004").is_dir()
    # The same machine once more: what is staged there is the newest, and is not fetched.
    (again.folder / "mine").touch()
    third = Machine(uri, tmp_path / "first")
    third.mirror.fetch(NAME)
    assert (third.folder / "mine").is_file() and third.warnings == []


def test_a_warm_start_that_others_use_stays_theirs_unless_it_is_trained_anew(uri: str, tmp_path: Path) -> None:
    owner = Machine(uri, tmp_path / "owner")
    make_run(owner.folder)
    owner.mirror.sync()
    for _ in range(2):  # Also with the staging folder of the time before.
        user = Machine(uri, tmp_path / "user")
        user.mirror.borrow(NAME)
        assert (user.folder / "final" / "policy" / "config.json").is_file()
        (user.folder / "mine").touch()
        user.mirror.sync()
        (owner.folder / "more").touch()
        owner.mirror.sync()
        assert "mine" not in owner.there() and owner.warnings == []
    user.folder.rename(tmp_path / "aside")
    make_run(user.folder, ())
    user.mirror.sync()
    assert "mine" not in user.there() and "more" in user.store.names(f"{NAME}~1")


@pytest.mark.parametrize("machine", ["same", "other"])
def test_a_fresh_start_moves_the_earlier_run_aside_over_there(uri: str, machine: str, tmp_path: Path) -> None:
    first = Machine(uri, tmp_path / "same")
    make_run(first.folder, (2,))
    first.mirror.sync()
    before = contents(first.folder).keys()
    fresh = Machine(uri, tmp_path / machine)
    fresh.mirror.begin(NAME)
    fresh.mirror.sync()  # The old folder is still there, and is left alone.
    assert fresh.there().keys() == before | {".mirror"}
    if fresh.folder.exists():
        fresh.folder.rename(tmp_path / "aside")
    make_run(fresh.folder, ())
    fresh.mirror.sync()
    assert fresh.there().keys() == contents(fresh.folder).keys() | {".mirror"}
    assert fresh.store.names(f"{NAME}~1").keys() == before | {".mirror"}
    assert "an earlier run was moved to" in fresh.warnings[0]


# --- around a run -----------------------------------------------------------------------------------


def test_what_did_not_arrive_fails_the_run_and_the_resume_uploads_it(
    uri: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "PATIENCE_SECONDS", 1.0)
    line = Line(server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", line.uri)
    config, notes = RunConfig(name=NAME, output_dir=uri), list[str]()
    staged = staging_folder(uri) / NAME
    with pytest.raises(RunFailure) as caught, mirrored(config, None, notes.append) as (inner, resume):
        assert (inner.output_dir, resume) == (str(staged.parents[1]), None)
        line.cut()
        make_run(staged)
    text = str(caught.value)
    assert f"the files are in {staged}" in text and f"--resume {NAME} uploads the rest" in text
    assert any("MLflow's database stays on this machine" in note for note in notes)
    assert SECRET not in text + str(notes)

    line.mend()
    with mirrored(config, f"{uri}/{NAME}", notes.append) as (_, resume):
        assert resume == NAME
    assert Store(uri).names(NAME).keys() == contents(staged).keys() | {".mirror"}

    shutil.rmtree(staged.parents[1])
    with mirrored(config, NAME, notes.append):
        assert (staged / "checkpoints" / "step-000002" / "manifest.json").is_file()


def test_a_resume_of_nothing_names_both_places(uri: str) -> None:
    config = RunConfig(name=NAME, output_dir=uri)
    said = f"neither {uri}/demo/none nor .*demo/none is a run folder"
    with pytest.raises(ResumeError, match=said), mirrored(config, "demo/none", print):
        pass


@pytest.mark.slow
def test_a_run_stopped_on_one_machine_goes_on_on_another(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sft = tmp_path / "sft.yaml"
    sft.write_text(f"base: {ROOT}/experiments/demo/sft.yaml\nname: demo/first\ntrainer: {{steps: 2}}\n")
    arguments = ["train", "experiments/demo/airl.yaml", *TINY_AIRL, f"warm_start={sft}"]
    arguments += ["trainer.steps=4", f"output_dir={uri}"]
    process = launch_background(*arguments)
    staged = staging_folder(uri)
    deadline = time.monotonic() + 400
    while not list((staged / "demo" / "airl" / "checkpoints").glob("step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 130, output
    store = Store(uri)
    steps = {int(name.split("/")[1][5:]) for name in store.names("demo/airl") if name.endswith(MANIFEST)}
    assert steps and max(steps) < 4

    monkeypatch.setenv(STAGING_ENV, str(tmp_path / "another"))
    done = launch(*arguments, "--resume", "demo/airl")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = staging_folder(uri) / "demo" / "airl"
    assert folder.is_relative_to(tmp_path / "another")
    rows = [row for row in RunFolder(folder).read_metrics() if names.POLICY_LOSS in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    before = [row for row in RunFolder(staged / "demo" / "airl").read_metrics() if names.POLICY_LOSS in row]
    assert rows[: max(steps)] == before[: max(steps)]  # Its own rows: nothing was made again.
    assert "is trained first" in output and "is trained first" not in done.stdout  # The warm start was fetched.
    assert store.names("demo/airl").keys() == contents(folder).keys() | {".mirror"}
    assert str(tmp_path) not in (store.read("demo/airl/config.yaml") or b"").decode()
    assert SECRET not in output + done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert left == []


# --- last: pyarrow lets a new client wait for the requests of others that hang -----------------------


def test_nobody_there_is_one_line_within_the_bound(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="check the network and AWS_ENDPOINT_URL"):
        Store(uri).probe()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It takes connections and never answers.
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match="no answer within 1 s; check the network"):
            Store(uri).probe(1.0)
