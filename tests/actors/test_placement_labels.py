"""`placement.labels`: what each bundle asks for, what is refused, and where Ray puts it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray._private.label_utils import validate_label_selector
from ray.util.placement_group import placement_group, placement_group_table
from rich.console import Console

from rairl_ray.actors.group import reserve
from rairl_ray.actors.placement import Node, bundles, check_against, kinds, room
from rairl_ray.config.labels import matches, problem, said
from rairl_ray.errors import PlacementError
from rairl_ray.plan import print_placement
from rairl_ray.trainer import sft
from rairl_ray.trainer.worker_groups import cluster, place, rollouts_only
from tests.actors.test_placement import counted_nodes, make
from tests.runs import launch

APART = {"labels": {"policy": {"market": "on-demand"}, "rollout": {"market": "spot"}}, "type": "disaggregated"}
SPOT, STEADY = {"market": "spot"}, {"market": "on-demand", "zone": "a"}


def labelled(cpus: float, labels: Mapping[str, str] | None = None) -> Node:
    return Node({"CPU": cpus}, labels)


def test_each_bundle_asks_for_the_labels_of_all_roles_in_it() -> None:
    apart = bundles(make(placement=APART, rollout={"replicas": 2}), "cpu")
    assert apart.labels == ({"market": "spot"}, {"market": "spot"}, {"market": "on-demand"}, {})
    together = {"policy": {"market": "spot"}, "rollout": {"market": "spot", "zone": "!b"}}
    plan = bundles(make(placement={"labels": together}, rollout={"replicas": 2}), "cpu")
    assert plan.labels == ({"market": "spot", "zone": "!b"},) * 2
    engines_alone = make(
        placement={"labels": APART["labels"]},
        rollout={"tensor_parallel": 4, "replicas": 2},
        learner={"replicas": 2},
    )
    assert bundles(engines_alone, "gpu").labels == ({"market": "spot"},) * 2 + ({"market": "on-demand"},) * 2
    assert bundles(make(), "cpu").labels == ({},)


def test_of_sft_the_engine_asks_for_its_own_labels_alone() -> None:
    config = make(algorithm={"type": "sft"}, placement={"labels": {"policy": {"zone": "a"}, "rollout": SPOT}})
    plan = bundles(config, "cpu")
    assert plan.labels == ({"zone": "a", "market": "spot"},)
    assert rollouts_only(plan).labels == (SPOT,)


def test_ray_train_reserves_sft_learners_by_the_policys_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "TorchTrainer", lambda *_, **given: given)
    monitor = SimpleNamespace(attempt="1", mark=lambda *_: {})
    for asked, found in (({"policy": {"zone": "a"}, "rollout": SPOT}, {"zone": "a"}), ({}, None)):
        config = make(algorithm={"type": "sft"}, learner={"replicas": 2}, placement={"labels": asked})
        context = SimpleNamespace(
            config=config, plan=bundles(config, "cpu"), prepared=SimpleNamespace(policy_path="m"),
            folder=SimpleNamespace(root=tmp_path), verified={},
        )  # fmt: skip
        given: Any = sft._trainer(
            cast(Any, context), cast(Any, SimpleNamespace(device="cpu", monitor=monitor)),
            cast(Any, SimpleNamespace(handle=None)), tmp_path,
        )  # fmt: skip
        assert given["scaling_config"].label_selector == found
        assert given["scaling_config"].num_workers == 2


def test_a_label_that_no_node_has_is_one_line() -> None:
    plan = bundles(make(placement=APART), "cpu")
    with pytest.raises(PlacementError) as refused:
        check_against(plan, [labelled(8, SPOT), labelled(8, SPOT), labelled(0, {"ray.io/node-id": "f0"})])
    assert str(refused.value) == (
        "placement.labels.policy: no node has market=on-demand; the nodes have market=spot (2); no label (1); "
        "change the key, or start nodes with it (ray start --labels market=VALUE)"
    )
    # What an autoscaler may bring, and a hypothetical node, may have any label.
    check_against(plan, [labelled(8), labelled(8)])


def test_labels_that_no_single_node_has_together_are_refused() -> None:
    asked = {"labels": {"policy": {"market": "spot"}, "rollout": {"zone": "a"}}}
    with pytest.raises(PlacementError, match=r"no single node has market=spot, zone=a, asked of bundle 0 by"):
        check_against(bundles(make(placement=asked), "cpu"), [labelled(8, SPOT), labelled(8, STEADY)])


def test_room_on_nodes_without_the_label_does_not_count() -> None:
    plan = bundles(make(placement={**APART, "cpus_per_actor": 2}, rollout={"replicas": 2}), "cpu")
    # On-demand nodes first: what may be anywhere must not take the labelled bundles' place.
    check_against(plan, [labelled(4, STEADY), labelled(4, SPOT)])
    with pytest.raises(
        PlacementError, match=r"nodes with market=spot together have enough, but a bundle of 2 CPU"
    ):
        check_against(plan, [labelled(64, STEADY), labelled(3, SPOT)])
    with pytest.raises(
        PlacementError, match=r"no node of the cluster with market=spot holds a bundle of 2 CPU"
    ):
        check_against(plan, [labelled(64, STEADY), labelled(1, SPOT)])
    strict = bundles(make(placement={**APART, "strategy": "STRICT_PACK"}), "cpu")
    with pytest.raises(PlacementError, match="STRICT_PACK: no single node with market="):
        check_against(strict, [labelled(64, STEADY), labelled(64, SPOT)])


def test_as_many_runs_at_once_as_the_labelled_nodes_hold() -> None:
    plan = bundles(make(placement={**APART, "cpus_per_actor": 1}, rollout={"replicas": 2}), "cpu")
    assert room(plan, [labelled(100, STEADY), labelled(7, SPOT)]) == 3
    assert room(plan, [labelled(3, STEADY), labelled(8, SPOT)]) == 2
    assert room(plan, [labelled(6, None), labelled(6, None)]) == 3


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(1, 6))
def test_runs_of_one_bundle_are_counted_node_by_node(sizes: list[int], cpus: int) -> None:
    """A bundle does not straddle nodes: with sums, 2 nodes of 8 would hold 3 runs that take 5."""
    roles = {"learner": {"replicas": 1}, "rollout": {"replicas": 1}}
    plan = bundles(make(placement={"cpus_per_actor": cpus / 3}, **roles), "cpu")
    assert [round(bundle["CPU"], 3) for bundle in plan.bundles] == [cpus]
    assert room(plan, [labelled(size, None) for size in sizes]) == sum(size // cpus for size in sizes)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["PACK", "STRICT_PACK", "SPREAD"]),
)
def test_runs_of_bundles_without_gaps_are_counted_as_their_sums_and_none_is_what_the_check_refuses(
    sizes: list[int], replicas: int, ranks: int, strategy: str
) -> None:
    """Bundles of one CPU fill every node, STRICT_PACK's runs each want one node for all of theirs."""
    roles = {"learner": {"replicas": ranks}, "rollout": {"replicas": replicas}}
    placed = {"type": "disaggregated", "strategy": strategy, "cpus_per_actor": 1}
    plan = bundles(make(placement=placed, **roles), "cpu")
    nodes = [labelled(size, None) for size in sizes]
    count = room(plan, nodes)
    assert count * plan.total("CPU") <= sum(sizes)
    if strategy == "STRICT_PACK":
        assert count == sum(size // int(plan.total("CPU")) for size in sizes)
    else:
        assert count == sum(sizes) // int(plan.total("CPU"))
    if count:
        check_against(plan, nodes)
    else:
        with pytest.raises(PlacementError):
            check_against(plan, nodes)


def test_a_promised_node_takes_any_label_and_kinds_are_counted() -> None:
    head = Node({"CPU": 0.0}, {})
    nodes = [head, labelled(4, {**SPOT, "ray.io/node-id": "1"}), labelled(4, {**SPOT, "ray.io/node-id": "2"})]
    assert [(said(node.labels or {}), count) for node, count in kinds([*nodes, labelled(4, STEADY)])] == [
        ("market=spot", 2),
        ("market=on-demand, zone=a", 1),
    ]
    output = io.StringIO()
    show = Console(file=output, width=200)
    print_placement(bundles(make(placement=APART), "cpu"), [*nodes, labelled(4, STEADY)], show)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in output.getvalue().splitlines()]
    assert ["0", "CPU 0.5", "rollout 0 (CPU 0.5)", "market=spot", "1"] in rows
    assert ["1", "CPU 0.5", "policy 0 (CPU 0.5)", "market=on-demand", "2"] in rows
    assert ["2", "CPU 0.5", "discriminator 0 (CPU 0.5)", "", "1 or 2"] in rows
    assert "kind 1: 2 node(s) of 4 CPUs and 0 GPUs (market=spot)" in output.getvalue()


SELECTORS = ["spot", "!spot", "in(spot,on-demand)", "!in(spot,x)", "!in(a,b)", "in(x)"]


@pytest.mark.parametrize(
    ("key", "value", "good"),
    [
        *(("market", value, True) for value in SELECTORS),
        ("ray.io/accelerator-type", "A100", True), ("a.b.c/x_y", "1", True),
        ("market", "", False), ("market", "(spot)", False), ("market", "in()", False),
        ("market", "!!spot", False), ("market", "in(a,,b)", False),
        ("market", "in(spot,", False), ("market", "on demand", False),
        ("-market", "x", False), ("a b", "x", False), ("a/b/c", "x", False),
        ("market", "x" * 64, False), ("x" * 64, "x", False),
    ],
)  # fmt: skip
def test_a_selector_is_accepted_only_if_ray_accepts_it(key: str, value: str, good: bool) -> None:
    assert (problem(key, value) == "") == good
    if good:
        assert validate_label_selector({key: value}) is None
    elif (
        value not in ("", "(spot)") and key != "a/b/c"
    ):  # which Ray accepts and takes literally, or never finds
        assert validate_label_selector({key: value})


@pytest.fixture(scope="module")
def labelled_cluster() -> Iterator[str]:
    """A head without work and three nodes of 2 CPUs: spot, on demand, without a label."""
    with counted_nodes(*({"num_cpus": 2, "labels": labels} for labels in (SPOT, STEADY, {}))) as address:
        yield address


def test_ray_places_bundles_where_the_labels_say_and_reads_selectors_as_we_do(labelled_cluster: str) -> None:
    config = make(
        placement={
            **APART,
            "labels": {"policy": {"market": "on-demand"}, "rollout": {"market": "in(x, spot)"}},
        },
        rollout={"replicas": 2},
        cluster={"address": labelled_cluster},
    )
    with cluster(config):
        labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
        cpus = {node["NodeID"]: node["Resources"].get("CPU") for node in ray.nodes()}
        plan = place(config)
        on = placement_group_table(reserve(plan, 60))["bundles_to_node_id"]
        for role, market in (("rollout", "spot"), ("policy", "on-demand")):
            assert [labels[on[slot.bundle]].get("market") for slot in plan.roles[role]] == [market] * len(
                plan.roles[role]
            )
        # One bundle for each selector and node, which the node's own label pins there.
        asked = {
            (value, node): placement_group(
                [{"CPU": 0.01}], bundle_label_selector=[{"market": value, "ray.io/node-id": node}]
            )
            for value in SELECTORS
            for node in labels
            if cpus[node]
        }
        ours = {key for key in asked if matches({"market": key[0]}, labels[key[1]])}
        assert 0 < len(ours) < len(asked)
        assert not [key for key in ours if not asked[key].wait(20)]
        # Asked for after all of them: what is not granted by then is a selector that Ray reads as we do.
        assert placement_group([{"CPU": 0.01}]).wait(20)
        granted = {key for key, group in asked.items() if placement_group_table(group)["state"] == "CREATED"}
        assert granted == ours
        domain = {"policy": {"ray.io/accelerator-type": "GB200"}}
        with pytest.raises(PlacementError, match=r"labels: Ray refuses .* requires all bundles to have"):
            reserve(bundles(make(placement={**APART, "labels": domain}), "cpu"), 5)
        wrong = make(placement={"labels": {"policy": {"market": "x"}}, "device": "cpu"})
        with pytest.raises(
            PlacementError, match=r"policy: no node has market=x; the nodes have market=on-demand, z"
        ):
            place(wrong)


def test_plan_asks_a_running_cluster_for_its_labels(labelled_cluster: str) -> None:
    file, apart = "experiments/demo/sft.yaml", "placement.type=disaggregated"
    spot = "placement.labels.rollout={market: spot}"
    good = launch("plan", file, apart, spot, "--address", labelled_cluster)
    assert good.returncode == 0, good.stderr
    assert ": 1 node(s) of 2 CPUs and 0 GPUs (market=spot)" in good.stdout
    bad = launch("plan", file, apart, "placement.labels.rollout={market: x}", "--address", labelled_cluster)
    told = "rairl: error: placement.labels.rollout: no node has market=x; the nodes have market=on-demand, z"
    assert bad.returncode == 2 and bad.stderr.startswith(told) and bad.stderr.count("\n") == 1, bad.stderr


def test_plan_of_a_running_cluster_contradicts_a_hypothetical_one() -> None:
    result = launch(
        "plan", "experiments/demo/sft.yaml", "--address", "127.0.0.1:1", "--nodes", "2", "--cpus", "4"
    )
    assert (
        result.returncode == 2 and "which contradicts --nodes, --cpus; leave one of them out" in result.stderr
    )
