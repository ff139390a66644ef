"""Jobs on a real cluster: submitted, followed, asked for again, failed, stopped, refused; secrets unseen."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray_cluster import LocalCluster, free_ports, local_cluster
from tests.runs import ROOT, TINY
from tests.tls_front import tls_front

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

SFT = "experiments/demo/sft.yaml"
SECRET = "a-value-that-nobody-may-see"


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_cluster() as running:
        yield running
        left = running
    assert left.processes() == []


def sft(cluster: LocalCluster, *extra: str) -> list[str]:
    return ["train", SFT, *TINY, "placement.cpus_per_actor=0.25", f"output_dir={cluster.folder}/out", *extra]


def submit(
    cluster: LocalCluster, *arguments: str, options: tuple[str, ...] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    return cluster.launch("submit", "--address", cluster.address, *options, *arguments, **environment)


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, (result.stdout, result.stderr)
    assert len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


def jobs(cluster: LocalCluster) -> list[dict[str, object]]:
    """What the API tells a client with a token: nothing is redacted for it."""
    token = (cluster.folder / "token").read_text()
    request = urllib.request.Request(
        f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return [job for job in json.load(answer) if job["submission_id"]]


def status_of(cluster: LocalCluster, identity: str) -> str:
    return next(str(job["status"]) for job in jobs(cluster) if job["submission_id"] == identity)


def wait_for(cluster: LocalCluster, identity: str, *wanted: str) -> None:
    until = time.monotonic() + 120
    while status_of(cluster, identity) not in wanted:
        assert time.monotonic() < until, status_of(cluster, identity)
        time.sleep(0.5)


def test_a_run_is_submitted_followed_and_not_run_twice(cluster: LocalCluster) -> None:
    arguments = sft(cluster)
    dry = submit(cluster, *arguments, options=("--dry-run",))
    assert dry.returncode == 0, dry.stderr
    assert "job: train-demo-sft" in dry.stdout and "packed: " in dry.stdout and "nothing was sent" in dry.stdout
    assert "policy 0 (CPU 0.25)" in dry.stdout
    assert jobs(cluster) == []
    first = submit(cluster, *arguments, options=("--secret", "MY_SECRET"), MY_SECRET=SECRET)
    assert first.returncode == 0, first.stderr
    again = submit(cluster, *arguments, options=("--follow",))
    assert again.returncode == 0, (again.stdout, again.stderr)
    assert "attached to train-demo-sft" in again.stdout
    assert "run folder: " in again.stdout, "the log was streamed"
    assert "train-demo-sft succeeded with exit code 0" in again.stdout
    assert len(jobs(cluster)) == 1
    assert (cluster.folder / "out/demo/sft/final/policy/config.json").is_file()
    ended = one_line(submit(cluster, *arguments))
    assert "train-demo-sft has ended: it succeeded with exit code 0" in ended
    assert f"--resume {cluster.folder}/out/demo/sft" in ended and "--again" in ended
    assert len(jobs(cluster)) == 1
    listed = cluster.launch("jobs", "list", "--address", cluster.address)
    assert "train-demo-sft" in listed.stdout and "SUCCEEDED" in listed.stdout
    status = cluster.launch("jobs", "status", "demo/sft", "--address", cluster.address)
    assert f"results, on the cluster's disk: {cluster.folder}/out/demo/sft" in status.stdout
    assert_unseen(cluster)


def assert_unseen(cluster: LocalCluster) -> None:
    """The secret is neither in what the API tells, nor in any file of the cluster, MLflow's included."""
    assert SECRET not in json.dumps(jobs(cluster))
    files = [path for path in cluster.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(path.name == "mlflow.db" for path in files) and any(path.suffix == ".log" for path in files)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_the_driver_and_its_actors_have_the_secrets(cluster: LocalCluster, tmp_path: Path) -> None:
    code = f"""
import os, sys, zlib
from pathlib import Path
from rairl_ray.jobs.client import Connection
from rairl_ray.jobs.pack import make_pack, write_zip
from rairl_ray.jobs.submit import Options, environment
connection = Connection({cluster.address!r})
root = Path.cwd()
env, _ = environment(Options(secrets={{"MY_SECRET": {SECRET!r}}}), root, connection.cluster())
write_zip(make_pack(root, {{}}), Path({str(tmp_path / "code.zip")!r}))
inside = (
    "import os, zlib, ray; from rairl_ray.jobs.secrets import open_sealed; open_sealed(); ray.init();"
    "read = lambda: zlib.crc32(os.environ['MY_SECRET'].encode());"
    "actor = ray.remote(num_cpus=0, runtime_env={{'env_vars': {{'OTHER': '1'}}}})(read);"
    "print('READ', read(), ray.get(actor.remote()))"
)
connection.jobs.submit_job(
    entrypoint=f'{{sys.executable}} -c "{{inside}}"', submission_id="secrets",
    runtime_env={{**env, "working_dir": {str(tmp_path / "code.zip")!r}}},
)
"""
    sent = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=cluster.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert sent.returncode == 0, sent.stderr
    followed = cluster.launch("jobs", "logs", "secrets", "--follow", "--address", cluster.address)
    import zlib

    crc = zlib.crc32(SECRET.encode())
    assert f"READ {crc} {crc}" in followed.stdout, followed.stdout
    assert followed.returncode == 0
    assert_unseen(cluster)


def test_a_failing_verb_gives_its_exit_code(cluster: LocalCluster) -> None:
    result = submit(cluster, "evaluate", "/nowhere/at/all", options=("--follow",))
    assert result.returncode == 2, result.stdout
    assert "rairl: error: /nowhere/at/all" in result.stdout
    assert "failed with exit code 2" in result.stdout


def test_a_job_is_left_alone_by_ctrl_c_and_ended_by_stop(cluster: LocalCluster) -> None:
    arguments = sft(cluster, "name=long", "trainer.steps=100000")
    follower = subprocess.Popen(
        [sys.executable, "launch.py", "submit", "--address", cluster.address, "--follow", *arguments],
        cwd=ROOT, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        # A suite that a shell started in the background ignores Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert follower.stdout is not None
    seen = ""
    for line in follower.stdout:
        seen += line
        if "run folder: " in line:
            break
    follower.send_signal(signal.SIGINT)
    rest, _ = follower.communicate(timeout=60)
    assert follower.returncode == 130, seen + rest
    assert f"rairl jobs logs train-long --follow --address {cluster.address} comes back" in rest
    assert status_of(cluster, "train-long") == "RUNNING"
    other = one_line(submit(cluster, *arguments, "seed=7"))
    assert "train-long runs already, with other arguments" in other
    stopped = cluster.launch("jobs", "stop", "long", "--address", cluster.address)
    assert stopped.returncode == 0 and "train-long was asked to stop" in stopped.stdout
    wait_for(cluster, "train-long", "STOPPED")
    ended = cluster.launch("jobs", "logs", "train-long", "--follow", "--address", cluster.address)
    assert ended.returncode == 130 and "was stopped" in ended.stdout
    resumed = submit(cluster, *sft(cluster, "name=long"), "--resume", "long")
    assert "submitted train-long~2" in resumed.stdout, (resumed.stdout, resumed.stderr)
    cluster.launch("jobs", "stop", "train-long~2", "--address", cluster.address)
    wait_for(cluster, "train-long~2", "STOPPED", "FAILED", "SUCCEEDED")


def test_what_the_cluster_refuses_is_one_line(cluster: LocalCluster, tmp_path: Path) -> None:
    before = len(jobs(cluster))
    (tmp_path / "token").write_text("f" * 64)
    wrong = submit(cluster, *sft(cluster, "name=no"), RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert "the cluster refuses the token" in one_line(wrong)
    missing = submit(cluster, *sft(cluster, "name=no"), RAY_AUTH_MODE="disabled")
    assert "asks for a token and none was given" in one_line(missing)
    dead = cluster.launch("submit", "--address", f"http://127.0.0.1:{free_ports(1)[0]}", *sft(cluster))
    assert "nobody answers there" in one_line(dead)
    large = submit(cluster, *sft(cluster, "name=no", "learner.replicas=16", "trainer.prompts_per_step=16"))
    assert "placement: the run needs" in one_line(large)
    assert "no such job" in one_line(cluster.launch("jobs", "stop", "nobody", "--address", cluster.address))
    assert len(jobs(cluster)) == before


def test_certificates_are_checked(cluster: LocalCluster, tmp_path: Path) -> None:
    port = int(cluster.address.rpartition(":")[2])
    with tls_front(port, tmp_path) as (address, certificate):
        untrusted = cluster.launch("jobs", "list", "--address", address)
        assert "a certificate that is not trusted" in one_line(untrusted)
        trusted = cluster.launch(
            "submit", "--address", address, "--ca-file", str(certificate), "--follow", "doctor"
        )
        assert trusted.returncode in (0, 1), trusted.stderr
        assert "rairl doctor" in trusted.stdout, "the log came through a websocket over TLS"
        by_variable = cluster.launch("jobs", "list", "--address", address, REQUESTS_CA_BUNDLE=str(certificate))
        assert by_variable.returncode == 0 and "doctor" in by_variable.stdout
