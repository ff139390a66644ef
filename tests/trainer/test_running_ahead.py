"""Rollouts that run ahead of the learners: versions, exactness, overlap, what is too old, rescoring."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rairl_ray import metrics as names
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.actors.rollout import PendingGroups, PendingSync, Sampled
from rairl_ray.actors.weight_sync import WeightUpdate
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError
from rairl_ray.metrics import PhaseTimer
from rairl_ray.trainer.grpo import GrpoStrategy
from rairl_ray.trainer.loop import policy_batches
from rairl_ray.trainer.prepare import Prepared, prepare
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.trainer.rollout_buffer import RolloutBuffer
from rairl_ray.trainer.worker_groups import WorkerGroups, place, start_worker_groups
from tests.inprocess import config_of, differing, killed_after, mediocre, moved, rows_of, run

AHEAD = (
    "trainer.max_staleness_steps=2",
    "trainer.steps=5",
    "trainer.checkpoint_every=2",
    "trainer.keep_checkpoints=9",
    "policy.learning_rate=0.005",
)


pytestmark = pytest.mark.usefixtures("one_cluster")


@pytest.fixture(scope="module")
def ahead_run(one_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = config_of("airl", tmp_path_factory.mktemp("ahead"), *AHEAD)
    run(config)
    return config


def trained(config: RunConfig) -> list[dict[str, float]]:
    return [row for row in rows_of(config) if names.POLICY_LOSS in row]


def test_samples_are_as_old_as_the_bound_says_and_no_older(ahead_run: RunConfig) -> None:
    assert [row[names.ROLLOUT_STALENESS] for row in trained(ahead_run)] == [0, 1, 2, 2, 2]
    folder = Path(ahead_run.output_dir) / ahead_run.name / "rollouts"
    for step in range(1, 6):
        lines = (folder / f"step-{step:06d}.jsonl").read_text().splitlines()
        assert {json.loads(line)["policy_version"] for line in lines} == {max(0, step - 1 - 2)}


def test_older_samples_are_corrected_by_their_own_log_probabilities(ahead_run: RunConfig) -> None:
    weights = [row[names.POLICY_IMPORTANCE_WEIGHT] for row in trained(ahead_run)]
    assert weights[0] == pytest.approx(1.0, abs=1e-4)  # the policy that is trained sampled them
    assert all(abs(weight - 1.0) > 1e-4 for weight in weights[1:])


@pytest.mark.parametrize("checkpoint", [2, 4])
def test_a_resume_keeps_the_buffer_and_repeats_the_run_bit_for_bit(
    ahead_run: RunConfig, checkpoint: int, tmp_path: Path
) -> None:
    assert differing(rows_of(ahead_run), run(killed_after(ahead_run, checkpoint, tmp_path), resume=True)) == []


def test_without_staleness_it_is_the_plain_synchronous_run(tmp_path: Path) -> None:
    more = ("data.limit=8", "trainer.steps=3", "policy.minibatches_per_step=2", *mediocre())
    config = config_of("grpo", tmp_path, *more)
    logged = [row for row in run(config) if names.POLICY_LOSS in row]
    assert moved(logged) and [row[names.ROLLOUT_STALENESS] for row in logged] == [0, 0, 0]
    prepared = prepare(config)
    with workers_of(prepared) as workers:
        plain = list(synchronous_losses(prepared, workers))
    assert plain == [(row[names.POLICY_LOSS], row[names.POLICY_GRAD_NORM]) for row in logged]


@contextmanager
def workers_of(prepared: Prepared) -> Iterator[WorkerGroups]:
    monitor = ProcessMonitor(probe_seconds=30)
    try:
        yield start_worker_groups(prepared, place(prepared.config), monitor, Path(prepared.config.output_dir))
    finally:
        monitor.end(60)


def synchronous_losses(prepared: Prepared, workers: WorkerGroups) -> Iterator[tuple[float, float]]:
    """GRPO written down as sample, reward, update, sync: what n = 0 must equal."""
    config = prepared.config
    assert workers.policy is not None
    workers.rollouts.open()
    workers.policy.open(config.trainer.steps * config.policy.minibatches_per_step)
    sampler = PromptSampler(prepared.task, config.seed)
    strategy = GrpoStrategy(prepared.task, prepared.policy_renderer)
    for step in range(1, config.trainer.steps + 1):
        workers.rollouts.sync(workers.policy.weights(workers.rollouts.processes))
        prompts = sampler.next_prompts(config.trainer.prompts_per_step)
        groups = workers.rollouts.generate(prompts, f"train/{step}")
        rewarded, _ = strategy.score(groups, PhaseTimer())
        result = workers.policy.update(policy_batches(rewarded, config, step))
        yield result.metrics[names.POLICY_LOSS], result.metrics[names.POLICY_GRAD_NORM]


class Recorder:
    """The real rollout group, with a note of what it is given and what is waited for."""

    def __init__(self, workers: Any) -> None:
        self.workers = workers
        self.notes: list[str] = []

    def start(self, prompts: Any, stream: str) -> PendingGroups:
        self.notes.append(f"start {stream}")
        return self.workers.start(prompts, stream)

    def collect(self, started: PendingGroups) -> Sampled:
        self.notes.append("collect")
        return self.workers.collect(started)

    def start_sync(self, update: WeightUpdate, check: Any) -> PendingSync:
        self.notes.append(f"start sync {update.version}")
        return self.workers.start_sync(update, check)

    def finish_sync(self, started: PendingSync) -> list[list[list[float]]]:
        self.notes.append(f"finish sync {started.update.version}")
        return self.workers.finish_sync(started)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prepared, WorkerGroups]]:
    prepared = prepare(config_of("grpo", tmp_path_factory.mktemp("replicas"), *AHEAD))
    with workers_of(prepared) as workers:
        assert workers.policy is not None
        workers.rollouts.open()
        workers.policy.open(5)
        yield prepared, workers


def version(workers: WorkerGroups, number: int) -> WeightUpdate:
    """The learner's weights under any version number."""
    assert workers.policy is not None
    return replace(workers.policy.weights(workers.rollouts.processes), version=number)


def buffer_of(replicas: tuple[Prepared, WorkerGroups]) -> tuple[RolloutBuffer, Recorder, WorkerGroups]:
    prepared, workers = replicas
    recorder = Recorder(workers.rollouts)
    sampler = PromptSampler(prepared.task, prepared.config.seed, ahead=2)
    buffer = RolloutBuffer(prepared.config, sampler, recorder)  # type: ignore[arg-type]
    return buffer, recorder, workers


def test_later_steps_are_sampled_beside_the_learners_and_a_sync_waits_its_turn(
    replicas: tuple[Prepared, WorkerGroups],
) -> None:
    buffer, recorder, workers = buffer_of(replicas)
    buffer.sync(version(workers, 0))
    buffer.get(1)
    buffer.sync(version(workers, 1))  # learners of step 1 are done; steps 2 and 3 are still being sampled
    buffer.get(2)
    buffer.sync(version(workers, 2))
    buffer.get(3)
    taken = buffer.get(4)
    assert recorder.notes == [
        "start sync 0", "finish sync 0",
        "start train/1", "start train/2", "start train/3", "collect",
        "start sync 1", "start train/4", "collect",
        "start sync 2", "start train/5", "collect",
        "finish sync 1", "collect",
    ]  # fmt: skip
    assert {r.policy_version for group in taken.groups for r in group.rollouts} == {1}
    buffer.drain()


def test_what_is_too_old_is_dropped_and_counted_or_sampled_again(
    replicas: tuple[Prepared, WorkerGroups],
) -> None:
    buffer, _, workers = buffer_of(replicas)
    buffer.sync(version(workers, 6))
    buffer.get(1)
    buffer.drain()
    state = buffer.state()
    later, latest = state["steps"]
    later["step"], latest["step"] = 3, 4
    for row in later["groups"][0]:
        row["policy_version"] = -1
    for group in latest["groups"]:
        for row in group:
            row["policy_version"] = 0
    other, recorder, _ = buffer_of(replicas)
    other.restore(json.loads(json.dumps(state)))
    taken = other.get(3)
    assert taken.dropped_groups == 1 and len(taken.groups) == 3
    again = other.get(4)
    assert again.dropped_groups == 4 and len(again.groups) == 4
    assert {r.policy_version for group in again.groups for r in group.rollouts} == {6}
    assert recorder.notes[-2:] == ["start train/4", "collect"]
    other.drain()


def test_rescoring_logs_how_far_the_discriminator_moved_and_changes_nothing_else(
    ahead_run: RunConfig, tmp_path: Path
) -> None:
    rescored = run(config_of("airl", tmp_path / "rescored", *AHEAD, "reward.rescore=true"))
    drifts = [row.pop(names.REWARD_DRIFT) for row in rescored if names.POLICY_LOSS in row]
    assert len(drifts) == 5 and all(drift > 0 for drift in drifts)
    assert differing(rows_of(ahead_run), rescored) == []
    frozen = run(
        config_of("airl", tmp_path / "frozen", "reward.rescore=true", "discriminator.updates_per_policy_step=0")
    )
    assert [row[names.REWARD_DRIFT] for row in frozen if names.POLICY_LOSS in row] == [0.0, 0.0]


def test_a_sleeping_engine_cannot_run_ahead(tmp_path: Path) -> None:
    sleeping = ("rollout.engine=vllm", "rollout.sleep=true", "placement.device=gpu")
    with pytest.raises(ConfigError, match=r"trainer\.max_staleness_steps=1: .*rollout\.sleep=false"):
        config_of("airl", tmp_path, "trainer.max_staleness_steps=1", *sleeping)
