"""Jobs: what is packed, how arguments read on a cluster, ids and attempts, secrets, addresses."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.actors.placement import Node
from rairl_ray.config.load import load_config
from rairl_ray.errors import PlacementError, UserError
from rairl_ray.jobs import pack as packing
from rairl_ray.jobs.arguments import ArgumentError, Call, Places, prepare_call
from rairl_ray.jobs.client import (
    Cluster,
    ClusterError,
    check_versions,
)
from rairl_ray.jobs.pack import PackError, looks_secret, make_pack, write_zip
from rairl_ray.jobs.secrets import SecretError, open_with, refuse_visible, seal, take_secrets
from rairl_ray.jobs.submit import JobError, Options, attached, environment, placed
from rairl_ray.jobs.verbs import Job, said
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.plan import as_run
from rairl_ray.sweep.points import trials
from tests.runs import ROOT, launch

SFT = "experiments/demo/sft.yaml"


def cluster(here: bool = False, **node: float) -> Cluster:
    import platform

    import ray

    return Cluster(ray.__version__, platform.python_version(), (Node({"CPU": 8.0, **node}, {}),), here)


def checkout(folder: Path, files: dict[str, str], ignored: str = "runs/\n*.bin\n") -> Path:
    """A git repository with these files tracked."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {".gitignore": ignored, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    for command in (["init", "-q"], ["add", "-f", *files, ".gitignore"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


# --- packing ----------------------------------------------------------------------------------------


def test_only_tracked_needed_files_are_packed(tmp_path: Path) -> None:
    root = checkout(
        tmp_path / "repo",
        {
            "launch.py": "x", "rairl_ray/data/rows.py": "x", "tests/test_a.py": "x", "data/rows.jsonl": "x",
            "runs/demo/config.yaml": "x", "docs/a": "x", ".env": "KEY=1", "conf/id_rsa": "k", "a/b.pem": "k",
        },
    )  # fmt: skip
    (root / "weights.bin").write_text("ignored")
    (root / "new.py").write_text("unknown to git")
    (root / ".venv/lib").mkdir(parents=True)
    (root / ".venv/lib/x.py").write_text("x")
    outside = tmp_path / "elsewhere.txt"
    outside.write_text("x")
    (root / "link.txt").symlink_to(outside)
    subprocess.run(["git", "-C", str(root), "add", "link.txt"], check=True)
    pack = make_pack(root, {})
    assert sorted(pack.files) == ["launch.py", "rairl_ray/data/rows.py"]
    assert sorted(pack.left_out) == ["a/b.pem", "conf/id_rsa"]
    assert "new.py" in pack.unknown and "weights.bin" not in pack.unknown
    said_lines = "\n".join(pack.describe())
    assert "packed: 2 files, 2 bytes" in said_lines
    assert "id_rsa" in said_lines and "new.py" in said_lines


def test_a_named_file_goes_along_and_a_named_secret_is_refused(tmp_path: Path) -> None:
    root = checkout(tmp_path / "repo", {"launch.py": "x"})
    (root / "rows.bin").write_text("named although ignored")
    pack = make_pack(root, {"rows.bin": root / "rows.bin"})
    assert set(pack.files) == {"launch.py", "rows.bin"}
    with pytest.raises(PackError, match=r"\.env: is named like a secret"):
        make_pack(root, {".env": root / ".env"})


def test_a_package_over_the_limit_names_the_largest_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = checkout(tmp_path / "repo", {"launch.py": "x" * 10, "big.txt": "x" * 3000, "small.txt": "x" * 20})
    monkeypatch.setattr(packing, "LIMIT_BYTES", 2048)
    with pytest.raises(
        PackError, match=r"takes 3\.0 KiB, more than 2\.0 KiB; the largest: big\.txt \(2\.9 KiB\)"
    ):
        make_pack(root, {})


def test_a_folder_without_git_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="is no git checkout"):
        make_pack(tmp_path, {})


def test_equal_files_make_equal_packages(tmp_path: Path) -> None:
    """Ray names a package by its content: the second submission uploads nothing."""
    files = {"launch.py": "x", "rairl_ray/a.py": "y" * 5000}
    zips = []
    for name in ("one", "two"):
        root = checkout(tmp_path / name, files)
        write_zip(make_pack(root, {}), tmp_path / f"{name}.zip")
        zips.append((tmp_path / f"{name}.zip").read_bytes())
    assert zips[0] == zips[1]
    with zipfile.ZipFile(tmp_path / "one.zip") as archive:
        assert archive.read("rairl_ray/a.py").decode() == files["rairl_ray/a.py"]


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        (".env", True), ("conf/.env.local", True), ("server.PEM", True), ("id_ed25519.pub", True),
        ("hf_token", True), ("auth_token.txt", True), ("secrets/x.yaml", True), (".netrc", True),
        ("tokenizer.json", False), ("tokens.py", False), ("rairl_ray/jobs/secrets.py", False),
        ("special_tokens_map.json", False), ("keys.py", False), ("experiments/demo/sft.yaml", False),
    ],
)  # fmt: skip
def test_names_of_secrets(name: str, secret: bool) -> None:
    assert looks_secret(name) is secret


def test_this_checkout_fits_and_holds_what_a_job_runs() -> None:
    pack = make_pack(ROOT, {})
    assert {"launch.py", SFT, "experiments/demo/base.yaml", "rairl_ray/trainer/loop.py"} <= set(pack.files)
    assert not any(name.split("/")[0] in ("tests", "docs", ".venv", "runs") for name in pack.files)
    assert pack.left_out == ()


# --- arguments --------------------------------------------------------------------------------------


def call(verb: str, *arguments: str, here: bool = False, root: Path = ROOT) -> Call:
    tracked = frozenset(make_pack(root, {}).files)
    config = None
    if arguments[0].endswith(".yaml"):
        config = load_config(arguments[0], [word for word in arguments if "=" in word])
    return prepare_call(verb, arguments, config, Places(root, tracked, here, packed=True))


def test_a_run_is_named_by_its_name_and_joins_the_cluster() -> None:
    made = call("train", SFT, "output_dir=/shared/runs", "seed=3")
    assert made.job == "train-demo-sft"
    assert made.arguments == (SFT, "output_dir=/shared/runs", "seed=3", "cluster.address=auto")
    assert made.output == "/shared/runs/demo/sft"
    assert made.named == {}
    other = call("train", SFT, "output_dir=/shared/runs", "seed=4")
    assert other.job == made.job and other.fingerprint != made.fingerprint
    assert call("train", SFT, "output_dir=/s", "name=b/c=d").job == "train-b-c-d"


def test_a_sweep_is_named_by_its_name_and_joins_the_cluster() -> None:
    file, changes = "experiments/sweeps/demo.yaml", ["output_dir=/shared/runs", "trainer.steps=2"]
    config = as_run(load_sweep(str(ROOT / file), changes))
    places = Places(ROOT, frozenset({file}), here=False, packed=True)
    made = prepare_call("sweep", [str(ROOT / file), *changes], config, places)
    assert made.job == "sweep-sweeps-demo" and made.output == "/shared/runs/sweeps/demo"
    assert made.arguments == (file, *changes, "address=auto")
    inside = load_sweep(str(ROOT / made.arguments[0]), made.arguments[1:])
    assert {item.config.cluster.address for item in trials(inside)} == {"auto"}
    assert {item.config.trainer.steps for item in trials(inside)} == {2}


def test_other_verbs_are_named_by_all_their_arguments() -> None:
    first, second = (call("evaluate", "/shared/runs/a", f"eval.prompts={n}") for n in (8, 16))
    assert first.job != second.job
    assert first.job.startswith("evaluate-shared-runs-a-")
    assert first.output == "/shared/runs/a"
    assert call("doctor", "--address", "auto").arguments == ("--address", "auto")


def test_a_relative_output_is_refused_unless_the_cluster_is_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(
        ArgumentError, match=r"^output_dir=runs: a relative path .* output_dir=/shared/runs, or s3://"
    ):
        call("train", SFT)
    with pytest.raises(ArgumentError, match=r"^--output=scored\.jsonl: a relative path"):
        call("score", "/shared/runs/a", "/shared/rows.jsonl", "--output", "scored.jsonl")
    remote = call("train", SFT, "output_dir=s3://bucket/runs/?region=eu-west-1")
    assert "output_dir=s3://bucket/runs/?region=eu-west-1" in remote.arguments
    assert remote.output == "s3://bucket/runs/demo/sft"
    here = call("train", SFT, here=True)
    assert f"output_dir={Path.cwd() / 'runs'}" in here.arguments
    scored = call("score", "/shared/a", "rows.jsonl", "--output=scored.jsonl", here=True)
    assert f"--output={Path.cwd() / 'scored.jsonl'}" in scored.arguments


def test_files_of_this_machine_go_along_or_are_named(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    sent = call("score", "/shared/a", str(rows), "--output", "/shared/out.jsonl")
    inside = f"outside{rows.resolve()}"
    assert sent.named == {inside: rows.resolve()}
    assert sent.arguments[1] == inside
    assert call("score", "/shared/a", str(rows), "--output", "/o.jsonl", here=True).arguments[1] == str(rows)
    by_key = call("train", SFT, "output_dir=/s", f"data.path={rows}", "data.task=jsonl")
    assert f"data.path={inside}" in by_key.arguments
    with pytest.raises(ArgumentError, match="rairl_ray is a folder of this machine"):
        call("report", "rairl_ray")


def test_an_experiment_from_outside_brings_what_it_refers_to(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((ROOT / "experiments/demo/base.yaml").read_text())
    file = tmp_path / "mine.yaml"
    file.write_text("base: base.yaml\nname: mine\nalgorithm: {type: sft}\noutput_dir: /shared/runs\n")
    made = call("train", str(file))
    assert set(made.named.values()) == {file.resolve(), (tmp_path / "base.yaml").resolve()}
    assert made.output == "/shared/runs/mine"
    file.write_text(f"base: {ROOT}/experiments/demo/base.yaml\nname: mine\nalgorithm: {{type: sft}}\n")
    with pytest.raises(ArgumentError, match="on the other side of the checkout's border"):
        call("train", str(file), "output_dir=/shared/runs")


# --- the cluster ------------------------------------------------------------------------------------


def test_other_versions_and_too_small_a_cluster_are_one_line() -> None:
    good = cluster()
    check_versions(good, "http://c")
    with pytest.raises(ClusterError, match=r"runs Ray 2\.1\.0 and this environment Ray"):
        check_versions(Cluster("2.1.0", good.python, good.nodes, False), "http://c")
    with pytest.raises(ClusterError, match=r"runs Python 3\.9\.1"):
        check_versions(Cluster(good.ray, "3.9.1", good.nodes, False), "http://c")
    config = load_config(SFT, ["learner.replicas=2"])
    plan, nodes = placed(config, good)
    assert plan.device == "cpu" and nodes == list(good.nodes)
    with pytest.raises(PlacementError, match="the cluster has 1"):
        placed(config, cluster(CPU=1.0))


def test_labels_of_living_nodes_count_and_promised_nodes_have_any() -> None:
    words = ["placement.type=disaggregated", "placement.labels.rollout={market: spot}"]
    with pytest.raises(PlacementError, match=r"labels\.rollout: no node has market=spot; the nodes have no"):
        placed(load_config(SFT, words), cluster())
    grows = ["cluster.address=auto", "cluster.grows_to.nodes=2", "cluster.grows_to.cpus=4"]
    plan, nodes = placed(load_config(SFT, [*words, *grows]), cluster(CPU=0.0))
    assert {"market": "spot"} in plan.labels and nodes == [Node({"CPU": 4.0, "GPU": 0.0})] * 2
    with pytest.raises(PlacementError, match="the cluster has 0"):
        placed(load_config(SFT, ["cluster.address=auto"]), cluster(CPU=0.0))


def test_what_the_nodes_are_asked_for() -> None:
    env, folder = environment(Options(), ROOT, cluster())
    assert (folder, env) == ("", {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}})
    lock = environment(Options(lock="pip"), ROOT, cluster(GPU=1.0))[0]["pip"]
    assert lock["packages"][0] == "torch==2.13.0", "the lock itself leaves torch to install.sh"
    assert "ray==2.60.0" in lock["packages"] and any(x.startswith("vllm==") for x in lock["packages"])
    assert environment(Options(working_dir="/code", image="i:1"), ROOT, cluster()) == (
        {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "600"}, "image_uri": "i:1"},
        "/code",
    )
    for wrong in (
        Options(working_dir="code"),
        Options(image="i:1"),
        Options(image="i", working_dir="s3://b/c.zip"),
    ):
        with pytest.raises(JobError):
            environment(wrong, ROOT, cluster())


@pytest.mark.parametrize(
    ("status", "code", "exit_code"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_of_a_job(status: str, code: int | None, exit_code: int) -> None:
    job = Job("a", status, code, "why\nit failed", 0.0, 1.0, "x", {})
    assert job.exit_code == exit_code
    assert f"exit code {exit_code}" in said(job)
    assert ("why it failed" in said(job)) == (status == "FAILED" and code is None)


def attempt(identity: str, status: str, made: Call, code: int | None = None) -> Job:
    metadata = {"rairl.fingerprint": made.fingerprint, "rairl.command": "train EARLIER"}
    return Job(identity, status, code, "", 0.0, None, "x", metadata)


def test_what_asking_again_means() -> None:
    asked = ["train", SFT, "output_dir=/shared/runs"]
    made, other = call(*asked), call(*asked, "seed=9")
    first = attempt("train-demo-sft", "FAILED", made, 1)

    def decide(*earlier: Job, extra: tuple[str, ...] = (), ended: str = "refuse") -> Job | None:
        return attached(earlier, made, [*asked[1:], *extra], " --address http://c", ended)

    assert decide() is None
    for status in ("PENDING", "RUNNING"):
        running = attempt("train-demo-sft~2", status, made)
        assert decide(first, running) is running
        assert decide(first, running, ended="again") is running, "never doubled"
    with pytest.raises(
        JobError, match=r"runs already, with other arguments: train EARLIER; .* --address http://c"
    ):
        decide(attempt("train-demo-sft", "RUNNING", other))
    with pytest.raises(
        JobError, match=r"has ended: it failed with exit code 1; write --resume /shared/runs/demo/s"
    ):
        decide(first)
    assert decide(first, ended="again") is None
    assert decide(first, extra=("--resume", "demo/sft")) is None


# --- secrets ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1), max_size=3), st.text(min_size=1))
def test_what_is_sealed_is_opened_by_the_same_token_only(secrets: dict[str, str], token: str) -> None:
    sealed = seal(secrets, token)
    assert open_with(sealed, token) == secrets
    with pytest.raises(SecretError, match="another token"):
        open_with(sealed, token + "x")


def test_secrets_are_taken_by_name_and_never_shown() -> None:
    assert take_secrets(["A"], {"A": "value", "B": "other"}) == {"A": "value"}
    for name in ("A=value", "hf_abc-def"):
        with pytest.raises(SecretError) as caught:
            take_secrets([name], {})
        assert name not in str(caught.value)
    with pytest.raises(SecretError, match="--secret B: this environment has no such variable"):
        take_secrets(["B"], {"B": ""})
    assert "hunter2" not in seal({"A": "hunter2"}, "token")
    for argument in ("data.path=hunter2", "tracking.uri=https://me:hunter2@host/"):
        with pytest.raises(SecretError) as caught:
            refuse_visible([argument], {"A": "hunter2"})
        assert "hunter2" not in str(caught.value)


# --- the command line -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "start"),
    [
        (["submit"], "Missing argument"),
        (["submit", "tarin", SFT], "submit: tarin is no verb"),
        (["submit", "train", SFT, "--nope"], "No such option"),
        (["submit", "train", SFT, "trainer.stepz=1"], "command line: unknown key trainer.stepz"),
        (["submit", "--address", "ftp://x", "train", SFT], "--address ftp://x: scheme ftp://"),
        (["submit", "--secret", "NOT_SET_ANYWHERE", "doctor"], "--secret NOT_SET_ANYWHERE: this environment"),
        (["submit", "--address", "http://127.0.0.1:1", "doctor"], "http://127.0.0.1:1: nobody answers there"),
        (["jobs", "list", "--address", "http://127.0.0.1:1"], "http://127.0.0.1:1: nobody answers there"),
        (["jobs", "stop"], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], start: str) -> None:
    result = launch(*arguments)
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith(f"rairl: error: {start}")


def test_a_user_error_is_what_all_of_these_are() -> None:
    assert all(issubclass(kind, UserError) for kind in (ArgumentError, ClusterError, JobError, PackError))
