"""What a report says of a sweep, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.report.collect import Sweep, collect
from rairl_ray.report.coordinates import NOT_COUNTED, SPREAD, heights, lines
from rairl_ray.report.parts import Absent
from rairl_ray.report.report import make_report
from rairl_ray.report.seeds import over_seeds
from rairl_ray.report.sweeps import best_first, best_parts, cost_of, effect_parts, levels, results
from rairl_ray.report.tasks import density_by_task
from rairl_ray.runfolder import RunFolder, write_summary
from rairl_ray.sweep.file import axes, load_sweep
from rairl_ray.sweep.points import SAVED, sweep_folder, trial_folder, trials
from tests.report.test_report import Page
from tests.report.test_report_parts import Parts
from tests.report_material import read_csv
from tests.sweeps import DEMO, written

PASS = "eval/pass_at_1"
T1, T2 = 12.706204736, 4.302652730
"""Student's t at 97.5% with 1 and 2 degrees of freedom."""


def folder_with(root: Path, config: Any, summary: dict[str, float], *steps: dict[str, float]) -> RunFolder:
    run = RunFolder(root)
    run.create()
    run.write_config(dump_yaml(config))
    for step in steps:
        run.append_metrics(int(step["step"]), {key: value for key, value in step.items() if key != "step"})
    entries = {name: {"value": value} for name, value in summary.items()}
    write_summary(run.evaluation("final") / "summary.json", entries)
    return run


def make_sweep(tmp_path: Path, values: list[float | None], **changes: Any) -> tuple[Path, Sweep]:
    """A sweep whose trials reached `values`, in order; None: has no folder."""
    file = load_sweep(written(tmp_path, **changes))
    folder = sweep_folder(file)
    folder.mkdir(parents=True)
    (folder / SAVED).write_text(file.model_dump_json())
    for item, value in zip(trials(file), values, strict=True):
        if value is not None:
            row = {"step": 1, "time/step": 60.0, "rollout/tokens": 100.0}
            folder_with(trial_folder(file, item.id), item.config, {file.metric: value}, row)
    (sweep,) = collect([str(folder)]).sweeps
    return folder, sweep


def test_a_mean_over_seeds_has_students_interval() -> None:
    found = over_seeds({0: [0.2, 0.4], 1: [0.5, math.nan], 2: [math.nan]}, "percent")
    assert found is not None and found.kind == "percent"
    # the seeds' means are 0.3 and 0.5: half of their distance is also the standard error
    assert found.value == pytest.approx(0.4)
    assert (found.low, found.high) == pytest.approx((0.4 - T1 * 0.1, 0.4 + T1 * 0.1))
    alone = over_seeds({3: [0.25, 0.75]})
    assert alone is not None and alone.value == 0.5 and math.isnan(alone.low)
    assert over_seeds({0: [math.nan]}) is None


def test_the_effect_of_an_axis_by_hand(tmp_path: Path) -> None:
    space = {"reward.density.type": ["sparse", "dense"], "policy.learning_rate": [1e-5, 1e-4]}
    # points in the file's order, seeds 0 and 1 of each; one trial is missing
    reached = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.6, None]
    _, sweep = make_sweep(tmp_path, reached, space=space)
    sparse, dense, slow, fast = levels(sweep, results(sweep))
    assert [level.name for level in (sparse, dense, slow, fast)] == ["sparse", "dense", "1e-05", "0.0001"]
    assert [level.trials for level in (sparse, dense, slow, fast)] == [4, 3, 4, 3]
    assert sparse.mean is not None and dense.mean is not None and dense.against_first is not None
    # seed 0: (0.1 + 0.3) / 2, seed 1: (0.2 + 0.4) / 2
    assert sparse.mean.value == pytest.approx(0.25)
    assert sparse.mean.high - sparse.mean.value == pytest.approx(T1 * 0.05)
    # seed 0: (0.5 + 0.6) / 2 = 0.55, seed 1: 0.7 alone
    assert dense.mean.value == pytest.approx(0.625)
    # pairs of seed 0: 0.4 and 0.3; of seed 1: 0.5, for the other has no partner
    assert dense.against_first.value == pytest.approx((0.35 + 0.5) / 2)
    assert dense.against_first.high - dense.against_first.value == pytest.approx(T1 * 0.075)
    assert sparse.against_first is None
    # learning rates: seed 0 pairs 0.3 - 0.1 and 0.6 - 0.5; seed 1 has 0.4 - 0.2
    assert fast.against_first is not None and fast.against_first.value == pytest.approx((0.15 + 0.2) / 2)
    figure, table = effect_parts(sweep)
    assert table.columns[3] == "pass@1" and len(table.rows) == 4  # type: ignore[union-attr]
    assert figure.name == "axes_effects"  # type: ignore[union-attr]


def test_a_range_is_told_in_thirds_and_an_axis_counts_where_it_counts(tmp_path: Path) -> None:
    space = {
        "reward.density.type": {"choice": ["sparse", "interval"]},
        "reward.density.every": {"choice": [5, 9], "when": {"reward.density.type": "interval"}},
        "policy.learning_rate": {"loguniform": [1e-5, 1e-3]},
    }
    search = {"type": "random", "seed": 2}
    file = load_sweep(written(tmp_path, space=space, search=search, trials=9, seeds=[0]))
    planned = trials(file)
    rates = sorted(item.config.policy.learning_rate for item in planned)
    reached = [float(rates.index(item.config.policy.learning_rate)) for item in planned]
    _, sweep = make_sweep(tmp_path, list(reached), space=space, search=search, trials=9, seeds=[0])
    made = levels(sweep, results(sweep))
    thirds = [level for level in made if level.axis == "policy.learning_rate"]
    assert [level.trials for level in thirds] == [3, 3, 3]
    assert [level.mean.value for level in thirds if level.mean] == [1.0, 4.0, 7.0]
    # no two trials agree in all else: the seeds' means are compared
    assert [level.against_first.value for level in thirds if level.against_first] == [3.0, 6.0]
    every = [level for level in made if level.axis == "reward.density.every"]
    interval = sum(item.config.reward.density.type == "interval" for item in planned)
    assert 0 < sum(level.trials for level in every) == interval < 9


def test_the_best_is_the_lowest_where_less_is_better(tmp_path: Path) -> None:
    folder, sweep = make_sweep(tmp_path, [0.3, 0.2, math.nan, 0.4], metric="calibration/ece", mode="min")
    planned = trials(sweep.file)
    found = best_first(sweep, results(sweep))
    assert [result.trial for result in found] == [planned[1].id, planned[0].id, planned[3].id]
    table, listing = best_parts(sweep)
    (cells,) = table.rows  # type: ignore[union-attr]
    assert table.columns == ("trial", "ECE", "reward.density.type", "seed")  # type: ignore[union-attr]
    assert (cells[0], *cells[2:]) == (planned[1].id, "sparse", "1") and cells[1].value == 0.2  # type: ignore[union-attr]
    assert "is written when the sweep ends" in table.note  # type: ignore[union-attr]
    assert "seed: 1" in listing.text  # type: ignore[union-attr]
    (folder / "best.yaml").write_text("name: best\n")
    table, listing = best_parts(sweep)
    assert f"As an experiment file: {folder / 'best.yaml'}." in table.note  # type: ignore[union-attr]
    assert listing.text == "name: best\n"  # type: ignore[union-attr]


def test_a_trials_cost_is_the_sum_of_its_steps(tmp_path: Path) -> None:
    folder, sweep = make_sweep(tmp_path, [0.5, None, None, 0.25])
    run = RunFolder(folder / "trials" / trials(sweep.file)[0].id)
    # a step that a resume made again counts once, as it is now; null is no time
    run.append_metrics(1, {"time/step": 30.0, "rollout/tokens": 50.0})
    run.append_metrics(2, {"time/step": 90.0})
    run.append_metrics(3, {"time/step": math.nan})
    sweep = collect([str(folder)]).sweeps[0]
    assert cost_of(sweep.runs[run.root.name]) == (2, 120.0, 50.0)
    rows = Parts(folder).table("cost")
    assert [row["trial"] for row in rows] == [*sweep.runs, "all 2"]
    total = rows[-1]
    assert (total["steps"], float(total["hours"]), total["seconds a step"]) == ("3", 180 / 3600, "60")
    assert total["sampled tokens"] == "150" and total["pass@1"] == ""


def test_lines_of_parallel_coordinates(tmp_path: Path) -> None:
    space = {
        "reward.density.type": ["sparse", "interval"],
        "reward.density.every": {"grid": [5, 9], "when": {"reward.density.type": "interval"}},
    }
    _, sweep = make_sweep(tmp_path, [0.5, 0.7, 0.1, 0.1, 0.2, 0.4], space=space)
    found = lines(sweep)
    # a point is the mean of its seeds; the best is drawn last
    assert [line.value for line in found] == pytest.approx([0.1, 0.3, 0.6])
    kind, every = axes(sweep.file)
    places, ticks = heights(kind, found)
    assert ticks == [(0.0, "sparse"), (1.0, "interval")]
    assert places == pytest.approx([1 - SPREAD, 1.0, 0 + SPREAD])
    places, ticks = heights(every, found)
    assert [text for _, text in ticks] == [NOT_COUNTED, "5", "9"]
    assert places == pytest.approx([ticks[1][0] - SPREAD, 1.0, SPREAD])


def test_a_range_keeps_its_scale(tmp_path: Path) -> None:
    space = {"policy.learning_rate": {"loguniform": [1e-5, 1e-3]}}
    search = {"type": "random"}
    _, sweep = make_sweep(tmp_path, [0.1, 0.2, 0.3], space=space, search=search, trials=3, seeds=[0])
    found = lines(sweep)
    places, ticks = heights(axes(sweep.file)[0], found)
    rates = np.array([line.values["policy.learning_rate"] for line in found])
    assert places == pytest.approx(np.log10(rates / 1e-5) / 2)
    assert ticks == [(0.0, "1e-05"), (1.0, "0.001")]


def test_density_by_dataset_with_its_baselines(tmp_path: Path) -> None:
    countdown = ["data.countdown={numbers: 3, largest: 9}"]

    def run(name: str, *overrides: str, step: bool = True, **summary: float) -> Path:
        file = DEMO.replace("airl.yaml", "sft.yaml") if "sft" in name else DEMO
        given = [f"name={name}", *([] if "sft" in name else ["warm_start=null"]), *overrides]
        entries = {f"eval/{key}": value for key, value in summary.items()}
        steps = [{"step": 1.0, "time/step": 1.0}] if step else []
        return folder_with(tmp_path / name, load_config(file, given), entries, *steps).root

    dense = "reward.density.type=dense"
    places = [
        run("d0", dense, "seed=0", pass_at_1=0.5, rerank_at_1=0.75),
        run("d1", dense, "seed=1", pass_at_1=0.7, rerank_at_1=0.75),
        run("d2", dense, "seed=2", pass_at_1=0.6, rerank_at_1=0.75),
        run("c0", dense, "data.task=countdown", *countdown, pass_at_1=0.25),
        run("s0", "reward.density.type=sparse", pass_at_1=0.4, rerank_at_1=0.5),
        run("i9", "reward.density.type=interval", "reward.density.every=9", pass_at_1=0.45),
        run("i20", "reward.density.type=interval", "reward.density.every=20", pass_at_1=0.42),
        run("g0", "algorithm.type=grpo", pass_at_1=0.35),
        run("sft", pass_at_1=0.3),
        run("plain", "algorithm.type=grpo", step=False, pass_at_1=0.1),
    ]
    # what SFT evaluated before its first step is the untrained model, too: of the same seed
    write_summary(RunFolder(tmp_path / "sft").evaluation("start") / "summary.json", {PASS: {"value": 0.2}})
    runs = collect([str(place) for place in places]).runs
    first, second = density_by_task(runs, "eval/rerank_at_1")
    assert first.columns == ("", "arithmetic", "countdown")  # type: ignore[union-attr]
    rows = {row[0]: row[1:] for row in first.rows}  # type: ignore[union-attr]
    assert list(rows) == ["untrained", "SFT", "GRPO", "sparse", "interval 20", "interval 9", "dense"]
    values = {name: [None if cell is None else cell.value for cell in row] for name, row in rows.items()}  # type: ignore[union-attr]
    assert values["untrained"] == [pytest.approx(0.15), None]
    assert values["SFT"] == [0.3, None] and values["GRPO"] == [0.35, None]
    assert values["dense"] == [pytest.approx(0.6), 0.25]
    number = rows["dense"][0]
    assert number.high - number.value == pytest.approx(T2 * 0.1 / math.sqrt(3))  # type: ignore[union-attr]
    assert [row[0] for row in second.rows] == ["sparse", "dense"]  # type: ignore[union-attr]
    with pytest.raises(Absent, match="of one density or method"):
        density_by_task(runs[:3], None)


def test_the_report_of_a_sweep_has_all_of_it(tmp_path: Path) -> None:
    folder, _ = make_sweep(tmp_path, [0.25, 0.5, 0.5, 0.75])
    paths, missing = make_report([str(folder)])
    page = Page(paths[0])
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references)
    mine = ("Best configuration", "Axes", "Cost", "Density by dataset")
    assert not [part for part in missing if part.title.startswith(mine) or part.fault == "report"]
    assert all(title in page.text for title in mine)
    rows = read_csv(folder / "report" / "tables" / "axes.csv")
    assert [(row["value"], row["pass@1"]) for row in rows] == [("sparse", "0.375"), ("dense", "0.625")]
    for name in ("axes_effects", "parallel_coordinates"):
        assert (folder / "report" / "figures" / f"{name}.png").stat().st_size > 3000
    # settings that cannot be read cost the sweep's own sections, not the report
    (folder / SAVED).write_text("{}")
    paths, _ = make_report([str(folder)])
    text = Page(paths[0]).text
    assert "sweep.json: cannot be read" in text and "Every run" in text and "Parallel" not in text
