"""What can be known about GPU runs without a GPU: who sees which device, environments, what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from rairl_ray.actors.group import RankActor, create_processes, reserve, start_processes
from rairl_ray.actors.placement import bundles
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.actors.rollout_actor import RolloutActor
from rairl_ray.config.load import from_dict
from rairl_ray.config.schema import Build, Model, RunConfig
from rairl_ray.engines.hf_engine import HfEngine
from rairl_ray.engines.models import resolve_model
from rairl_ray.engines.rollout_engine import EngineOptions, GenerationRequest, SamplingSettings
from rairl_ray.errors import ConfigError
from rairl_ray.trainer.prepare import check_machine


def make(**sections: Any) -> RunConfig:
    return from_dict({"model": {"policy": {"path": "some/model"}}, **sections})


# --- who sees which device: Ray counts and hides GPUs that it is told of, whether they are there or not ---


@pytest.fixture(scope="module")
def four_gpus() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=16, num_gpus=4, include_dashboard=False, log_to_driver=False,
        logging_level="ERROR",
    )  # fmt: skip
    yield
    ray.shutdown()


def looker() -> type[RankActor]:
    """A class that travels by value, so that its processes do not import this file."""

    class Looker(RankActor):
        def visible(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    return Looker


def devices(config: RunConfig) -> dict[str, list[str]]:
    """Role -> CUDA_VISIBLE_DEVICES of each of its ranks, as the run's own start gives them."""
    plan, monitor = bundles(config, "gpu"), ProcessMonitor(probe_seconds=30)
    try:
        monitor.groups.append(reserve(plan, 60))
        created = {role: create_processes(role, looker(), plan, monitor, {}, ()) for role in plan.roles}
        started = start_processes(created, monitor, 300)
        return {
            role: ray.get([process.handle.visible.remote() for process in processes], timeout=60)
            for role, processes in started.items()
        }
    finally:
        monitor.end(60)


def test_colocated_ranks_see_the_gpu_of_their_bundle(four_gpus: None) -> None:
    """Rank i of every role on GPU i: one rank of each NCCL group a device, and the engine beside both."""
    seen = devices(make(rollout={"replicas": 4}, learner={"replicas": 4, "discriminator_replicas": 2}))
    assert sorted(seen["policy"]) == ["0", "1", "2", "3"]
    assert seen["rollout"] == seen["policy"]
    assert seen["discriminator"] == seen["policy"][:2]


def test_disaggregated_ranks_own_their_gpu(four_gpus: None) -> None:
    config = make(
        rollout={"replicas": 1},
        learner={"replicas": 2, "discriminator_replicas": 1},
        placement={"type": "disaggregated"},
    )
    seen = devices(config)
    assert sorted(gpu for gpus in seen.values() for gpu in gpus) == ["0", "1", "2", "3"]


def test_a_tensor_parallel_engine_sees_all_its_gpus(four_gpus: None) -> None:
    seen = devices(make(rollout={"tensor_parallel": 2}, learner={"replicas": 2}))
    (engine,) = seen["rollout"]
    assert sorted([*engine.split(","), *seen["policy"]]) == ["0", "1", "2", "3"]
    assert seen["discriminator"] == seen["policy"]


@pytest.mark.slow
def test_sft_ranks_get_a_gpu_each_beside_the_engine(four_gpus: None, tmp_path: Path) -> None:
    """By Ray Train, with what `trainer/sft.py` asks of it, while the evaluation engine holds its share."""
    plan = bundles(make(algorithm={"type": "sft"}, learner={"replicas": 4}), "gpu")

    def worker(settings: dict[str, str]) -> None:
        rank = ray.train.get_context().get_world_rank()
        Path(settings["folder"], f"{rank}.json").write_text(json.dumps(ray.get_gpu_ids()))

    engine = (
        ray.remote(looker()).options(num_cpus=0, num_gpus=plan.roles["rollout"][0].resources["GPU"]).remote(0)
    )
    ray.get(engine.visible.remote(), timeout=60)
    DataParallelTrainer(
        worker,
        train_loop_config={"folder": str(tmp_path)},
        scaling_config=ScalingConfig(
            num_workers=4, use_gpu=True, resources_per_worker=dict(plan.roles["policy"][0].resources)
        ),
        run_config=ray.train.RunConfig(name="placement", storage_path=str(tmp_path / "ray_train")),
    ).fit()
    ray.kill(engine)
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert sorted(str(gpu) for (gpu,) in seen) == ["0", "1", "2", "3"]


# --- what processes are told before they start -------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_collective_past_its_deadline_ends_the_process(device: str) -> None:
    """Even where the machine's environment says to block or to ignore."""
    code = (
        "import os; from rairl_ray.engines.environment import setup_environment;"
        f"setup_environment(1, 2, 'host', 1, {device!r});"
        "print(os.environ['TORCH_NCCL_ASYNC_ERROR_HANDLING'], os.environ['TORCH_NCCL_BLOCKING_WAIT'],"
        " os.environ['DS_ACCELERATOR'], os.environ['LOCAL_RANK'])"
    )
    inherited = {**os.environ, "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_BLOCKING_WAIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=inherited, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == (["1", "0", "cuda", "0"] if device == "cuda" else ["0", "1", "cpu", "0"])


# --- sleep -------------------------------------------------------------------------------------------------


class Sleeper(HfEngine):
    """The real engine, which on a CPU has nothing to give back, noting what is asked of it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: list[str] = []

    def generate(self, *arguments: Any) -> Any:
        self.asked.append("generate")
        return super().generate(*arguments)

    def sleep(self) -> None:
        self.asked.append("sleep")


def test_an_engine_sleeps_while_the_learners_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its start, and again after each sampling, before the driver goes on."""
    build = Build(hidden_size=64, layers=1, heads=2, intermediate_size=64, max_length=64)
    path = resolve_model(Model(build=build), role="policy", cache_dir=tmp_path, seed=0)
    opened = EngineOptions(model_path=path, eos_id=2, max_prompt_tokens=8, max_completion_tokens=4, sleep=True)
    engine = Sleeper(opened, lambda _ids: "")
    monkeypatch.setattr("rairl_ray.actors.rollout_actor.open_engine", lambda *_arguments: engine)
    actor = RolloutActor(0, make(), path, "cpu")
    actor.open()
    actor.serve_disk_weights()
    actor.generate([GenerationRequest(prompt_ids=(5, 6), seed=1)], SamplingSettings(max_tokens=2))
    assert engine.asked == ["sleep", "generate", "sleep"]


# --- what is refused before an actor starts ----------------------------------------------------------------

NF4 = {"path": "some/model", "quantization": "nf4", "dtype": "bfloat16", "lora": {"rank": 4}}


def test_the_clusters_answer_is_checked_before_actors_start() -> None:
    config = make(model={"policy": NF4})
    with pytest.raises(
        ConfigError, match=r"^on this cluster \(cpu\): model\.policy\.quantization=nf4: needs a GPU"
    ):
        check_machine(config, "cpu")
    check_machine(make(), "gpu")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    absent = ("bitsandbytes", "flash_attn")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    with pytest.raises(ConfigError, match=r"model\.policy\.quantization=nf4: .*pip install bitsandbytes"):
        check_machine(make(model={"policy": NF4}), "gpu")
    flash = {"attention": "flash_attention_2", "dtype": "bfloat16"}
    config = make(model={"policy": {"path": "some/model"}, "discriminator": flash})
    with pytest.raises(ConfigError, match=r"model\.discriminator\.attention=.*pip install flash-attn"):
        check_machine(config, "gpu")
    check_machine(config.model_copy(update={"algorithm": make(algorithm={"type": "sft"}).algorithm}), "gpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    check_machine(make(model={"policy": NF4}), "gpu")
