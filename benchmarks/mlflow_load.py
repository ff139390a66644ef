"""What a sweep's runs ask of an MLflow server, and whether the server answers slower the more of them it has.

Usage: python -m benchmarks.mlflow_load [--trials 500] [--at-once 8] [--steps 60] [--metrics 40] [--block 50]
       [--json FILE]

Trials are runs as far as MLflow hears of them: their tracker (tracking/) sends a configuration, a row of
`--metrics` metrics for each of `--steps` steps, two tables and a report of three files, and closes the run.
No step takes any time, so the server hears in seconds what real trials say in hours. `--at-once` processes run
them one after the other, below one parent, against one `mlflow server` over SQLite with one worker. Meanwhile
somebody asks as its pages do: for the newest 50 trials of the parent, and for a run. Prints one JSON object:
for each `--block` of trials that ended one after the other, medians and extremes of a trial's seconds, of those
two questions and of the requests of a trial, and `last_over_first`, the ratios of the last block to the first.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.shared import ROOT, finish, free_port, spread
from rairl_ray.config.load import load_config
from rairl_ray.keys import keyed_random
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.ledger import PARENT
from rairl_ray.tracking.mlflow_run import import_mlflow
from rairl_ray.tracking.tracker import Tracker

BASE = ROOT / "experiments/demo/airl.yaml"
EXPERIMENT = "load"


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """An `mlflow server` of its own on loopback."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder}/server.db"),
        *("--artifacts-destination", f"{folder}/artifacts"),
    ]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def client_of(uri: str, patience: float = 240.0) -> Any:
    """A client of a server that answers by then."""
    import_mlflow()
    from mlflow import MlflowClient

    client, deadline = MlflowClient(uri), time.monotonic() + patience
    while True:
        try:
            client.search_experiments(max_results=1)
            return client
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def count_requests() -> list[int]:
    """A counter, the only element, of this process's requests from now on."""
    import requests

    counted, real = [0], requests.Session.send

    def send(self: Any, *arguments: Any, **named: Any) -> Any:
        counted[0] += 1
        return real(self, *arguments, **named)

    requests.Session.send = send  # type: ignore[method-assign]
    return counted


def trial(number: int, place: str, uri: str, parent: str, steps: int, metrics: int) -> tuple[float, str | None]:
    """One run, as far as MLflow hears of it: its seconds, and its id."""
    begin, draw = time.perf_counter(), keyed_random("load", number)
    words = [
        f"output_dir={place}",
        f"name=t{number}",
        f"tracking.uri={uri}",
        f"tracking.experiment={EXPERIMENT}",
    ]
    config = load_config(BASE, [*words, "tracking.flush_seconds=600", "warm_start=null"])
    folder = RunFolder(Path(place) / config.name)
    folder.create()
    report = folder.root / "report"
    report.mkdir()
    for name in ("table.md", "table.csv", "page.html"):
        (report / name).write_text(f"{number}\n" * 1000)
    warnings: list[str] = []
    tracker = Tracker(warn=warnings.append)
    tracker.start(config, folder.root, tags={PARENT: parent, "rairl.trial": config.name})
    for step in range(steps):
        tracker.log({f"part/metric_{i}": draw.random() for i in range(metrics)}, step)
    for name in ("first", "last"):
        tracker.log_table([{"prompt": "p" * 200, "text": "t" * 500, "reward": 0.5}] * 16, f"rollouts/{name}")
    tracker.log_artifacts(report)
    tracker.finish("FINISHED")
    if warnings:
        raise SystemExit(f"trial {number}: {warnings[0]}")
    return time.perf_counter() - begin, tracker.run_id


def work(numbers: Any, ended: Any, place: str, uri: str, parent: str, steps: int, metrics: int) -> None:
    """Run trials until there is none left."""
    counted = count_requests()
    while (number := numbers.get()) is not None:
        before = counted[0]
        seconds, run_id = trial(number, place, uri, parent, steps, metrics)
        ended.put((time.perf_counter(), seconds, counted[0] - before, run_id))


class Visitor(threading.Thread):
    """Asks every half second as the server's pages do."""

    def __init__(self, uri: str, experiment: str, parent: str) -> None:
        super().__init__(daemon=True)
        self._client, self._experiment, self._parent = client_of(uri), experiment, parent
        self.asked: list[tuple[float, float, float]] = []
        """(when, seconds of the newest 50 trials, seconds of one run)"""
        self.over = threading.Event()

    def run(self) -> None:
        wanted = f"tags.`{PARENT}` = '{self._parent}'"
        while not self.over.wait(0.5):
            begin = time.perf_counter()
            self._client.search_runs([self._experiment], wanted, max_results=50)
            middle = time.perf_counter()
            self._client.get_run(self._parent)
            end = time.perf_counter()
            self.asked.append((end, middle - begin, end - middle))


def load(arguments: argparse.Namespace, place: str, uri: str) -> dict[str, Any]:
    """All trials against a server; what was measured, block by block."""
    client = client_of(uri)
    experiment = client.create_experiment(EXPERIMENT)
    parent = client.create_run(experiment, run_name="parent").info.run_id
    context = multiprocessing.get_context("spawn")
    numbers, ended = context.Queue(), context.Queue()
    for number in [*range(arguments.trials), *[None] * arguments.at_once]:
        numbers.put(number)
    settings = (numbers, ended, place, uri, parent, arguments.steps, arguments.metrics)
    workers = [context.Process(target=work, args=settings) for _ in range(arguments.at_once)]
    visitor = Visitor(uri, experiment, parent)
    visitor.start()
    for worker in workers:
        worker.start()
    rows: list[tuple[float, float, int, str]] = []
    while len(rows) < arguments.trials:
        rows.append(ended.get(timeout=1200))
    visitor.over.set()
    visitor.join()
    check(client, experiment, rows, arguments)
    return {"blocks": blocks(rows, visitor.asked, arguments.block)}


def check(client: Any, experiment: str, rows: Sequence[Any], arguments: argparse.Namespace) -> None:
    """Every run is there once and FINISHED, some twenty have all their steps; else nothing was measured."""
    found: list[Any] = []
    token = None
    while token is None or token:
        page = client.search_runs([experiment], "attributes.status = 'FINISHED'", page_token=token)
        found, token = [*found, *page], page.token or ""
    assert sorted(run.info.run_id for run in found) == sorted(row[3] for row in rows)
    for row in rows[:: max(1, len(rows) // 20)]:
        history = client.get_metric_history(row[3], "part/metric_0")
        assert [metric.step for metric in history] == list(range(arguments.steps))


def blocks(
    rows: Sequence[tuple[float, float, int, Any]], asked: Sequence[tuple[float, float, float]], size: int
) -> list[dict[str, Any]]:
    """Trials, (when it ended, seconds, requests, id), and the questions asked meanwhile, in blocks by time."""
    rows = sorted(rows, key=lambda row: row[0])
    found, since = [], 0.0
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        until = part[-1][0]
        then = [row for row in asked if since < row[0] <= until]
        found.append(
            {
                "trials": first + len(part),
                "trial_seconds": spread([row[1] for row in part]),
                "requests": spread([row[2] for row in part]),
                **({"search_seconds": spread([row[1] for row in then])} if then else {}),
                **({"run_seconds": spread([row[2] for row in then])} if then else {}),
            }
        )
        since = until
    return found


def last_over_first(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Ratios of the medians of the last block to those of the first."""
    first, last = found[0], found[-1]
    return {key: last[key]["median"] / first[key]["median"] for key in first if key in last and key != "trials"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--metrics", type=int, default=40)
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, server(Path(name)) as uri:
        place = Path(name) / "runs"
        place.mkdir()
        measured = load(arguments, str(place), uri)
        database = (Path(name) / "server.db").stat().st_size / 1e6
    result = {
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        **measured,
        "last_over_first": last_over_first(measured["blocks"]),
        "database_megabytes": database,
    }
    finish(result, arguments.json)


if __name__ == "__main__":
    main()
