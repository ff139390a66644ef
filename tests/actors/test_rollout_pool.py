"""Which rollout replicas join, leave and are replaced, and that the samples are the same whoever makes them."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rairl_ray.actors import pool as pools
from rairl_ray.actors.group import GroupFailure, Pending
from rairl_ray.actors.placement import Node, PlacementPlan, bundles, side_by_side
from rairl_ray.actors.pool import RolloutPool, apart, departures, openings, rooms
from rairl_ray.actors.process_monitor import SILENT_NODE, ActorProcess
from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.config.estimate import memory
from rairl_ray.config.load import config_hash, dump_yaml, from_dict
from rairl_ray.config.schema import RunConfig
from rairl_ray.engines.rollout_engine import Generation, GenerationRequest
from rairl_ray.errors import ConfigError
from rairl_ray.plan import print_memory, print_placement
from rairl_ray.types import Prompt, RolloutGroup

PROMPTS = [Prompt(id=f"p{i}", question="?" * i) for i in range(1, 8)]


def make(replicas: Any, **sections: dict) -> RunConfig:
    return from_dict({"model": {"policy": {"path": "a/b"}}, **sections, "rollout": {"replicas": replicas}})


# --- decisions ------------------------------------------------------------------------------------


def test_bundles_that_the_run_has_are_filled_first_and_new_ones_only_where_there_is_room() -> None:
    assert openings(missing=3, vacant=1, room=5) == (1, 2)
    assert openings(missing=3, vacant=1, room=1) == (1, 1)
    assert openings(missing=1, vacant=2, room=5) == (1, 0)
    assert openings(missing=2, vacant=0, room=0) == (0, 0)


def test_replicas_on_drained_nodes_leave_together_or_the_whole_run_moves() -> None:
    homes = {0: "a", 1: "b", 4: "b", 5: "c"}
    assert departures(homes, {"b"}, least=2) == [1, 4]
    assert departures(homes, {"b"}, least=3) == []
    assert departures(homes, {"z"}, least=1) == [] and departures(homes, {"a", "b", "c"}, least=1) == []


def test_room_is_counted_node_by_node_and_by_labels() -> None:
    nodes = [Node({"CPU": 1.5}, {"market": "spot"}), Node({"CPU": 3.0}, {}), Node({}, {})]
    assert side_by_side({"CPU": 1.0}, {}, nodes) == 4
    assert side_by_side({"CPU": 1.0}, {"market": "spot"}, nodes) == 1
    assert side_by_side({"CPU": 1.0, "GPU": 1.0}, {}, nodes) == 0


def test_a_new_replica_is_meant_for_a_node_that_has_room_beside_those_on_their_way() -> None:
    free = {"a": Node({"CPU": 2.5}, {}), "b": Node({"CPU": 1.0}, {"market": "spot"}), "c": Node({}, {})}
    assert rooms({"CPU": 1.0}, {}, free, []) == ["a", "a", "b"]
    assert rooms({"CPU": 1.0}, {}, free, ["a", "b", "gone"]) == ["a"]
    assert rooms({"CPU": 1.0}, {"market": "spot"}, free, []) == ["b"]


def test_where_bundles_are_spread_replicas_join_on_the_emptiest_node_first() -> None:
    assert apart(["a", "a", "b", "c"], ["a"]) == ["b", "c", "a", "a"]
    assert apart(["a", "a", "a", "b"], []) == ["a", "b", "a", "a"]
    assert apart(["", ""], ["a"]) == ["", ""]


def test_a_run_is_placed_with_its_least_replicas_and_a_further_one_shares_its_gpu_with_nobody() -> None:
    plan = bundles(make({"min": 2, "max": 5}, learner={"replicas": 2}), "gpu")
    fixed = bundles(make(2, learner={"replicas": 2}), "gpu")
    assert (plan.bundles, plan.roles, plan.spare, fixed.spare) == (fixed.bundles, fixed.roles, 3, 0)
    assert plan.roles["rollout"][0].resources["GPU"] == 0.5
    assert plan.spare_bundle == {"CPU": 0.5, "GPU": 1.0}
    assert bundles(make({"min": 1, "max": 5}, algorithm={"type": "sft"}), "cpu").spare == 0


def test_the_configuration_keeps_what_was_written() -> None:
    assert "replicas: {min: 1, max: 4}" in dump_yaml(make({"min": 1, "max": 4}))
    assert make(3).rollout.replicas == 3 and not make({"min": 3, "max": 3}).rollout.elastic
    assert config_hash(make({"min": 1, "max": 4})) != config_hash(make(1)) != config_hash(make(4))


@pytest.mark.parametrize(
    ("replicas", "said"),
    [
        ({"max": 3}, 'rollout.replicas={"max": 3}: lacks min'),
        ({"min": 0, "max": 3}, "rollout.replicas.min=0: must be greater than 0"),
        ({"min": "a", "max": 3}, "rollout.replicas.min=a: must be a whole number"),
        (
            {"min": 1, "max": 3, "mx": 3},
            "unknown key rollout.replicas.mx (value 3): the nearest key is rollout.",
        ),
        (0, "rollout.replicas=0: must be greater than 0"),
    ],
)
def test_a_bad_pool_is_one_line(replicas: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make(replicas)
    assert str(error.value).startswith(f"configuration: {said}") and "\n" not in str(error.value)


def test_the_plan_says_what_it_starts_with_and_what_it_may_take() -> None:
    config = make({"min": 1, "max": 4}, placement={"type": "disaggregated"})
    plan, output = bundles(config, "cpu"), io.StringIO()
    console = Console(file=output, width=200)
    print_placement(plan, [Node({"CPU": 9.0})], console)
    print_memory(memory(config), plan, console)
    said = output.getvalue()
    assert "rollout replicas: starts with 1, on the bundles above; up to 4 as the cluster has room, " in said
    assert "each further one CPU 0.5; with 4 the run takes CPU 3" in said
    assert ["rollout", "1 to 4"] in [
        [cell.strip() for cell in line.split("│")[1:3]] for line in said.splitlines()
    ]
    assert memory(config)[0].ranks == 4


# --- a replica that is lost -----------------------------------------------------------------------


class Ended:
    """Stands in for the process monitor: who was ended and forgotten."""

    def __init__(self) -> None:
        self.groups: list[object] = ["the run's own"]
        self.ended: list[int] = []

    def end_process(self, process: ActorProcess, seconds: float) -> None:
        self.ended.append(process.rank)

    def remove(self, process: ActorProcess) -> None:
        pass


class Spawned(Exception):
    pass


def pool_of(size: int, replicas: Any, replacements: int = 1) -> tuple[RolloutPool, RolloutWorkers, list[str]]:
    """A pool whose run began with `size` replicas more than its least."""
    config = make(replicas)
    plan: PlacementPlan = bundles(config, "cpu")
    least = len(plan.roles["rollout"])
    workers = RolloutWorkers([ActorProcess("rollout", rank, None) for rank in range(least)], config, None)
    workers.monitor = Ended()
    said: list[str] = []

    def spawn(*_: object) -> ActorProcess:
        raise Spawned

    pool = RolloutPool(config, plan, workers, spawn, lambda _: None, said.append, replacements)
    for rank in range(least, size):
        workers.processes.append(ActorProcess("rollout", rank, None))
        pool._places[rank] = pools.Place("none", plan.roles["rollout"][0], own=False)
    return pool, workers, said


def failure(rank: int, phase: str = "generate", role: str = "rollout") -> GroupFailure:
    return GroupFailure("it is gone", role=role, rank=rank, phase=phase)


@pytest.mark.parametrize("phase", ["generate", "sync"])
def test_above_the_least_a_lost_replica_leaves_and_the_others_keep_their_ranks(phase: str) -> None:
    pool, workers, said = pool_of(4, {"min": 2, "max": 4})
    pool.lost(failure(1, phase))
    pool.lost(failure(3, phase))
    assert [process.rank for process in workers.processes] == [0, 2]
    assert workers.monitor.ended == [1, 3]
    assert said == ["replica 1 left, 3 go on: it is gone", "replica 3 left, 2 go on: it is gone"]
    with pytest.raises(Spawned):  # two are the least: this one is replaced
        pool.lost(failure(2))
    assert [process.rank for process in workers.processes] == [0, 2]


def test_of_a_node_that_does_not_answer_nothing_is_asked_until_it_is_known_to_be_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool, workers, said = pool_of(3, {"min": 1, "max": 3})
    workers.processes[2] = ActorProcess("rollout", 2, None, node_id="silent")
    given: list[object] = []
    monkeypatch.setattr(pool, "_give_back", given.append)
    lost = failure(2)
    lost.state = SILENT_NODE
    pool.lost(lost)
    assert workers.monitor.ended == [] and len(workers) == 2 and len(said) == 1
    pool._pay({"silent", "other"})
    assert given == [] and "silent" in pool._shunned
    pool._pay({"other"})
    assert workers.monitor.ended == [2] and len(given) == 1 and not pool._shunned and not pool._owed


@pytest.mark.parametrize(("node", "after"), [("a", 31.0), ("", 301.0)])
def test_a_place_on_a_node_that_had_room_is_soon_asked_for_again_and_one_to_come_is_waited_for(
    node: str, after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _, said = pool_of(1, {"min": 1, "max": 2})
    monkeypatch.setattr(pools.ray, "wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr(pools, "placement_group_table", lambda _: {"state": "PENDING"})
    forgotten: list[object] = []
    monkeypatch.setattr(pool, "_forget", forgotten.append)
    place = pools.Place("own", pool._plan.roles["rollout"][0], own=True)
    for spent, given_up in ((after - 2, 0), (after, 1)):
        begun = time.monotonic() - spent
        opening = pools.Opening(ActorProcess("rollout", 7, None), place, node, "where", "opened", begun)
        pool._look_at(opening, {"a"})
        assert len(forgotten) == given_up
    assert said == [f"replica 7 was given no place in {after:.0f} s"]


@pytest.mark.parametrize(
    ("size", "replicas", "replacements", "lost"),
    [
        (2, {"min": 2, "max": 3}, 1, failure(1, "sync")),
        (2, 2, 0, failure(1)),
        (1, {"min": 1, "max": 3}, 1, failure(0)),
        (2, {"min": 1, "max": 3}, 1, failure(0, role="policy")),
        (2, {"min": 1, "max": 3}, 1, failure(7)),
    ],
    ids=["least, in a sync", "no replacement left", "the only one", "a learner", "somebody else"],
)
def test_everything_else_is_a_failure_of_the_group(
    size: int, replicas: Any, replacements: int, lost: GroupFailure
) -> None:
    pool, workers, said = pool_of(size, replicas, replacements)
    with pytest.raises(GroupFailure) as raised:
        pool.lost(lost)
    assert raised.value is lost and len(workers) == size and not said


# --- the same samples, whoever makes them ---------------------------------------------------------


@dataclass(eq=False)
class Ref:
    """Of an answer, or of none from a dead actor."""

    answer: Any
    alive: bool


class Sampler:
    """Stands in for an actor: its answer is a function of the request alone."""

    def __init__(self, alive: bool) -> None:
        self.alive, self.generate = alive, SimpleNamespace(remote=self.ask)

    def ask(self, requests: Sequence[GenerationRequest], _: object) -> Ref:
        made = [
            Generation(
                token_ids=(r.seed, *r.prompt_ids), logprobs=(0.0,), text=str(r.seed), finish_reason="stop"
            )
            for r in requests
        ]
        return Ref((made, 3, 0.5), self.alive)


class Workers(RolloutWorkers):
    """Waits without Ray."""

    def _finish(self, pending: Pending, started: float, unless: object) -> None:
        for ref, process in list(pending.refs.items()):
            if not ref.alive:
                raise failure(process.rank)
            pending.results[process.rank] = ref.answer
            del pending.refs[ref]


def sampled(replicas: int, dead: Iterable[int] = ()) -> tuple[list[RolloutGroup], Workers]:
    config = make(1, rollout={})
    renderer: Any = SimpleNamespace(prompt_ids=lambda prompt: tuple(range(len(prompt.question))))
    processes = [ActorProcess("rollout", 2 * rank, Sampler(rank not in dead)) for rank in range(replicas)]
    workers = Workers(processes, config, renderer)

    def leave(lost: GroupFailure) -> None:
        workers.processes = [process for process in workers.processes if process.rank != lost.rank]

    workers.lost = leave
    return workers.generate(PROMPTS, "train/1", samples_per_prompt=3), workers


@given(replicas=st.integers(2, 6), dead=st.sets(st.integers(0, 5)))
def test_samples_do_not_depend_on_how_many_replicas_there_are_or_die(replicas: int, dead: set[int]) -> None:
    alone, _ = sampled(1)
    some = {rank for rank in dead if rank < replicas - 1}
    groups, workers = sampled(replicas, some)
    assert groups == alone
    assert len(workers) == replicas - len(some)
    seeds = [rollout.seed for group in groups for rollout in group.rollouts]
    assert len(set(seeds)) == 3 * len(PROMPTS)


def test_a_lost_replica_is_a_failure_where_nobody_takes_it_out() -> None:
    workers = Workers(
        [ActorProcess("rollout", 0, Sampler(False))], make(1), SimpleNamespace(prompt_ids=lambda _: (1,))
    )
    with pytest.raises(GroupFailure):
        workers.generate(PROMPTS, "train/1")
