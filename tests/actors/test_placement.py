"""Placement is pure: every rank has a slot, no bundle is overbooked, impossible plans are refused."""

from __future__ import annotations

import io
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table, remove_placement_group
from rich.console import Console

from rairl_ray.actors.group import create_process, reserve
from rairl_ray.actors.placement import SPREAD_ROLLOUTS, Node, PlacementPlan, Slot, bundles, resolve_device
from rairl_ray.actors.placement import check_against as check_against_nodes
from rairl_ray.config.load import from_dict
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import PlacementError
from rairl_ray.plan import hypothetical_nodes, print_placement
from rairl_ray.trainer.worker_groups import cluster, place
from tests.small_actor import SmallActor


def make(**sections: dict) -> RunConfig:
    return from_dict({"model": {"policy": {"path": "some/model"}}, **sections})


def check_against(plan: PlacementPlan, nodes: Sequence[Mapping[str, float]]) -> None:
    check_against_nodes(plan, [Node(node) for node in nodes])


def test_colocated_on_cpu_puts_rank_i_of_every_role_into_bundle_i() -> None:
    config = make(learner={"replicas": 2, "discriminator_replicas": 1}, placement={"cpus_per_actor": 0.25})
    plan = bundles(config, "cpu")
    assert plan.bundles == ({"CPU": 0.75}, {"CPU": 0.25})
    assert plan.roles == {
        "rollout": (Slot(0, {"CPU": 0.25}),),
        "policy": (Slot(0, {"CPU": 0.25}), Slot(1, {"CPU": 0.25})),
        "discriminator": (Slot(0, {"CPU": 0.25}),),
    }
    assert plan.strategy == "PACK"
    assert plan.device == "cpu"


def test_colocated_on_gpu_shares_one_gpu_by_fractions() -> None:
    config = make(rollout={"replicas": 2}, learner={"replicas": 2}, placement={"cpus_per_actor": 1})
    plan = bundles(config, "gpu")
    assert plan.bundles == ({"CPU": 3.0, "GPU": 1.0},) * 2
    assert [plan.roles[role][1].resources["GPU"] for role in plan.roles] == [0.5, 0.25, 0.25]
    assert plan.total("GPU") == 2


def test_disaggregated_gives_every_rank_a_bundle() -> None:
    config = make(rollout={"replicas": 2}, learner={"replicas": 2}, placement={"type": "disaggregated"})
    gpu = bundles(config, "gpu")
    assert gpu.bundles == ({"CPU": 0.5, "GPU": 1.0},) * 6
    assert [slot.bundle for slots in gpu.roles.values() for slot in slots] == list(range(6))
    assert bundles(config, "cpu").bundles == ({"CPU": 0.5},) * 6


@pytest.mark.parametrize("kind", ["colocated", "disaggregated"])
def test_a_tensor_parallel_engine_takes_whole_gpus_of_one_bundle(kind: str) -> None:
    config = make(
        rollout={"replicas": 2, "tensor_parallel": 4}, learner={"replicas": 2}, placement={"type": kind}
    )
    plan = bundles(config, "gpu")
    assert [plan.bundles[slot.bundle]["GPU"] for slot in plan.roles["rollout"]] == [4.0, 4.0]
    learners = {slot.bundle for role in ("policy", "discriminator") for slot in plan.roles[role]}
    assert not learners & {slot.bundle for slot in plan.roles["rollout"]}
    assert plan.total("GPU") == 8 + (2 if kind == "colocated" else 4)


@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_only_airl_has_a_discriminator(algorithm: str) -> None:
    plan = bundles(make(algorithm={"type": algorithm}, rollout={"replicas": 3}), "cpu")
    assert set(plan.roles) == {"rollout", "policy"}
    # SFT samples for its evaluation alone.
    assert len(plan.roles["rollout"]) == (1 if algorithm == "sft" else 3)


def test_auto_needs_an_answer() -> None:
    with pytest.raises(PlacementError, match=r"placement\.device=auto"):
        bundles(make())
    assert bundles(make(placement={"device": "cpu"})).device == "cpu"
    assert resolve_device(0) == "cpu"
    assert resolve_device(2) == "gpu"


def test_fractions_beyond_one_gpu_are_refused() -> None:
    config = make(placement={"rollout_gpu_fraction": 0.9, "policy_gpu_fraction": 0.2})
    with pytest.raises(PlacementError, match=r"1\.35.*rollout_gpu_fraction"):
        bundles(config, "gpu")
    bundles(config, "cpu")
    bundles(make(placement=config.placement.model_dump() | {"type": "disaggregated"}), "gpu")


def test_one_gpu_holds_one_rank_of_each_role_and_no_second_one() -> None:
    """Groups of two roles share a device; two ranks of one group on it, which NCCL refuses, are not placed."""
    one = {"CPU": 16.0, "GPU": 1.0}
    check_against(bundles(make(), "gpu"), [one])
    small = {"policy_gpu_fraction": 0.1, "discriminator_gpu_fraction": 0.1}
    with pytest.raises(
        PlacementError, match=r"needs 2 GPUs and the cluster has 1; .* holds one rank of a role"
    ):
        check_against(bundles(make(learner={"replicas": 2}, placement=small), "gpu"), [one])


@pytest.mark.parametrize("kind", ["colocated", "disaggregated"])
@pytest.mark.parametrize("policy", [0.25, 0.45])
def test_no_two_sft_ranks_fit_on_one_gpu(kind: str, policy: float) -> None:
    """Ray Train packs its workers by what they take, in a placement group of its own."""
    sections = {"algorithm": {"type": "sft"}, "learner": {"replicas": 8}}
    placement = {"type": kind, "policy_gpu_fraction": policy, "rollout_gpu_fraction": 0.5}
    plan = bundles(make(**sections, placement=placement), "gpu")
    shares = {role: slots[0].resources["GPU"] for role, slots in plan.roles.items()}
    assert 2 * shares["policy"] > 1.0
    assert shares["rollout"] > 0
    assert kind == "disaggregated" or sum(shares.values()) <= 1.0
    assert plan.total("GPU") == (8 if kind == "colocated" else 9)
    alone = bundles(
        make(**sections | {"learner": {"replicas": 1}}, placement={"policy_gpu_fraction": 0.25}), "gpu"
    )
    assert alone.roles["policy"][0].resources["GPU"] == 0.25


@given(
    replicas=st.integers(1, 6),
    policy=st.integers(1, 6),
    discriminator=st.one_of(st.none(), st.integers(1, 6)),
    parallel=st.sampled_from([1, 2, 4]),
    kind=st.sampled_from(["colocated", "disaggregated"]),
    device=st.sampled_from(["cpu", "gpu"]),
    algorithm=st.sampled_from(["airl", "grpo", "sft"]),
    cpus=st.sampled_from([0.1, 0.3, 0.5, 1.0, 2.0]),
    strategy=st.sampled_from(["PACK", SPREAD_ROLLOUTS]),
    per_node=st.integers(1, 8),
)
def test_no_bundle_is_overbooked_and_every_rank_has_a_slot(
    replicas: int,
    policy: int,
    discriminator: int | None,
    parallel: int,
    kind: str,
    device: str,
    algorithm: str,
    cpus: float,
    strategy: str,
    per_node: int,
) -> None:
    parallel = parallel if device == "gpu" else 1
    config = make(
        algorithm={"type": algorithm},
        rollout={"replicas": replicas, "tensor_parallel": parallel},
        learner={"replicas": policy, "discriminator_replicas": discriminator},
        placement={
            "type": kind, "cpus_per_actor": cpus,
            "strategy": strategy if kind == "disaggregated" else "PACK",
            "gpus_per_node": max(per_node, parallel),
        },
    )  # fmt: skip
    plan = bundles(config, device)
    used: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for slots in plan.roles.values():
        for slot in slots:
            for name, amount in slot.resources.items():
                used[slot.bundle][name] += amount
    assert set(used) == set(range(len(plan.bundles)))
    for index, amounts in used.items():
        for name, amount in amounts.items():
            assert amount <= plan.bundles[index][name] + 1e-9
    assert len(plan.roles["policy"]) == policy
    assert len(plan.roles["rollout"]) == (1 if algorithm == "sft" else replicas)
    if algorithm == "airl":
        assert len(plan.roles["discriminator"]) == (discriminator or policy)
    assert bundles(config, device) == plan
    # What the plan asks for in total always serves it, one node a bundle.
    check_against(plan, [dict(bundle) for bundle in plan.bundles])


def one_gpu_bundles(count: int, strategy: str = "PACK") -> PlacementPlan:
    slots = tuple(Slot(i, {"CPU": 1.0, "GPU": 1.0}) for i in range(count))
    return PlacementPlan(({"CPU": 1.0, "GPU": 1.0},) * count, strategy, {"policy": slots}, "gpu")


def test_more_gpus_than_the_cluster_has_are_refused() -> None:
    node = {"CPU": 64.0, "GPU": 8.0}
    check_against(one_gpu_bundles(16), [node, node])
    with pytest.raises(PlacementError, match=r"needs 16 GPUs and the cluster has 8; lower .*learner\.replicas"):
        check_against(one_gpu_bundles(16), [node])
    with pytest.raises(PlacementError, match=r"needs 8 GPUs and the cluster has 0"):
        check_against(one_gpu_bundles(8), [{"CPU": 64.0}])
    with pytest.raises(PlacementError, match=r"needs 8 CPUs and the cluster has 4"):
        check_against(one_gpu_bundles(8), [{"CPU": 4.0, "GPU": 8.0}])


def test_a_bundle_must_fit_one_node() -> None:
    plan = PlacementPlan(({"CPU": 1.0, "GPU": 4.0},), "PACK", {"rollout": (Slot(0, {"GPU": 4.0}),)}, "gpu")
    check_against(plan, [{"CPU": 8.0, "GPU": 4.0}])
    with pytest.raises(PlacementError, match="no node of the cluster holds a bundle of 1 CPU, 4 GPU"):
        check_against(plan, [{"CPU": 8.0, "GPU": 2.0}] * 4)


def test_bundles_must_fit_beside_each_other() -> None:
    plan = PlacementPlan(({"CPU": 3.0},) * 3, "PACK", {}, "cpu")
    check_against(plan, [{"CPU": 6.0}, {"CPU": 3.0}])
    with pytest.raises(PlacementError, match="beside the others"):
        check_against(plan, [{"CPU": 5.0}, {"CPU": 5.0}])


def test_strict_pack_needs_one_node() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}] * 2
    check_against(one_gpu_bundles(4), nodes)
    with pytest.raises(PlacementError, match="STRICT_PACK"):
        check_against(one_gpu_bundles(4, "STRICT_PACK"), nodes)
    check_against(one_gpu_bundles(2, "STRICT_PACK"), nodes)


def test_placement_needs_no_ray() -> None:
    code = "import sys, rairl_ray.actors.placement; sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_tensor_parallel_engine_needs_one_node_for_all_its_gpus() -> None:
    """An engine is one bundle, and Ray never splits a bundle: two nodes of half its GPUs do not do."""
    engine = bundles(make(rollout={"tensor_parallel": 4}), "gpu")
    check_against(engine, [{"CPU": 64.0, "GPU": 4.0}, {"CPU": 64.0, "GPU": 1.0}])
    with pytest.raises(PlacementError, match=r"no node of the cluster holds a bundle of 0\.5 CPU, 4 GPU"):
        check_against(engine, [{"CPU": 64.0, "GPU": 3.0}] * 4)


# --- learners packed, rollouts spread ------------------------------------------------------------------

PACKED = {"type": "disaggregated", "strategy": SPREAD_ROLLOUTS}


def test_a_learner_is_one_bundle_as_far_as_a_node_goes_and_every_engine_has_its_own() -> None:
    config = make(
        rollout={"replicas": 3},
        learner={"replicas": 6, "discriminator_replicas": 2},
        placement={**PACKED, "gpus_per_node": 4},
    )
    gpu, cpu = bundles(config, "gpu"), bundles(config, "cpu")
    assert [bundle["GPU"] for bundle in gpu.bundles] == [1, 1, 1, 4, 2, 2]
    assert [bundle["CPU"] for bundle in gpu.bundles] == [0.5, 0.5, 0.5, 2.0, 1.0, 1.0]
    assert [slot.bundle for slot in gpu.roles["policy"]] == [3, 3, 3, 3, 4, 4]
    assert [slot.resources for slot in gpu.roles["policy"]] == [{"CPU": 0.5, "GPU": 1.0}] * 6
    assert cpu.bundles == ({"CPU": 0.5},) * 3 + ({"CPU": 3.0}, {"CPU": 1.0})
    assert (gpu.strategy, gpu.rays_strategy) == (SPREAD_ROLLOUTS, "SPREAD")
    for strategy in ("PACK", "SPREAD", "STRICT_PACK"):
        plan = bundles(make(placement={"strategy": strategy}), "cpu")
        assert plan.strategy == plan.rays_strategy == strategy


def test_labels_of_a_role_are_those_of_its_bundles() -> None:
    config = make(
        learner={"replicas": 2},
        placement={**PACKED, "labels": {"policy": {"a": "p"}, "discriminator": {"a": "d"}}},
    )
    assert bundles(config, "gpu").labels == ({}, {"a": "p"}, {"a": "d"})


def test_sft_learners_are_left_to_ray_train() -> None:
    sft = make(algorithm={"type": "sft"}, learner={"replicas": 3}, placement=PACKED)
    assert len(bundles(sft, "cpu").bundles) == 4


def test_a_learner_larger_than_every_node_is_refused_with_what_to_write() -> None:
    config = make(learner={"replicas": 6, "discriminator_replicas": 1}, placement=PACKED)
    nodes = [{"CPU": 64.0, "GPU": 4.0}] * 4
    with pytest.raises(PlacementError, match=r"no node .* 6 GPU; .* or set placement\.gpus_per_node"):
        check_against(bundles(config, "gpu"), nodes)
    check_against(
        bundles(make(learner=config.learner.model_dump(), placement={**PACKED, "gpus_per_node": 4}), "gpu"),
        nodes,
    )
    with pytest.raises(PlacementError, match=r"no node .* 3 CPU; .* or write placement\.strategy=PACK"):
        check_against(bundles(config, "cpu"), [{"CPU": 2.0}] * 4)
    check_against(bundles(make(learner=config.learner.model_dump()), "cpu"), [{"CPU": 2.0}] * 4)


def test_plan_says_it_and_takes_as_many_nodes_as_the_bundles_need() -> None:
    config = make(
        rollout={"replicas": 1},
        learner={"replicas": 5, "discriminator_replicas": 5},
        placement={**PACKED, "device": "gpu"},
    )
    plan, output = bundles(config, "gpu"), io.StringIO()
    nodes = hypothetical_nodes(plan, 8, None, None, None)
    assert [node.resources["GPU"] for node in nodes] == [8.0, 8.0]
    sixes = bundles(make(rollout={"replicas": 6, "tensor_parallel": 5}, placement={"device": "gpu"}), "gpu")
    assert len(hypothetical_nodes(sixes, 8, None, None, None)) == 6  # 31 GPUs would be 4 nodes
    print_placement(plan, nodes, Console(file=output, width=200))
    said = output.getvalue()
    assert "placement: 3 bundle(s) on gpu, SPREAD_ROLLOUTS" in said
    assert "SPREAD_ROLLOUTS: a bundle is on one node; Ray puts two on one only where" in said


@contextmanager
def counted_nodes(*nodes: Mapping[str, Any]) -> Iterator[str]:
    """Address of a head without work and these nodes (`Cluster.add_node`), whose resources are only counted."""
    counted = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for node in nodes:
            counted.add_node(**node)
        yield counted.address
    finally:
        ray.shutdown()
        counted.shutdown()


@pytest.fixture(scope="module")
def three_nodes() -> Iterator[str]:
    with counted_nodes(*[{"num_cpus": 4, "num_gpus": 4}] * 3) as address:
        yield address


def test_ray_keeps_learners_together_and_engines_apart(three_nodes: str) -> None:
    config = make(
        rollout={"replicas": 2},
        learner={"replicas": 3},
        algorithm={"type": "grpo"},
        placement=PACKED,
        cluster={"address": three_nodes},
    )
    with cluster(config):
        plan = place(config)
        group = reserve(plan, 60)
        on = placement_group_table(group)["bundles_to_node_id"]
        assert len(plan.bundles) == 3 and len(set(on.values())) == 3
        # The ranks live in that bundle side by side, each with a GPU of its own.
        made = [
            create_process("policy", SmallActor, rank, group, slot, {}, ()).handle
            for rank, slot in enumerate(plan.roles["policy"])
        ]
        there = ray.get([actor.whereabouts.remote() for actor in made], timeout=120)
        assert {node for _, _, node in there} == {on[plan.roles["policy"][0].bundle]}
        gpus = ray.get([actor.gpus.remote() for actor in made], timeout=120)
        assert len({gpu for given in gpus for gpu in given}) == 3 == sum(len(given) for given in gpus)
        remove_placement_group(group)
        # With fewer nodes than bundles, the engines share.
        four = place(config.model_copy(update={"rollout": config.rollout.model_copy(update={"replicas": 5})}))
        on = placement_group_table(reserve(four, 60))["bundles_to_node_id"]
        engines = [on[slot.bundle] for slot in four.roles["rollout"]]
        assert len(set(engines) - {on[four.roles["policy"][0].bundle]}) == 2
        assert max(engines.count(node) for node in engines) < 4
