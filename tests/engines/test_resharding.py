"""A learner's state on another number of ranks, or at another ZeRO stage: the same bits, then the same updates.

Two ranks train two updates and save; one rank loads, trains a third and saves; two ranks load and train the
fourth. The reference is the two-rank run that never stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rairl_ray.engines.zero_shards import Saved, reshard
from tests.deepspeed_rank import launch

STAGES = (0, 1, 2, 3)
# kind, precision, stages of the three parts of a run: 2 ranks, 1 rank, 2 ranks
Path3 = tuple[str, str, tuple[int, int, int]]
QUICK: list[Path3] = [
    ("policy", "float32", (2, 2, 2)),
    ("policy-lora", "float32", (3, 3, 3)),
    ("policy-lora", "bfloat16", (1, 1, 1)),
    ("policy", "float32", (3, 1, 0)),
]
SLOW: list[Path3] = [  # and, of the same kinds, the quick ones above
    *[("policy", "float32", (stage, stage, stage)) for stage in STAGES if stage != 2],
    *[("policy-lora", "float32", (stage, stage, stage)) for stage in STAGES if stage != 3],
    ("shaped-lora", "float32", (3, 3, 3)),
    ("implicit", "float32", (1, 1, 1)),
    ("policy", "bfloat16", (2, 2, 2)),
    ("policy-lora", "bfloat16", (3, 3, 3)),
    ("policy-lora", "float32", (0, 3, 2)),
    ("policy", "bfloat16", (3, 1, 2)),
]


def name_of(path: Path3) -> str:
    kind, dtype, stages = path
    return f"{kind}-{dtype}-{''.join(map(str, stages))}"


def part(path: Path3, number: int, first: int, last: int, **places: Any) -> dict[str, Any]:
    kind, dtype, stages = path
    name = f"{name_of(path)}/{number}"
    return {"name": name, "kind": kind, "dtype": dtype, "stage": stages[number], "steps_from": first,
            "steps_to": last, "sizes": [2, 1, 2, 1], **places}  # fmt: skip


def run(paths: Sequence[Path3], folder: Path) -> dict[str, Any]:
    """NAME/0: two ranks from start to end, saved after the second update; NAME/1, NAME/2: the others."""
    whole, second, third = [], [], []
    for path in paths:
        first_save, next_save = f"{name_of(path)}-saved-2", f"{name_of(path)}-saved-3"
        whole.append(part(path, 0, 0, 4, save={2: first_save}))
        second.append(part(path, 1, 2, 3, load=first_save, save={3: next_save}))
        third.append(part(path, 2, 3, 4, load=next_save))
    found = launch(whole, folder, world=2, timeout=800)
    found |= launch(second, folder, world=1, timeout=800)
    return found | launch(third, folder, world=2, timeout=800)


def largest_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of weights, first and second moments."""
    assert one.keys() == other.keys() and one
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {k: max(float((one[n][k] - other[n][k]).abs().max()) for n in one) for k in kinds}


def check(found: dict[str, Any], name: str) -> None:
    bfloat16 = "bfloat16" in name
    straight = found[f"{name}/0"]
    before = straight["after"][2]
    for number, step in ((1, 3), (2, 4)):
        here = found[f"{name}/{number}"]
        assert here["client"] == {"version": step - 1}
        # what is loaded is what was saved, bit for bit
        assert set(largest_differences(before, here["loaded"]).values()) == {0.0}
        assert any(values["exp_avg"].abs().max() > 0 for values in here["loaded"].values())
        # the next update is that of the run that never stopped, up to the order of sums
        now, then = here["after"][step], straight["after"][step]
        off = largest_differences(now, then)
        print(f"{name} update {step} on {number} rank(s): {json.dumps(off)}")
        assert max(off.values()) < (2e-4 if bfloat16 else 2e-7), off
        assert largest_differences(now, before)["master"] > (2 if bfloat16 else 1000) * off["master"]
        report, expected = here["reports"][step], straight["reports"][step]
        assert report["learning_rate"] == expected["learning_rate"]
        assert report["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2 if bfloat16 else 1e-5)
        before = now
    # the weights that the model computes with follow their masters
    for key, tensor in found[f"{name}/2"]["state"].items():
        torch.testing.assert_close(tensor, straight["state"][key], rtol=0, atol=4e-3 if bfloat16 else 2e-7)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(QUICK, tmp_path_factory.mktemp("quick"))


@pytest.mark.parametrize("name", [name_of(path) for path in QUICK])
def test_two_ranks_then_one_then_two(name: str, quick: dict[str, Any]) -> None:
    check(quick, name)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_every_stage_full_and_adapter(tmp_path: Path) -> None:
    found = run(SLOW, tmp_path)
    for path in SLOW:
        check(found, name_of(path))


def test_a_piece_that_is_missing_is_an_error() -> None:
    half = {kind: [(0, torch.ones(3))] for kind in ("master", "exp_avg", "exp_avg_sq")}
    saved = Saved({"w": half}, torch.tensor(1.0), [{}], {})
    with pytest.raises(ValueError, match="w: 3 of 6 values from 0 on are there"):
        reshard(saved, [{"w": (2, 3)}], [6], [{"params": [0]}], stage=1, rank=0, ranks=1)
