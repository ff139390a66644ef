"""What the benchmarks compute from what they measure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.compare import compared, results
from benchmarks.growth import exponents, slope, table
from benchmarks.learner_bare import Bare, operations
from benchmarks.mlflow_load import blocks, last_over_first
from benchmarks.shared import SIZES, Traces, make_model
from benchmarks.step_shares import shares
from rairl_ray.config.estimate import shape_of
from rairl_ray.config.schema import Model
from rairl_ray.errors import UserError


def test_growth_is_the_exponent_of_a_power() -> None:
    sizes = [16, 32, 64, 128]
    assert slope(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    # one round is linear, one constant: the median of two is between them, the extremes are theirs
    rows = [{"axis": "samples", "size": n, "seconds": {"policy": [n / 16, 1.0]}} for n in reversed(sizes)]
    found = exponents(rows)["samples"]["policy"]
    assert found["sizes"] == sizes and found["seconds"] == [1.0, 1.5, 2.5, 4.5]
    assert (found["exponent_min"], found["exponent_max"]) == (pytest.approx(0.0), pytest.approx(1.0))
    assert 0.0 < found["exponent"] < 1.0
    assert "| samples | 16, 32, 64, 128 | policy | 1, 1.5, 2.5, 4.5 | 0.72 (0.00 to 1.00) |" in table(
        {"samples": {"policy": found}}
    )


@pytest.mark.parametrize(("lora", "above"), [(None, 1.0), (16, 1.1)])
def test_operations_are_those_that_torch_counts(lora: int | None, above: float, tmp_path: Path) -> None:
    """All but attention, which torch does not count on a CPU; under LoRA the formula is a little above, since
    the first layer needs no gradient by its inputs."""
    traces = Traces(prompts=2, group=4, prompt=60, completion=30, vocabulary=300)
    path = make_model(tmp_path, SIZES["0.5M"], traces.vocabulary)
    shape = shape_of(Model(path=path))
    assert shape is not None
    bare = Bare("policy", path, lora, traces, packed=True)
    with FlopCounterMode(display=False) as counter:
        bare()
    counted = counter.get_total_flops()
    pairs = 2 * 60 * 60 / 2 + 8 * 30 * (60 + 30 / 2)
    attention = 3 * 4 * shape.layers * shape.heads * shape.head_size * pairs
    matrices = operations(shape, traces, 2 * (60 + 4 * 30), lora) - attention
    assert counted * 0.9999 <= matrices <= counted * above * 1.0001
    assert len(bare.inputs["position_ids"][0]) == 2 * (60 + 4 * 30)


def test_shares_of_a_runs_steps(tmp_path: Path) -> None:
    """The first step is not counted, and of a step that a resume made again the last row is."""
    rows = [
        {"step": 1, "time/policy": 90.0, "time/other": 10.0, "time/step": 100.0},
        {"step": 2, "time/policy": 7.0, "time/other": 1.0, "time/step": 8.0},
        {"step": 2, "time/policy": 2.0, "time/other": 2.0, "time/step": 4.0},
        {"step": 3, "time/policy": 9.0, "time/other": 1.0, "time/step": 10.0},
        {"step": 3, "eval/pass_at_1": 0.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = shares(tmp_path, skip=1)
    other = found["phases"]["time/other"]
    assert found["steps"] == 2 and (other["median"], other["min"], other["max"]) == (1.5, 1.0, 2.0)
    assert other["share"] == pytest.approx((0.5 + 0.1) / 2) and other["share_of_all"] == pytest.approx(3 / 14)
    with pytest.raises(UserError, match="has 3 timed steps, and --skip=3 leaves none"):
        shares(tmp_path, skip=3)
    with pytest.raises(UserError, match="has no metrics"):
        shares(tmp_path / "elsewhere", skip=0)


def test_blocks_of_a_load_on_mlflow() -> None:
    """Trials by the time of their end, whatever their order; a question belongs to the block of its time."""
    rows = [(float(end), end / 10, 20 + end, f"id{end}") for end in (4, 1, 3, 2)]
    asked = [(0.5, 1.0, 10.0), (1.9, 3.0, 10.0), (3.5, 8.0, 20.0), (9.0, 99.0, 99.0)]
    first, last = blocks(rows, asked, 2)
    assert first["trials"] == 2 and last["trials"] == 4
    assert first["trial_seconds"] == {"median": pytest.approx(0.15), "min": 0.1, "max": 0.2}
    assert first["search_seconds"]["median"] == 2.0 and last["search_seconds"]["median"] == 8.0
    ratios = last_over_first([first, last])
    assert ratios["search_seconds"] == 4.0 and ratios["run_seconds"] == 2.0
    assert ratios["requests"] == pytest.approx(23.5 / 21.5) and "trials" not in ratios


def test_a_ratio_that_fell_is_shown(tmp_path: Path) -> None:
    spread = {"median": 0.8, "min": 0.1, "max": 2.0}
    result = {"roles": {"policy": {"bare_over_ours": spread, "seconds": spread}}, "ratio_median": 2.0}
    (tmp_path / "learner.json").write_text(json.dumps(result))
    (tmp_path / "sync.json").write_text(json.dumps({"sync_over_copy": spread, "last_over_first": {"run": 3.0}}))
    now = results(tmp_path)
    policy, copied = "learner:roles.policy.bare_over_ours", "sync:sync_over_copy"
    assert now == {policy: 0.8, "learner:ratio": 2.0, copied: 0.8, "sync:last_over_first.run": 3.0}
    kept = {policy: 0.9, "learner:ratio": 1.9, copied: 0.7}
    assert list(compared(now, kept, 0.1)) == [
        f"FELL  {policy}: 0.9 -> 0.8 (-11%)",
        "held  learner:ratio: 1.9 -> 2 (+5%)",
        f"FELL  {copied}: 0.7 -> 0.8 (+14%)",
        "new   sync:last_over_first.run: 3",
    ]
