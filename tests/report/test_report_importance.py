"""How much of a sweep's variance each axis explains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from rairl_ray.report.importance import importance_parts, importances
from rairl_ray.report.parts import Absent
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.points import Trial, trials
from tests.report.test_report_parts import Parts
from tests.report.test_report_sweeps import make_sweep
from tests.sweeps import written

RATE, KIND, GAMMA = "policy.learning_rate", "reward.density.type", "advantage.gamma"
SPACE: dict[str, Any] = {
    RATE: [1e-5, 1e-4, 1e-3],
    KIND: ["sparse", "dense"],
    GAMMA: [0.3, 0.5, 0.7],
}


def reached(item: Trial) -> float:
    """Additive over the axes: the rate adds 0, 0.1 or 0.2, dense adds 0.1, gamma nothing."""
    return 0.1 * (math.log10(item.values[RATE]) + 5) + 0.1 * (item.values[KIND] == "dense")


def test_shares_are_those_of_the_analysis_of_variance(tmp_path: Path) -> None:
    values = [reached(item) for item in trials(load_sweep(written(tmp_path, space=SPACE)))]
    folder, sweep = make_sweep(tmp_path, list(values), space=SPACE)
    shares = importances(sweep)
    # population variances on the full grid: 0.02 / 3 by the rate, 0.01 / 4 by the density
    rate, kind = 0.02 / 3, 0.01 / 4
    assert shares[RATE] == pytest.approx(rate / (rate + kind), abs=0.08)
    assert shares[KIND] == pytest.approx(kind / (rate + kind), abs=0.08)
    assert shares[GAMMA] < 0.02 and sum(shares.values()) == pytest.approx(1)
    assert next(iter(shares)) == RATE and importances(sweep) == shares, "the forest is seeded"
    rows = Parts(folder).table("importance")
    assert [row["axis"] for row in rows] == list(shares)


def test_axes_that_count_in_some_trials_only_are_left_out(tmp_path: Path) -> None:
    space = {
        KIND: ["sparse", "interval"],
        "reward.density.every": {"grid": [5, 9], "when": {KIND: "interval"}},
        RATE: [1e-5, 1e-4],
    }
    numbers = [float(number % 5) for number in range(12)]
    _, sweep = make_sweep(tmp_path, list(numbers), space=space)
    _, table = importance_parts(sweep)
    assert {row[0] for row in table.rows} == {KIND, RATE}  # type: ignore[union-attr]
    assert "count in some trials only: reward.density.every." in table.note  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("space", "values", "said"),
    [
        ({RATE: [1e-5, 1e-4], GAMMA: [0.5]}, [0.1, 0.2, 0.3, 0.4], "fewer than two axes"),
        ({RATE: [1e-5, 1e-4], GAMMA: [0.3, 0.5]}, [0.1, 0.2, 0.3, 0.4, 0.5, None, None, None], "5 trials have"),
        ({RATE: [1e-5, 1e-4], GAMMA: [0.3, 0.5]}, [0.1] * 8, "reached the same"),
    ],
)
def test_what_cannot_be_told_is_absent(space: Any, values: Any, said: str, tmp_path: Path) -> None:
    _, sweep = make_sweep(tmp_path, values, space=space)
    with pytest.raises(Absent, match=said):
        importances(sweep)
