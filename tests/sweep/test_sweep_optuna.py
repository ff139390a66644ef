"""`search.type: optuna`: what is drawn, what Optuna is told, and that a resume goes on where the search was."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, RunFailure
from rairl_ray.sweep import run
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import Trial, drawn, drawn_file, stop_mark, sweep_folder, to_draw, trials
from rairl_ray.sweep.result import DONE, conclude, trial_state
from rairl_ray.sweep.search import REPEAT, Points, reached
from tests.runs import ROOT
from tests.stand_ins import objective, reports_the_objective
from tests.sweeps import end, table, written

METRIC = "eval/pass_at_1"
SPACE: dict[str, Any] = {
    "policy.learning_rate": {"loguniform": [1e-6, 1e-2]},
    "reward.density.type": ["sparse", "interval"],
    "reward.density.every": {"randint": [3, 40], "when": {"reward.density.type": "interval"}},
    "advantage.gamma": {"uniform": [0.2, 0.8]},
}


def optuna_sweep(folder: Path, **changes: Any) -> SweepFile:
    settings = {"search": {"type": "optuna", "seed": 3}, "space": SPACE, "trials": 16, "seeds": [0], **changes}
    folder.mkdir(exist_ok=True)
    return load_sweep(written(folder, **settings))


def go_on(file: SweepFile, most: int = 10_000, value: Callable[[Trial], Any] = objective) -> int:
    """One process of a sweep, a trial after the other, without Tune; killed in the one after `most`."""
    sweep_folder(file).mkdir(parents=True, exist_ok=True)
    left = [item for item in trials(file) if trial_state(file, item) not in DONE]
    search = Points(file, left, lambda item: {"item": item})
    for done in range(most):
        suggested = search.suggest(f"tune-{done}")
        if isinstance(suggested, str):
            return done
        item = suggested["spec"]["item"]
        found = value(item)
        end(file, item, found if isinstance(found, dict) else {METRIC: found})
        search.on_trial_complete(f"tune-{done}")
    search.suggest("killed while it ran")
    return most


def test_a_killed_search_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    whole, killed = optuna_sweep(tmp_path / "one"), optuna_sweep(tmp_path / "two")
    assert go_on(whole) == 16
    assert [go_on(killed, most) for most in (3, 9)] == [3, 9]
    assert go_on(killed) == 4 and to_draw(killed) == 0
    assert drawn(killed) == drawn(whole) and len(drawn(whole)) == 16
    states = [trial_state(killed, item) for item in trials(killed)]
    assert states == ["finished"] * 16
    # another seed of the search is another search
    other = optuna_sweep(tmp_path / "three", search={"type": "optuna", "seed": 4}, trials=3)
    go_on(other)
    assert not set(map(str, drawn(other))) & set(map(str, drawn(whole)))


def test_what_was_reached_guides_the_draw(tmp_path: Path) -> None:
    file, against = optuna_sweep(tmp_path / "max"), optuna_sweep(tmp_path / "min", mode="min")
    for item in (file, against):
        go_on(item)
    high, low = ([objective(item) for item in trials(searched)] for searched in (file, against))
    assert high[:10] == low[:10], "the first ten are drawn at random"
    assert min(high[10:]) > max(low[10:])
    for item in trials(file):
        interval = item.values["reward.density.type"] == "interval"
        assert ("reward.density.every" in item.values) == interval
        assert item.config.reward.density.every == item.values.get("reward.density.every", 15)
        assert 1e-6 <= item.config.policy.learning_rate <= 1e-2


def test_optuna_hears_the_mean_over_seeds_once_all_have_ended(tmp_path: Path) -> None:
    file = optuna_sweep(tmp_path, seeds=[0, 1, 2], trials=2)
    sweep_folder(file).mkdir(parents=True)
    search, told = Points(file, [], lambda item: {"id": item.id}), []
    heard = search._search.on_trial_complete
    search._search.on_trial_complete = lambda number, *rest: told.append(rest) or heard(number, *rest)
    names = [search.suggest(str(number)) for number in range(3)]
    first = trials(file)
    assert [name["spec"]["id"] for name in names] == [item.id for item in first] and len(drawn(file)) == 1
    for number, item in enumerate(first):
        assert told == []
        end(file, item, {METRIC: 0.3 * number})
        search.on_trial_complete(str(number))
    assert told == [({METRIC: pytest.approx(0.3)}, False)]
    assert [search.suggest(str(number)) for number in range(3, 7)][3] == "FINISHED"
    end(file, trials(file)[3], {METRIC: 0.5})
    end(file, trials(file)[4], {METRIC: math.nan})
    for number in (3, 4, 5):
        search.on_trial_complete(str(number), error=number == 5)
    assert told[1:] == [(None, True)]
    assert reached(file, first) == ({METRIC: pytest.approx(0.3)}, False)
    assert reached(file, trials(file)[3:5]) == (None, True)
    stopped = stop_mark(file, trials(file)[5].id)
    stopped.parent.mkdir()
    stopped.touch()
    assert reached(file, trials(file)[3:]) == (None, False), "bad, not failed"


def test_points_that_break_rules_or_repeat_are_drawn_anew(tmp_path: Path) -> None:
    space = {
        "discriminator.loss.type": ["bce", "bradley_terry"],
        "discriminator.demonstrations_per_update": [None, 4, 6],
    }
    file = optuna_sweep(tmp_path, space=space, trials=4)
    assert go_on(file, value=lambda item: 0.0) == 4
    points = [tuple(item.values.values()) for item in trials(file)]
    assert set(points) == {("bce", None), ("bce", 4), ("bce", 6), ("bradley_terry", None)}
    reasons = {row.refused for row in drawn(file)} - {None, REPEAT}
    assert reasons and all("demonstrations_per_update" in str(reason) for reason in reasons)
    # one more than there are: the search gives up, and says nothing of a fifth
    file = optuna_sweep(tmp_path, space=space, trials=5)
    before = len(drawn(file))
    assert go_on(file) == 0 and to_draw(file) == 1 and len(drawn(file)) == before + 100


def test_a_search_that_drew_nothing_good_says_so(tmp_path: Path) -> None:
    file = optuna_sweep(tmp_path)
    sweep_folder(file).mkdir(parents=True)
    with pytest.raises(RunFailure, match="no trial finished"):
        conclude(file, trials(file), Display("sw", 0))


def test_values_of_any_kind_come_back(tmp_path: Path) -> None:
    kinds: list[list[str]] = [["propagated_error"], ["numbers", "propagated_error"]]
    space = {"discriminator.perturbations.kinds": kinds, "advantage.scale": [True, False]}
    file = optuna_sweep(tmp_path, space=space, trials=4)
    go_on(file, most=3)
    go_on(file)
    seen = {
        (str(list(i.config.discriminator.perturbations.kinds)), i.config.advantage.scale) for i in trials(file)
    }
    assert seen == {(str(kind), scale) for kind in kinds for scale in (True, False)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": None}, "search.type=optuna: needs trials: N"),
        ({"space": {"reward.density.type": ["sparse"]}}, "trials=16: the space has 1 different points"),
        (
            {"overrides": {"warm_start": None, "discriminator.demonstrations_per_update": 4},
             "space": {"discriminator.loss.type": ["bradley_terry"],
                       "policy.learning_rate": {"uniform": [0.1, 0.2]}}},
            r"no good point among those tried\npoint discriminator.loss.type=bradley_terry",
        ),
        (
            {"overrides": {"warm_start": str(ROOT / "experiments/demo/sft.yaml")},
             "space": {"data.task": ["arithmetic", "countdown"], "advantage.gamma": {"uniform": [0, 1]}}},
            "space: its values change the warm start",
        ),
    ],
)  # fmt: skip
def test_a_bad_search_starts_nothing(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run.sweep(optuna_sweep(tmp_path, **changes))
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_cluster")
@pytest.mark.parametrize("more", [{}, {"metric": [METRIC, "eval/truncated"], "mode": ["max", "min"]}])
def test_tune_runs_the_search_and_its_resume(
    more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "trainable", reports_the_objective)
    alone = optuna_sweep(tmp_path / "alone", trials=4, seeds=[0, 1])
    go_on(alone)
    overrides = {"warm_start": None, "placement.cpus_per_actor": 0.25}
    settings: dict[str, Any] = {"seeds": [0, 1], "max_concurrent": 1, "overrides": overrides, **more}
    file = optuna_sweep(tmp_path, trials=2, **settings)
    assert run.sweep(file, display=Display("sw", 4)) == 0
    file = optuna_sweep(tmp_path, trials=4, **settings)
    assert run.sweep(file, resume=True, display=Display("sw", 8)) == 0
    assert [row["state"] for row in table(sweep_folder(file))] == ["finished"] * 8
    assert drawn_file(file).read_text() == drawn_file(alone).read_text()
    summary = json.loads((sweep_folder(file) / "summary.json").read_text())
    best = summary["front"][0] if more else summary["best"]
    assert best[METRIC] == max(objective(item) for item in trials(file))
