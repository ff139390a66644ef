"""What a sync proves, through real Ray actors, DeepSpeed and rollout engines: nothing but the learner's weights
is ever served. The `hf` engine here, vLLM under `slow`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from rairl_ray import metrics as names
from rairl_ray.actors.group import ActorProcess, GroupFailure
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.actors.rollout_actor import RolloutActor
from rairl_ray.actors.weight_sync import EngineClient, WeightUpdate, fetched
from rairl_ray.config.load import load_config
from rairl_ray.engines.weights import checksum, pack, whole
from rairl_ray.metrics import PhaseTimer
from rairl_ray.trainer.grpo import GrpoStrategy
from rairl_ray.trainer.loop import Loop
from rairl_ray.trainer.prepare import Prepared, prepare
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.trainer.sync_check import samples_tell
from rairl_ray.trainer.worker_groups import WorkerGroups, cluster, place, start_worker_groups
from rairl_ray.types import RewardedTrace
from tests.runs import ROOT, TINY

Chunk = dict[str, torch.Tensor]

SMALL = [
    "rollout.sync_check_every=1",
    *TINY,
    "warm_start=null",
    "tracking.uri=none",
    "rollout.replicas=2",
    "placement.cpus_per_actor=0.1",
    "policy.learning_rate=0.01",
    "policy.warmup_ratio=0",
    "policy.schedule=constant",
    "trainer.steps=100",
]


class EvenTokens(GrpoStrategy):
    """Rewards the share of even token ids: unlike right answers, an untrained policy has something to learn."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.task, prepared.policy_renderer)

    def score(self, groups: Any, timer: PhaseTimer) -> Any:
        rewarded, metrics = super().score(groups, timer)
        return [[even(trace) for trace in traces] for traces in rewarded], metrics


def even(trace: RewardedTrace) -> RewardedTrace:
    share = sum(1 - token % 2 for token in trace.tokens.completion_ids) / len(trace.tokens.completion_ids)
    rewards = np.full_like(trace.token_rewards, share)
    return dataclasses.replace(trace, token_rewards=rewards, last_unit_reward=share)


@dataclasses.dataclass
class Machine:
    """A run's workers and its loop, without the run."""

    prepared: Prepared
    workers: WorkerGroups
    loop: Loop
    sampler: PromptSampler

    def step(self, number: int) -> dict[str, float]:
        return self.loop.step(number, PhaseTimer())[0]


def started(output: Path, *overrides: str) -> Machine:
    config = load_config(ROOT / "experiments/demo/grpo.yaml", [*SMALL, f"output_dir={output}", *overrides])
    prepared = prepare(config)
    workers = start_worker_groups(prepared, place(config), ProcessMonitor(probe_seconds=30), output)
    workers.rollouts.open()
    assert workers.policy is not None
    workers.policy.open(10)
    sampler, strategy = PromptSampler(prepared.task, config.seed), EvenTokens(prepared)
    loop = Loop(config, sampler, workers.rollouts, workers.policy, strategy)
    return Machine(prepared, workers, loop, sampler)


@pytest.fixture(scope="module")
def joined() -> Iterator[None]:
    with cluster(load_config(ROOT / "experiments/demo/grpo.yaml", SMALL)):
        yield


@pytest.fixture(scope="module", params=["full", "merged"])
def machine(request: Any, joined: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    rank = "null" if request.param == "full" else "4"
    machine = started(tmp_path_factory.mktemp(request.param), f"model.policy.lora.rank={rank}")
    yield machine
    machine.workers.monitor.end(60)


def assert_stale(machine: Machine) -> None:
    prompts = machine.sampler.next_prompts(1)
    with pytest.raises(GroupFailure, match=r"rollout rank . .* no policy version yet"):
        machine.workers.rollouts.generate(prompts, "stale")


def test_an_engine_serves_nothing_before_its_sync_and_nothing_after_it_was_opened_anew(
    machine: Machine,
) -> None:
    assert_stale(machine)
    machine.loop.sync()
    prompts = machine.sampler.next_prompts(2)
    groups = machine.workers.rollouts.generate(prompts, "fresh")
    assert {rollout.policy_version for group in groups for rollout in group.rollouts} == {0}
    machine.workers.rollouts.open()
    assert_stale(machine)
    machine.loop.sync()


def test_learner_and_engines_agree_step_after_step(machine: Machine) -> None:
    """And the metrics say so; the weights really move between the steps."""
    machine.loop.sync()
    policy = machine.workers.policy
    assert policy is not None
    before = policy.logprobs(machine.loop.check.samples, temperature=1.0)
    first = policy.version
    for step in (1, 2, 3):
        metrics = machine.step(step)
        assert 0 <= metrics[names.SYNC_LOGPROB_GAP] < 1e-5
        assert 0 <= metrics[names.ROLLOUT_LOGPROB_GAP] < 1e-5
        assert metrics[names.POLICY_VERSION] == first + step
    after = policy.logprobs(machine.loop.check.samples, temperature=1.0)
    assert machine.loop.check.gap(after, [row.tolist() for row in before]) > 1e-3


def corrupted(update: WeightUpdate, change: Callable[[Chunk], Chunk]) -> WeightUpdate:
    assert update.chunks is not None
    return dataclasses.replace(update, chunks=(ray.put(pack(change(whole(fetched(update.chunks))))),))


def pair(chunk: Chunk) -> tuple[str, str]:
    """Two names whose tensors differ but have one shape."""
    names = sorted(chunk)
    return next(
        (a, b)
        for a in names
        for b in names
        if a < b and chunk[a].shape == chunk[b].shape and not torch.equal(chunk[a], chunk[b])
    )


def wrong_tensor(chunk: Chunk) -> Chunk:
    name = sorted(chunk)[0]
    tensor = chunk[name].clone()
    tensor.view(-1)[0] += 1e-3
    return {**chunk, name: tensor}


def swapped_names(chunk: Chunk) -> Chunk:
    a, b = pair(chunk)
    return {**chunk, a: chunk[b], b: chunk[a]}


def missing_tensor(chunk: Chunk) -> Chunk:
    return {name: tensor for name, tensor in chunk.items() if name != sorted(chunk)[0]}


@pytest.mark.parametrize("fault", [wrong_tensor, swapped_names, missing_tensor])
def test_what_is_damaged_between_learner_and_engine_fails_the_sync(
    machine: Machine, fault: Callable[[Chunk], Chunk]
) -> None:
    policy, rollouts = machine.workers.policy, machine.workers.rollouts
    assert policy is not None
    update = policy.weights(rollouts.processes)
    with pytest.raises(GroupFailure, match=r"rollout rank \d \(node .*pid .*failed in phase sync") as failure:
        rollouts.sync(corrupted(update, fault))
    assert str(failure.value).count("\n") == 0
    assert (
        update.checksum in str(failure.value)
        or "missing" in str(failure.value)
        or "without" in str(failure.value)
    )
    machine.loop.sync()


def test_weights_of_an_earlier_version_are_not_taken_for_the_newest(machine: Machine) -> None:
    policy, rollouts = machine.workers.policy, machine.workers.rollouts
    assert policy is not None
    machine.loop.sync()
    old = policy.weights(rollouts.processes)
    machine.step(1)
    new = policy.weights(rollouts.processes)
    assert (old.version + 1, old.checksum != new.checksum) == (new.version, True)
    stale = dataclasses.replace(new, chunks=old.chunks)
    with pytest.raises(GroupFailure, match=f"policy version {new.version} left the learner"):
        rollouts.sync(stale)
    machine.loop.sync()


class PerturbedActor(RolloutActor):
    """One weight of the engine changes after it was loaded; its checksum is then still the right one."""

    def load(self, update: WeightUpdate) -> Any:
        report = super().load(update)
        if update.version > 0:
            engine: Any = self.engine
            with torch.no_grad():
                engine._base.model.embed_tokens.weight[5, 0] += 0.5
        return report


@contextmanager
def perturbed_loop(output: Path, *overrides: str) -> Iterator[Loop]:
    """A loop whose one engine is a PerturbedActor."""
    machine = started(output, "rollout.replicas=1", *overrides)
    config = machine.prepared.config
    handle = ray.remote(PerturbedActor).remote(0, config, machine.prepared.policy_path, "cpu")
    perturbed = RolloutWorkers([ActorProcess("rollout", 0, handle)], config, machine.prepared.policy_renderer)
    perturbed.open()
    assert machine.workers.policy is not None
    try:
        yield Loop(config, machine.sampler, perturbed, machine.workers.policy, EvenTokens(machine.prepared))
    finally:
        perturbed.close()
        machine.workers.monitor.end(60)


def test_silently_wrong_numerics_fail_the_run_by_the_sync_check(joined: None, tmp_path: Path) -> None:
    with perturbed_loop(tmp_path) as loop:
        loop.sync()
        assert loop.buffer.sync_metrics[names.SYNC_LOGPROB_GAP] < 1e-5
        with pytest.raises(GroupFailure, match=r"phase sync.*away from the learner's.*max_sync_logprob_gap"):
            loop.step(1, PhaseTimer())


def test_without_a_sync_check_the_samples_of_the_next_step_find_it(joined: None, tmp_path: Path) -> None:
    with perturbed_loop(tmp_path, "rollout.sync_check_every=0") as loop:
        loop.sync()
        metrics = loop.step(1, PhaseTimer())[0]
        assert metrics[names.ROLLOUT_LOGPROB_GAP] < 1e-5 and names.SYNC_LOGPROB_GAP not in metrics
        with pytest.raises(GroupFailure, match=r"policy version 1 .* on the samples of its step, and at most"):
            loop.step(2, PhaseTimer())


def test_when_the_samples_tell() -> None:
    def tells(*words: str) -> bool:
        return samples_tell(load_config(ROOT / "experiments/demo/airl.yaml", words))

    assert tells()
    assert not tells("rollout.top_p=0.95") and not tells("trainer.max_staleness_steps=1")
    assert not tells("model.policy.lora.rank=4", "model.policy.lora.dropout=0.1")


def test_the_sync_check_can_be_thinned_out(machine: Machine) -> None:
    policy = machine.workers.policy
    assert policy is not None
    for every in (0, 2):
        rollout = machine.loop.config.rollout.model_copy(update={"sync_check_every": every})
        machine.loop.config = machine.loop.config.model_copy(update={"rollout": rollout})
        checked = every and policy.version % every == 0
        machine.loop.sync()
        assert (names.SYNC_LOGPROB_GAP in machine.loop.buffer.sync_metrics) == bool(checked)
    machine.loop.config = machine.prepared.config


class Recorder:
    """Stands in for a rollout actor's control calls; NCCL itself needs GPUs."""

    def __init__(self) -> None:
        self.infos: list[dict[str, Any]] = []

    def init_weight_transfer_engine(self, info: dict[str, Any]) -> None:
        self.infos.append(info)

    def seen(self) -> list[dict[str, Any]]:
        return self.infos


def test_every_engine_gets_nccl_ranks_of_its_own(joined: None) -> None:
    handles = [ray.remote(Recorder).options(num_cpus=0).remote() for _ in range(3)]
    client = EngineClient(handles, workers_per_engine=2, deadline_seconds=300)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    client.init_weight_transfer_engine({"packed": True})
    seen = ray.get([handle.seen.remote() for handle in handles])
    assert [infos[0]["rank_offset"] for infos in seen] == [1, 3, 5]
    assert all(infos[1] == {"packed": True} for infos in seen)
    for handle in handles:
        ray.kill(handle)


def part_of_a_layer(update: WeightUpdate) -> WeightUpdate:
    """Without one of the matrices that vLLM holds as one, as a learner would send it: the checksum is right."""
    assert update.chunks is not None
    named = whole(fetched(update.chunks))
    del named["model.layers.0.self_attn.k_proj.weight"]
    return dataclasses.replace(update, chunks=(ray.put(pack(named)),), checksum=checksum(named))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("full", "float32"), ("merged", "float32"), ("merged", "bfloat16"), ("served", "bfloat16")],
)
def test_two_vllm_engines_read_one_update(joined: None, tmp_path: Path, kind: str, dtype: str) -> None:
    machine = started(
        tmp_path,
        "rollout.engine=vllm",
        f"model.policy.dtype={dtype}",
        f"model.policy.lora.rank={'null' if kind == 'full' else 4}",
        f"rollout.adapter={'auto' if kind == 'full' else kind}",
    )
    try:
        assert_stale(machine)
        machine.loop.sync()
        bound = 1e-4 if dtype == "float32" else 0.05
        for step in (1, 2):
            metrics = machine.step(step)
            assert metrics[names.SYNC_LOGPROB_GAP] < bound
            assert metrics[names.ROLLOUT_LOGPROB_GAP] < bound
        policy, rollouts = machine.workers.policy, machine.workers.rollouts
        assert policy is not None
        update = policy.weights(rollouts.processes)
        scores = rollouts.sync(update, machine.loop.check.traces)
        assert len(scores) == 2 and scores[0] == scores[1]
        with pytest.raises(GroupFailure, match="phase sync"):
            rollouts.sync(corrupted(update, wrong_tensor))
        if kind == "merged":
            with pytest.raises(GroupFailure, match=r"without the weights of model\.layers\.0\.self_attn\.qkv"):
                rollouts.sync(part_of_a_layer(update))
        rollouts.open()
        assert_stale(machine)
        machine.loop.sync()
    finally:
        machine.workers.monitor.end(60)
