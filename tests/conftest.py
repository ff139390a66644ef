"""Fixtures shared by all tests."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # a busy neighbour is no fault of the code
settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parents[1]
TESTER = "RAIRL_TESTER"
"""A variable that all processes of this one inherit, also those that are no children of it."""
os.environ[TESTER] = str(os.getpid())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with time limits of their own, then those with slow tests: short ones fill both cores' end."""
    long, slow = (
        {item.path for item in items if item.get_closest_marker(mark)} for mark in ("timeout", "slow")
    )
    items.sort(key=lambda item: (item.path not in long, item.path not in slow))


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector of cycles need not go through it. One thread computes."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)
    # Two tests on two cores: threads that wait for each other spin there, for up to twenty times as long.
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real datasets beside the project; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real datasets in ../shared/data, which are not here")
    return folder


@pytest.fixture(scope="session")
def shared_faults() -> Path:
    """Folder of faults that were found, as small inputs; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "faults"
    if not folder.is_dir():
        pytest.skip("needs the collected faults in ../shared/faults, which are not here")
    return folder


def warm_folder(owner: int) -> Path:
    """Where the fork servers of a test session are; `owner` is its main process."""
    return Path(tempfile.gettempdir()) / f"rairl-warm-{os.getuid()}-{owner}"


def pytest_unconfigure() -> None:
    """The main process's folder goes with it; its servers look for it every few seconds."""
    shutil.rmtree(warm_folder(os.getpid()), ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def warm_actors(request: pytest.FixtureRequest) -> Iterator[None]:
    """Drivers, Ray's workers and its daemons are forks of processes that have their imports (tests/warm).

    Files with the mark `cold` or `cluster`, and all of them with RAIRL_COLD=1 or without Linux's /proc, let
    each begin by itself, as it does for users.
    """
    cold = os.environ.get("RAIRL_COLD") or not Path("/proc/self/ns").is_dir()
    if cold or any(map(request.node.get_closest_marker, ("cold", "cluster"))):
        yield
        return
    owner = os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid()
    folder = warm_folder(owner)
    folder.mkdir(mode=0o700, exist_ok=True)
    path = os.pathsep.join(filter(None, (str(ROOT / "tests" / "warm"), os.environ.get("PYTHONPATH"))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAIRL_WARM", str(folder))
        patch.setenv("RAIRL_WARM_OWNER", str(owner))
        patch.setenv("PYTHONPATH", path)
        yield


@pytest.fixture(scope="module")
def one_cluster(warm_actors: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One private Ray, which all runs of a file join."""
    from rairl_ray.trainer.worker_groups import cluster
    from tests.inprocess import config_of

    with cluster(config_of("grpo", tmp_path_factory.mktemp("cluster"))):
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of reports are empty files: drawing takes seconds, and other tests look at what is drawn."""
    monkeypatch.setattr("rairl_ray.report.page.image", lambda figure, kind: b"")


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Address of a real S3 server, one for all tests of a process."""
    from tests.s3_server import s3_server

    with s3_server() as address:
        yield address


@pytest.fixture
def uri(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A remote `output_dir` of this test alone, with credentials and a staging folder in the environment."""
    from rairl_ray import mirror
    from rairl_ray.storage import STAGING_ENV
    from tests.remote_runs import SECRET
    from tests.s3_server import BUCKET

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv(STAGING_ENV, str(tmp_path / "staging"))
    monkeypatch.setattr(mirror, "PAUSE_SECONDS", 0.2)
    return f"s3://{BUCKET}/{abs(hash(request.node.nodeid))}"
