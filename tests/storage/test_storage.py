"""A remote `output_dir` against a real S3 server: what is refused, and a run around it."""

from __future__ import annotations

import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest

from rairl_ray import metrics as names
from rairl_ray import mirror as mirror_module
from rairl_ray.checkpoint import MANIFEST
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError, ResumeError, RunFailure
from rairl_ray.runfolder import RunFolder
from rairl_ray.storage import STAGING_ENV, Store, staging_folder, within
from rairl_ray.trainer.outputs import mirrored
from tests.mlflow_server import free_port
from tests.remote_runs import NAME, SECRET, contents, make_run
from tests.runs import ROOT, TINY_AIRL, launch, launch_background
from tests.s3_server import Line, refusing_all

# --- what is refused --------------------------------------------------------------------------------


UNUSABLE = [
    ("ftp://host/runs", "no known scheme; give a folder or one of s3://, gs://, file://"),
    ("s3://KEY:hidden@bucket/runs", "set AWS_ACCESS_KEY_ID"),
    ("s3://bucket/runs?secret_key=hidden", "set AWS_ACCESS_KEY_ID"),
    ("s3:///runs", "names no bucket"),
    ("s3://[bucket", "is no address (Invalid IPv6 URL); write s3://BUCKET/PREFIX"),
    ("s3://bucket:port/runs", "is no address (Port could not be cast"),
]


@pytest.mark.parametrize(("uri", "said"), UNUSABLE)
def test_a_uri_that_cannot_be_used_is_one_line_without_its_secrets(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Store(uri)
    text = str(caught.value)
    assert text.startswith("output_dir=") and said in text
    assert "hidden" not in text and "\n" not in text


@pytest.mark.parametrize(("uri", "said"), UNUSABLE)
def test_the_rules_of_a_configuration_refuse_it_too(uri: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(ROOT / "experiments" / "demo" / "sft.yaml", [f"output_dir={uri}"])
    text = str(caught.value)
    assert "output_dir=" in text and said in text
    assert "hidden" not in text and "\n" not in text


def test_a_missing_bucket_ends_the_command_before_anything_starts(uri: str, tmp_path: Path) -> None:
    done = launch("train", "experiments/demo/sft.yaml", "output_dir=s3://no-such-bucket/runs")
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "output_dir=s3://no-such-bucket/runs" in line and "make the bucket" in line
    assert not (tmp_path / "staging").exists()


def test_a_server_of_ones_own_is_named_in_the_uri_too(
    uri: str, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    host = server.removeprefix("http://")
    store = Store(f"{uri}/?scheme=http&endpoint_override={host}")
    store.probe()
    store.write("a/b", b"found")
    assert store.plain == uri and store.read("a/b") == b"found" and store.names("").keys() == {"a/b"}
    assert staging_folder(store.uri) == staging_folder(uri)


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

    for thread in threading.enumerate():
        if thread.name == "mirror":
            thread.join(120)
            assert not thread.is_alive()
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
    config = (store.read("demo/airl/config.yaml") or b"").decode()
    assert f"{uri}/demo/first/final/policy" in config and str(tmp_path / "another") not in config
    assert SECRET not in output + done.stdout + done.stderr
    left = [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert left == []


# --- last: pyarrow lets a new client wait for the requests of others that hang -----------------------


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("writing '140310/a': AWS Error NETWORK_CONNECTION: Could not connect to server", "check the network"),
        ("reading 'a': AWS Error UNKNOWN (HTTP status 403)", "set AWS_ACCESS_KEY_ID"),
    ],
)
def test_a_name_with_the_digits_of_a_status_is_no_status(uri: str, error: str, remedy: str) -> None:
    assert remedy in str(Store(uri).refusal(error))


def test_nobody_there_is_one_line_within_the_bound(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="check the network and AWS_ENDPOINT_URL"):
        Store(uri).probe()
    with socket.create_server(("127.0.0.1", 0)) as silent:  # It takes connections and never answers.
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ConfigError, match="no answer within 1 s; check the network"):
            Store(uri).probe(1.0)
