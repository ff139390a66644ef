"""A learner's state on another number of ranks, or at another ZeRO stage: the same bits, then the same updates.

Two ranks train two updates and save; one rank loads, trains a third and saves; two ranks load and train the
fourth. The reference is the two-rank run that never stopped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.deepspeed_rank import launch

STAGES = (0, 1, 2, 3)
# kind, precision, stages of the three parts of a run: 2 ranks, 1 rank, 2 ranks
PATHS: list[tuple[str, str, tuple[int, int, int]]] = [
    *[("policy", "float32", (stage, stage, stage)) for stage in STAGES],
    *[("policy-lora", "float32", (stage, stage, stage)) for stage in STAGES],
    ("shaped-lora", "float32", (3, 3, 3)),
    ("policy-lora", "bfloat16", (1, 1, 1)),
    ("policy", "bfloat16", (2, 2, 2)),
    ("policy-lora", "bfloat16", (3, 3, 3)),
    ("policy", "float32", (3, 1, 0)),
    ("policy-lora", "float32", (0, 3, 2)),
    ("policy", "bfloat16", (3, 1, 2)),
]
IDS = [f"{kind}-{dtype}-{''.join(map(str, stages))}" for kind, dtype, stages in PATHS]


def part(path: int, number: int, first: int, last: int, **places: str) -> dict[str, Any]:
    kind, dtype, stages = PATHS[path]
    name = f"{IDS[path]}/{'abc'[number]}"
    return {"name": name, "kind": kind, "dtype": dtype, "stage": stages[number], "steps_from": first,
            "steps_to": last, "sizes": [2, 1, 2, 1], **places}  # fmt: skip


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """IDS[i]/a, /b, /c: the three parts; IDS[i]/straight: two ranks from the start to the end."""
    folder, paths, limit = tmp_path_factory.mktemp("parts"), range(len(PATHS)), 1500
    two = [part(i, 0, 0, 2, save=f"{i}a") for i in paths]
    whole = [{**part(i, 0, 0, 4), "name": f"{IDS[i]}/straight"} for i in paths]
    third = [{**part(i, 0, 0, 3), "name": f"{IDS[i]}/third"} for i in paths]
    found = launch([*two, *third, *whole], folder, world=2, timeout=limit)
    found |= launch(
        [part(i, 1, 2, 3, load=f"{i}a", save=f"{i}b") for i in paths], folder, world=1, timeout=limit
    )
    found |= launch([part(i, 2, 3, 4, load=f"{i}b") for i in paths], folder, world=2, timeout=limit)
    return found


def largest_differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Largest absolute difference of weights, first and second moments."""
    assert one.keys() == other.keys() and one
    kinds = ("master", "exp_avg", "exp_avg_sq")
    return {k: max(float((one[n][k] - other[n][k]).abs().max()) for n in one) for k in kinds}


@pytest.mark.parametrize("name", IDS)
def test_what_is_loaded_is_what_was_saved_bit_for_bit(name: str, parts: dict[str, Any]) -> None:
    for before, after, version in (("a", "b", 2), ("b", "c", 3)):
        assert parts[f"{name}/{after}"]["client"] == {"version": version}
        saved, loaded = parts[f"{name}/{before}"]["trained"], parts[f"{name}/{after}"]["loaded"]
        assert set(largest_differences(saved, loaded).values()) == {0.0}
        assert any(values["exp_avg"].abs().max() > 0 for values in loaded.values())


@pytest.mark.parametrize("name", IDS)
def test_the_next_updates_are_those_of_the_run_that_never_stopped(name: str, parts: dict[str, Any]) -> None:
    rounding = 2e-3 if "bfloat16" in name else 2e-5
    for after, reference in (("b", "third"), ("c", "straight")):
        here, there = parts[f"{name}/{after}"], parts[f"{name}/{reference}"]
        differences = largest_differences(here["trained"], there["trained"])
        print(f"{name}/{after}", json.dumps(differences))
        assert differences["master"] < rounding
        assert differences["exp_avg"] < rounding and differences["exp_avg_sq"] < rounding
        now, then = here["reports"][-1], there["reports"][-1]
        assert now["learning_rate"] == then["learning_rate"]
        assert now["grad_norm"] == pytest.approx(then["grad_norm"], rel=2e-2 if "bfloat16" in name else 1e-5)
        moved = largest_differences(here["trained"], here["loaded"])["master"]
        assert moved > (2 if "bfloat16" in name else 10) * differences["master"]
        for tensor, other in zip(here["state"].values(), there["state"].values(), strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=4 * rounding)


def test_a_piece_that_is_missing_is_an_error(tmp_path: Path) -> None:
    from rairl_ray.engines.zero_shards import Saved, cut

    half = {kind: [(0, torch.ones(3))] for kind in ("master", "exp_avg", "exp_avg_sq")}
    saved = Saved({"w": half}, torch.tensor(1.0), [{}], {})
    with pytest.raises(ValueError, match="w: 3 of 6 values from 0 on are there"):
        cut(saved, [{"w": (2, 3)}], [6], [{"params": [0]}], stage=1, rank=0, ranks=1)
