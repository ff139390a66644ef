"""`cluster/local.sh`: separate nodes on loopback behind a token, and nothing left afterwards."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rairl_ray.actors import joining
from rairl_ray.actors.joining import join, token_source
from rairl_ray.doctor import _unjoined
from rairl_ray.errors import PlacementError
from tests.local_cluster import free_ports, local, marked

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(not Path("/proc/self").exists(), reason="cluster/local.sh needs Linux's /proc")

ON_EACH_NODE = """
import os, sys, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as OnNode
from rairl_ray.config.load import load_config
from rairl_ray.trainer.worker_groups import cluster

@ray.remote(num_cpus=0)
def where():
    return ray.get_runtime_context().get_node_id(), os.environ["RAIRL_LOCAL_CLUSTER"]

with cluster(load_config("experiments/demo/airl.yaml", [f"cluster.address={sys.argv[1]}"])):
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}
    answers = ray.get([where.options(scheduling_strategy=OnNode(i, soft=False)).remote() for i in nodes])
    assert {node for node, _ in answers} == set(nodes) and len({mark for _, mark in answers}) == 1
    print("RESULT", sorted(n["Resources"].get("CPU", 0) for n in nodes.values()), len(answers))
    print("LABELS", *sorted(n["Labels"].get("market", "none") for n in nodes.values()))
"""


LABELLED = ["--labels", "market=on-demand", "--labels", "market=spot,zone=a"]


@pytest.fixture
def place() -> Iterator[tuple[Path, list[str]]]:
    """A short folder (sockets lie below it) and the options of a cluster there; down again at the end."""
    folder = Path(f"/tmp/rairl-t-{uuid.uuid4().hex[:8]}")
    first = free_ports()
    yield folder, ["--dir", str(folder), "--port", str(first), "--dashboard-port", str(first + 10)]
    local("down", "--dir", str(folder), "--port", str(first))
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}.log").unlink(missing_ok=True)


def driver(address: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-c", ON_EACH_NODE, address],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def holders_of(first: int) -> list[int]:
    """Processes that listen at one of the 100 ports from `first` on."""
    open_here = [c for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
    return sorted({c.pid for c in open_here if c.pid and c.laddr.port in range(first, first + 100)})


def doctor(address: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "launch.py", "doctor", "--address", address]
    answer = subprocess.run(
        command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, timeout=200
    )
    return answer.stdout


def check_tokens(address: str, token: Path) -> None:
    """Who has the token joins, who has not is told so in one line."""
    joined = driver(address, RAY_AUTH_TOKEN_PATH=str(token))
    assert "RESULT [0, 3.0, 3.0] 3" in joined.stdout, joined.stderr
    assert "LABELS none on-demand spot" in joined.stdout
    assert "3 CPU" in doctor(address, RAY_AUTH_TOKEN_PATH=str(token))
    wrong = token.with_name("wrong")
    wrong.write_text("0" * 64)
    for environment, named in (
        ({}, "without a token"),
        ({"RAY_AUTH_TOKEN_PATH": str(wrong)}, str(wrong)),
        ({"RAY_AUTH_TOKEN_PATH": "/no/such/file"}, "/no/such/file"),
    ):
        refused = driver(address, **environment)
        message = refused.stderr.strip().splitlines()[-1]
        assert refused.returncode and "PlacementError" in message and named in message, refused.stderr
        assert "set RAY_AUTH_TOKEN_PATH" in message and token.read_text() not in refused.stderr


@pytest.mark.slow
@pytest.mark.cluster
def test_a_cluster_comes_up_serves_who_has_its_token_and_leaves_nothing(place: tuple[Path, list[str]]) -> None:
    folder, options = place
    address = f"127.0.0.1:{options[3]}"
    up = local("up", "2", "--cpus", "3", *LABELLED, *options)
    assert up.returncode == 0, up.stderr
    assert address in up.stdout and f"source {folder}/env" in up.stdout
    assert (folder / "token").stat().st_mode & 0o777 == 0o600
    assert (folder / "token").read_text() not in up.stdout

    processes = marked(folder)
    raylets = [process for process in processes if process.name() == "raylet"]
    assert len(raylets) == 3
    listening = {c.laddr.ip for p in processes for c in p.net_connections("tcp") if c.status == "LISTEN"}
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, listening
    # Ray's agents too bear the cluster's mark, though they give themselves titles.
    ours = {process.pid for process in processes}
    holders = holders_of(int(options[3]))
    assert len(holders) >= 3 * 3 and set(holders) <= ours, [psutil.Process(pid).cmdline() for pid in holders]

    check_tokens(address, folder / "token")

    again = local("up", "1", *options)
    assert again.returncode == 2 and "is up" in again.stderr and again.stderr.count("\n") == 1
    status = local("status", *options)
    assert status.returncode == 0 and "2 workers" in status.stdout and "0.0/6.0 CPU" in status.stdout
    # Somebody else's script, with a folder of its own, does not end it.
    foreign = local("down", "--dir", "/tmp/rairl-none", "--port", options[3])
    assert foreign.returncode == 2 and "not started by this script" in foreign.stderr
    assert foreign.stderr.count("\n") == 1 and len(marked(folder)) == len(processes)

    down = local("down", "--dir", str(folder))
    assert down.returncode == 0, down.stderr
    assert not marked(folder) and not folder.exists() and not holders_of(int(options[3]))
    assert local("status", *options).returncode == 1
    assert local("down", *options).returncode == 0


def test_an_address_where_nothing_listens_is_refused_at_once() -> None:
    address = f"127.0.0.1:{free_ports()}"
    with pytest.raises(
        PlacementError, match=f"cluster.address={address}: no Ray cluster answers there"
    ) as caught:
        join(address)
    assert "\n" not in str(caught.value) and "cluster/local.sh up" in str(caught.value)


GAVE_UP = "Failed to connect to GCS. Last connection error: Traceback (most recent call last):\n  ...\n"
REFUSED = f"{GAVE_UP}AuthenticationError: InvalidAuthToken: Authentication token is missing or incorrect"


@pytest.mark.parametrize(
    ("token", "cause", "said", "remedy"),
    [
        (
            None,
            REFUSED,
            "the Ray cluster there asks for a token, and this is a driver without a token",
            "TOKEN_PATH",
        ),
        ("0" * 64, REFUSED, "the Ray cluster there does not accept the token in RAY_AUTH_TOKEN", "TOKEN_PATH"),
        (None, f"{GAVE_UP}RpcError: Unauthenticated", "asks for a token, and this is", "TOKEN_PATH"),
        (
            None,
            f"{GAVE_UP}RpcError: Deadline Exceeded",
            "does not accept a driver without a token as a",
            "TOKEN_PATH",
        ),
    ],
    ids=["missing", "wrong", "missing, another wording", "another program"],
)
def test_a_token_that_is_missing_or_wrong_is_told_as_such(
    token: str | None, cause: str, said: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error that Ray raises after its retries, with what the head answered in its cause."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if token is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)

    def init(address: str, **_: object) -> None:
        raise ConnectionError(f"Failed to connect to Ray cluster at {address}") from RuntimeError(cause)

    monkeypatch.setattr(joining.ray, "init", init)
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        address = f"127.0.0.1:{somebody.getsockname()[1]}"
        with pytest.raises(PlacementError) as refused:
            join(address)
    line = str(refused.value)
    assert line.startswith(f"cluster.address={address}: ") and said in line and remedy in line
    assert "\n" not in line and "no Ray cluster answers" not in line and (token is None or token not in line)
    finding = _unjoined(address, f"rairl_ray.errors.PlacementError: {line}")
    assert said in finding.value and remedy in finding.remedy and "check the address" not in finding.remedy


def test_no_cluster_for_auto_is_no_matter_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to.")

    monkeypatch.setattr(joining.ray, "init", init)
    with pytest.raises(PlacementError, match=r"no Ray cluster was found .*cluster/local\.sh up") as refused:
        join("auto")
    assert "token" not in str(refused.value).lower()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "a driver without a token"),
        (
            {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "abc"},
            "a driver without a token (RAY_AUTH_MODE=disabled)",
        ),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "abc"}, "the token in RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t"}, "the token in /t"),
        ({"RAY_AUTH_MODE": "token"}, "the token in ~/.ray/auth_token"),
    ],
)
def test_a_refusal_says_where_the_token_was_from(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert token_source() == said


def test_ports_in_use_are_named_before_anything_starts(place: tuple[Path, list[str]]) -> None:
    folder, options = place
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(options[3]) + 33))
        taken.listen()
        result = local("up", *options)
    assert result.returncode == 2 and str(int(options[3]) + 33) in result.stderr
    assert result.stderr.count("\n") == 1 and not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["sideways"], "sideways"),
        (["up", "two"], "two"),
        (["up", "0"], "at least 1 worker"),
        (["up", "--gpus", "64"], "--gpus 64"),
        (["up", "--cpus"], "--cpus"),
        (["up", "--speed", "9"], "--speed"),
        (["up", "--labels", "spot"], "--labels 'spot'; write KEY=VALUE"),
        (["up", "--dir", "/tmp/" + "x" * 60], "longer"),
        (["up", "--port", "65530"], "655"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], named: str) -> None:
    result = local(*arguments)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and named in result.stderr, result.stderr


def test_a_head_without_redis_is_not_killed(place: tuple[Path, list[str]]) -> None:
    folder, options = place
    folder.mkdir()
    (folder / "state").write_text(f"port={options[3]}\nworkers=1\nredis=no\nmark={folder}:none\n")
    result = local("kill", "0", *options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "cluster would end with it" in result.stderr and "up --redis" in result.stderr
    assert "the workers are 1 to 1, the head is 0" in local("kill", "2", *options).stderr


def test_redis_is_asked_for_where_there_is_none(
    place: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("bash", "dirname", "realpath"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path))
    result = local("up", "1", "--redis", *place[1])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "--redis: no redis-server here" in result.stderr and not place[0].exists()
