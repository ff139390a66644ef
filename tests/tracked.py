"""What the tests of tracking share: a small configuration, and what MLflow has of a run."""

from __future__ import annotations

import functools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import ViewType

from rairl_ray.config.load import dump_yaml
from rairl_ray.config.schema import RunConfig

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


def config(output: Path, uri: str | None = None, flush: float = 120, **changes: Any) -> RunConfig:
    tracking = {"uri": uri, "flush_seconds": flush, "experiment": changes.pop("experiment", "rairl")}
    values = {"name": "t", "output_dir": str(output), "tracking": tracking, **changes}
    return RunConfig.model_validate(values)


@functools.cache
def empty_database() -> bytes:
    """MLflow's database without runs; to make the tables takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        sqlite(Path(folder)).search_experiments(max_results=1)
        return (Path(folder) / "mlflow.db").read_bytes()


def run_folder(run_config: RunConfig) -> Path:
    """The run folder as `train` makes it, as far as tracking looks at it."""
    folder = Path(run_config.output_dir) / run_config.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_yaml(run_config))
    return folder


def history(client: MlflowClient, run_id: str | None, name: str) -> list[tuple[int, float]]:
    assert run_id is not None
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def table(client: MlflowClient, run_id: str | None, name: str) -> pd.DataFrame:
    assert run_id is not None
    listed = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert [entry["type"] for entry in listed if entry["path"] == name] == ["table"]
    return pd.read_json(client.download_artifacts(run_id, name), orient="split")


def sqlite(output: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{output / 'mlflow.db'}")


def runs(client: MlflowClient, experiment: str = "rairl", deleted: bool = False) -> dict[str, str]:
    """Id -> status of the experiment's runs."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return {}
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    listed = client.search_runs([found.experiment_id], run_view_type=view)
    return {run.info.run_id: run.info.status for run in listed}


def eventually(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """The first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)
    return answer
