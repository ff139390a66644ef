"""`run(placement_group=...)`: a run lives in the group that it is given, and leaves it as it was."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from rairl_ray.actors.process_monitor import MARK
from rairl_ray.errors import PlacementError
from rairl_ray.trainer.run import run as run_of
from rairl_ray.trainer.worker_groups import place
from tests.faults import marked_processes
from tests.inprocess import config_of, differing, rows_in, run

pytestmark = pytest.mark.usefixtures("one_cluster")

WORDS = ("trainer.steps=3", "trainer.checkpoint_every=1", "trainer.retry_backoff_seconds=0.1")


def groups() -> set[str]:
    return {name for name, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[PlacementGroup]:
    made = placement_group(list(place(config_of("grpo", tmp_path)).bundles))
    yield made
    remove_placement_group(made)


def test_a_group_that_does_not_fit_is_refused_and_stays(tmp_path: Path) -> None:
    small = placement_group([{"CPU": 0.01}])
    with pytest.raises(PlacementError, match=r"bundle 0 has \{'CPU': 0.01\}, the run needs \{'CPU': 0.5\}"):
        run_of(config_of("grpo", tmp_path), placement_group=small)
    for words, why in (
        (("sft", tmp_path), "algorithm.type=sft: Ray Train places"),
        (("grpo", tmp_path, "rollout.replicas={min: 1, max: 2}"), "rollout.replicas"),
        (("grpo", tmp_path, "warm_start=experiments/demo/sft.yaml"), "sft.yaml: train that first"),
    ):
        with pytest.raises(PlacementError, match=why) as refused:
            run_of(config_of(*words), placement_group=small)
        assert "\n" not in str(refused.value)
    assert groups() == {small.id.hex()} and not list(tmp_path.glob("demo/*/*"))
    remove_placement_group(small)


@pytest.mark.slow
def test_a_run_lives_in_the_group_it_is_given_even_after_a_failure(
    tmp_path: Path, group: PlacementGroup
) -> None:
    whole = run(config_of("grpo", tmp_path / "own", *WORDS))
    seen: list[set[str]] = []

    def hears(step: int, _: Mapping[str, float]) -> None:
        seen.append(groups())
        if len(seen) == 1:
            learners = [one for one in marked_processes() if "/policy/" in one.environ()[MARK]]
            learners[0].send_signal(signal.SIGKILL)

    ended = run_of(config_of("grpo", tmp_path / "lent", *WORDS), sinks=[hears], placement_group=group)
    assert ended.status == "finished" and differing(rows_in(ended.folder), whole) == []
    assert "recovered from the failure of policy" in (ended.folder.root / "events.log").read_text()
    assert len(seen) >= 3 and all(here == {group.id.hex()} for here in seen), seen
    assert groups() == {group.id.hex()}, "the group stays"
    assert not psutil.wait_procs(marked_processes(), timeout=20)[1], "the actors do not"
