"""Sweeps with several metrics: what is refused, what Optuna hears and finds, and the front at the end."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rairl_ray.config.load import load_config
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, RunFailure
from rairl_ray.keys import keyed_random
from rairl_ray.report.report import make_report
from rairl_ray.sweep import run
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.points import Trial, drawn, sweep_folder, trials
from rairl_ray.sweep.result import conclude, front
from tests.sweep.test_sweep_optuna import go_on, optuna_sweep
from tests.sweeps import end, table, written

GOOD, SHORT = METRICS = ("eval/pass_at_1", "eval/completion_tokens")
TWO: dict[str, Any] = {"metric": list(METRICS), "mode": ["max", "min"]}


def two_values(item: Trial) -> dict[str, float]:
    """A front at rates from 1e-5 to 1e-3; gamma should be 0.5 for both."""
    rate = math.log10(item.config.policy.learning_rate) + 4
    off = 4 * (item.config.advantage.gamma - 0.5) ** 2
    return {GOOD: -((rate - 1) ** 2) - off, SHORT: (rate + 1) ** 2 + off}


def test_the_front_against_brute_force() -> None:
    draw = keyed_random("front")
    points = [tuple(draw.randrange(4) for _ in range(3)) for _ in range(60)]

    def beaten(point: tuple[int, ...]) -> bool:
        return any(
            min(a - b for a, b in zip(other, point, strict=True)) >= 0 and sum(other) > sum(point)
            for other in points
        )

    assert front(points) == [number for number, point in enumerate(points) if not beaten(point)]
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1], "equal ones do not beat each other"
    assert front([]) == []


def test_optuna_searches_both_and_a_kill_changes_nothing(tmp_path: Path) -> None:
    whole, killed = (optuna_sweep(tmp_path / name, trials=24, **TWO) for name in ("one", "two"))
    assert go_on(whole, value=two_values) == 24
    assert go_on(killed, 9, two_values) == 9 and go_on(killed, value=two_values) == 15
    assert drawn(killed) == drawn(whole)
    off = [sum(-v if k == GOOD else v for k, v in two_values(item).items()) for item in trials(whole)]
    assert sum(off[10:]) / 14 < sum(off[:10]) / 10, "what was reached guides the draw"


def test_the_end_writes_a_file_for_each_point_of_the_front(tmp_path: Path) -> None:
    space = {"policy.learning_rate": [1e-5, 1e-4, 1e-3, 1e-2]}
    file = load_sweep(written(tmp_path, space=space, seeds=[0], **TWO))
    planned, folder = trials(file), sweep_folder(file)
    folder.mkdir(parents=True)
    end(file, planned[0], {GOOD: 0.5})
    with pytest.raises(
        RunFailure, match=f"metric={GOOD} and {SHORT}: no finished trial has it; there are {GOOD}"
    ):
        conclude(file, planned, Display("sw", 4))
    (folder / "best-3.yaml").write_text("of an earlier end")
    for item, good, short in zip(planned[1:], (0.2, 0.6, 0.1), (10.0, 30.0, 20.0), strict=True):
        end(file, item, {GOOD: good, SHORT: short})
    assert conclude(file, planned, Display("sw", 4)) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["trial"] for row in summary["front"]] == [planned[2].id, planned[1].id]
    assert summary["metric"] == list(METRICS) and "best" not in summary
    assert [row["front"] for row in table(folder)] == ["False", "True", "True", "False"]
    assert [path.name for path in sorted(folder.glob("best*"))] == ["best-1.yaml", "best-2.yaml"]
    rates = [load_config(folder / f"best-{n}.yaml").policy.learning_rate for n in (1, 2)]
    assert rates == [1e-3, 1e-4] and load_config(folder / "best-1.yaml").name == "sw-best-1"


def test_the_report_shows_front_and_axes_by_each_metric(tmp_path: Path) -> None:
    space = {"policy.learning_rate": [1e-5, 1e-4], "advantage.gamma": [0.3, 0.5]}
    file = load_sweep(written(tmp_path, space=space, **TWO))
    folder = sweep_folder(file)
    for item in trials(file):
        end(file, item, two_values(item))
    (folder / run.SAVED).write_text(file.model_dump_json())
    (page, *files), missing = make_report([str(folder)])
    text = page.read_text()
    assert "Pareto front" in text and "Axes (pass@1)" in text and "Axes (tokens a completion)" in text
    names = {path.name for path in files}
    assert {"front.csv", "front.pdf"} <= names and sum("axes_effects" in name for name in names) >= 4
    assert not [part for part in missing if part.title.startswith(("Pareto", "Axes"))]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metric": list(METRICS)}, r"metric=\[.*\], mode=max: give each metric its mode, such as mode: \[max"),
        ({"metric": list(METRICS), "mode": ["max"]}, r"mode=\['max'\]: give each metric its mode"),
        ({"mode": ["max", "min"]}, r"metric=eval/pass_at_1, mode=.*: give each metric its mode"),
        ({"metric": [GOOD, GOOD], "mode": ["max", "min"]}, "must have two different names or more"),
        ({"metric": [GOOD], "mode": ["max"]}, "must have two different names or more"),
    ]
    + [
        ({**TWO, "scheduler": {"type": kind}}, rf"scheduler\.type={kind}: compares trials by one metric, but")
        for kind in ("asha", "hyperband", "median")
    ],
)  # fmt: skip
def test_several_metrics_that_contradict_are_one_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_sweep(written(tmp_path, **changes))
    assert len(str(error.value).splitlines()) == 1


def test_each_metric_must_come(tmp_path: Path) -> None:
    for order in itertools.permutations(["eval/pass_at_1", "eval/pass_at_16"]):
        with pytest.raises(ConfigError, match=r"metric=eval/pass_at_16: eval\.k=.* lacks 16"):
            trials(load_sweep(written(tmp_path, metric=list(order), mode=["max", "max"])))
