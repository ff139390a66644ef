"""Single parts of the report: samples and their marks, localisation, comparisons, transfer, what is missing."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.errors import DataError
from rairl_ray.files import write_json_lines
from rairl_ray.report import comparison
from rairl_ray.report.collect import collect
from rairl_ray.report.comparison import grouped
from rairl_ray.report.heatmap import SHOWN_CHARACTERS, pieces_of
from rairl_ray.report.parts import Figure, Missing, Table, Traces
from rairl_ray.report.report import all_sections, make_report
from rairl_ray.report.safety import clean, visible
from rairl_ray.report.style import LEVELS, level_colour, level_of
from rairl_ray.report.tables import comma_separated
from rairl_ray.runfolder import read_summary, write_summary
from tests.report.test_report import Page
from tests.report_material import HOSTILE, add_evaluation, localised_rows, make_rows, make_run, read_csv


class Parts:
    """The parts of a report that is not drawn: tables as CSV holds them, samples, and what is missing."""

    def __init__(self, *sources: Path) -> None:
        self.sections = all_sections(collect([str(source) for source in sources]))
        self.parts = [part for section in self.sections for part in section.parts]
        self.missing = {part.title: part for part in self.parts if isinstance(part, Missing)}
        self.traces = {part.title: part for part in self.parts if isinstance(part, Traces)}
        self.figures = {part.name for part in self.parts if isinstance(part, Figure)}

    def table(self, name: str) -> list[dict[str, str]]:
        [found] = [part for part in self.parts if isinstance(part, Table) and part.name == name]
        return list(csv.DictReader(io.StringIO(comma_separated(found))))


# --- samples ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text(max_size=60), st.lists(st.integers(0, 70), max_size=8), st.data())
def test_pieces_are_the_text_and_each_character_has_its_units_reward(
    text: str, ends: list[int], data: st.DataObject
) -> None:
    ends = sorted(min(end, len(text)) for end in ends)
    values = np.array(data.draw(st.lists(st.floats(-2, 2), min_size=len(ends), max_size=len(ends))))
    start = data.draw(st.integers(0, len(text)))
    pieces = pieces_of(text, ends, values, 1.0, error=(start, len(text)))
    shown = [piece for piece in pieces if piece.text != "∎" or "∎" in text]
    assert "".join(piece.text for piece in shown)[: len(text)] == text
    levels = [(piece.level, piece.mark) for piece in shown for _ in piece.text]
    for place in range(len(text)):
        unit = next((u for u, end in enumerate(ends) if place < end), None)
        assert levels[place][0] == (None if unit is None else level_of(float(values[unit]), 1.0))
        assert levels[place][1] == ("error" if place >= start else "")


def test_every_unit_shows_its_reward_once() -> None:
    pieces = pieces_of("one two three", [3, 7, 13, 13], np.array([1.0, -0.5, np.nan, 0.25]), 1.0, error=(5, 7))
    assert [(p.text, p.reward, p.level) for p in pieces] == [
        ("one", "+1.00", LEVELS), (" t", "", -5), ("wo", "-0.50", -5), (" three", "", None), ("∎", "+0.25", 2),
    ]  # fmt: skip
    assert [p.tag for p in pieces] == ["", "", "error", "", ""]


def test_colours_are_ordered_and_black_text_is_legible_on_all() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    for side in (-1, 1):
        light = [luminance(level_colour(side * step)) for step in range(LEVELS + 1)]
        assert light == sorted(light, reverse=True)
        assert all((x + 0.05) / 0.05 > 7 for x in light)  # WCAG's AAA
    assert level_of(99.0, 1.0) == LEVELS and level_of(-99.0, 1.0) == -LEVELS and level_of(0.5, 0.0) == 0


@settings(deadline=None)
@given(st.text(st.characters(codec=None)))
def test_shown_text_has_nothing_that_hides_or_turns(text: str) -> None:
    shown = visible(text)
    assert not any(c < " " and c not in "\n\t" for c in shown)
    assert not any(c in shown for c in "\x7f\x85\u200e\u200f\u202a\u202e\u2066\u2069\ufeff")
    clean(text).encode("utf-8")


@pytest.mark.usefixtures("undrawn")
def test_hostile_samples_are_shown_and_do_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "hostile", rows=make_rows(problems=2, text=HOSTILE + "@@ $x$ \\frac{a}"))
    path = run.evaluations / "final" / "rows.jsonl"
    path.write_text(path.read_text().replace("@@", "\\ud800"))  # half a surrogate pair, as other programs write
    make_report([str(run.root)])
    page = Page(run.report / "index.html")  # refuses any attribute that starts with "on"
    assert page.tags.count("script") == 1
    assert all(source.startswith("data:image/svg") for source in page.references if not source.startswith("#"))
    # The text is cut at its units; between them stand the tags of nothing else.
    assert "<script>alert('x')</script>" in page.text.replace("\n", "")
    assert "⟨U+202E⟩" in page.text and "␛[31m␀" in page.text and "مرحبا" in page.text
    assert "missing" not in page.text.split("Samples")[-1]


def test_a_very_long_sample_is_cut_with_a_note(tmp_path: Path) -> None:
    run = make_run(tmp_path / "long", rows=make_rows(problems=2, text="word " * 200_000))
    [trace, *_] = Parts(run.root).traces["Best right samples"].traces
    assert trace.note == f"Cut: the first {SHOWN_CHARACTERS:,} of 1,000,000 characters are shown."
    assert sum(len(piece.text) for piece in trace.views[0].pieces) == SHOWN_CHARACTERS


# --- localisation ----------------------------------------------------------------------------------


def test_localisation_tables_and_marks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "localised")
    folder = run.evaluation("final")
    write_json_lines(folder / "localisation.jsonl", localised_rows())
    summary = read_summary(folder / "summary.json")
    summary["localisation/step_accuracy"] = {"value": 0.75, "low": 0.5, "high": 1.0, "n": 4}
    write_summary(folder / "summary.json", summary)
    parts = Parts(run.root)
    [row] = parts.table("localisation")
    assert (row["metric"], row["value"], row["traces"]) == ("wrong step found", "0.75", "4")
    [steps] = parts.table("localisation_by_steps")
    assert (steps["steps of the trace"], steps["traces"], steps["found"]) == ("3", "4", "0.75")
    assert float(steps["by chance"]) == pytest.approx(1 / 3)
    [found, *_] = parts.traces["Errors that the reward finds"].traces
    assert [(p.text, p.mark, p.tag, p.reward) for p in found.views[0].pieces[:4]] == [
        ("<think>\n1+1=2\n", "", "", "+0.50"),
        ("2+2=", "predicted", "named by the reward", ""),
        ("5\n", "both", "error", "-1.25"),
        ("5+1=6\n", "", "", "+0.25"),
    ]
    assert len(parts.traces["Errors that it misses"].traces) == 1
    assert {"localisation_distance", "localisation_found", "localisation_missed"} <= parts.figures


# --- several runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Parts]:
    """Two densities with two seeds each, and one run without perturbations."""
    root = tmp_path_factory.mktemp("sweeps") / "densities"
    for density, shift in (("sparse", 0), ("dense", 4)):
        for seed in (0, 1):
            overrides = [f"reward.density.type={density}", f"seed={seed}"]
            rows = make_rows(problems=5 + shift + seed)
            make_run(root / "trials" / f"{density}-{seed}", *overrides, rows=rows)
    overrides = ["reward.density.type=dense", "discriminator.perturbations.count=0"]
    make_run(root / "trials" / "plain", *overrides)
    return root, Parts(root)


def test_every_run_has_its_row(sweep: tuple[Path, Parts]) -> None:
    rows = {row["run"]: row for row in sweep[1].table("runs")}
    assert set(rows) == {"dense-0", "dense-1", "plain", "sparse-0", "sparse-1"}
    for name, row in rows.items():
        folder = sweep[0] / "trials" / name / "evaluations" / "final"
        entry = read_summary(folder / "summary.json")["eval/pass_at_1"]
        for part, column in (("value", "pass@1"), ("low", "pass@1 low"), ("high", "pass@1 high")):
            assert float(row[column]) == pytest.approx(entry[part])


def test_seeds_are_one_row_with_mean_and_deviation(sweep: tuple[Path, Parts]) -> None:
    rows = {row["run"]: row for row in sweep[1].table("seeds")}
    assert set(rows) == {"dense-0 (2 seeds)", "sparse-0 (2 seeds)", "plain"}
    each = [float(row["pass@1"]) for row in sweep[1].table("runs") if "sparse" in row["run"]]
    row = rows["sparse-0 (2 seeds)"]
    assert float(row["pass@1"]) == pytest.approx(np.mean(each))
    assert float(row["pass@1 std"]) == pytest.approx(np.std(each, ddof=1)) and float(row["pass@1 std"]) > 0


def test_density_and_ablation_name_what_differs(sweep: tuple[Path, Parts]) -> None:
    densities = sweep[1].table("density")
    assert [(row["density"], row["seeds"]) for row in densities] == [("sparse", "2"), ("dense", "2")]
    changes = {row["run"]: row["differences"] for row in sweep[1].table("ablation")}
    assert changes == {
        "dense-0 (2 seeds)": "–",
        "plain": "discriminator.perturbations.count=0",
        "sparse-0 (2 seeds)": "reward.density.type=sparse",
    }


def test_a_warm_starts_own_path_does_not_part_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        place = [f"output_dir=/x/{seed}", f"model.policy.path=/x/{seed}/sft", "model.policy.build=null"]
        make_run(tmp_path / f"s{seed}", f"seed={seed}", *place)
    [group] = grouped(collect([str(tmp_path / "s0"), str(tmp_path / "s1")]).runs)
    assert len(group.runs) == 2


def test_evaluations_of_a_transfer_matrix_are_left_to_the_matrix(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    folder = tmp_path / "a" / "evaluations"
    for name in ("transfer-samples", "transfer-b", "other"):
        shutil.copytree(folder / "final", folder / name)
    [run] = collect([str(tmp_path / "a")]).runs
    assert set(run.evaluations) == {path.name for path in folder.iterdir()} - {"transfer-samples", "transfer-b"}
    assert "other" in run.evaluations


@pytest.mark.usefixtures("undrawn")
def test_one_auroc_is_shown_once(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    file = tmp_path / "a" / "evaluations" / "final" / "summary.json"
    summary = read_summary(file)
    write_summary(file, summary | {"discriminator/auroc": summary["calibration/auroc"]})
    make_report([str(tmp_path / "a")], str(tmp_path / "report"))
    page = (tmp_path / "report" / "tables" / "calibration.md").read_text()
    assert page.count("AUROC right/wrong") == 1


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_differs_in_many_keys_names_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "MOST_DIFFERENCES", 2)
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", "eval.prompts=9", "eval.bootstrap=7", "advantage.gamma=0.1")
    make_report([str(tmp_path / "a"), str(tmp_path / "b")], str(tmp_path / "report"))
    rows = read_csv(tmp_path / "report" / "tables" / "ablation.csv")
    assert rows[1]["differences"] == "advantage.gamma=0.1, eval.prompts=9, and 1 more"


def test_many_runs_are_compared_and_the_best_is_shown_in_full(sweep: tuple[Path, Parts]) -> None:
    rows = sweep[1].table("runs")
    best = max(rows, key=lambda row: float(row["pass@1"]))["run"]
    titles = {section.title: section.intro for section in sweep[1].sections}
    assert titles["Comparison"].startswith(f"In full: {best}, the run of highest pass@1.")
    assert [title for title in titles if title.endswith("Samples")] == [f"{best}: Samples"]
    assert {"density_bars", "ablation_bars", "curve_reward_mean"} <= sweep[1].figures


def test_runs_of_one_name_keep_their_own_files(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "same", "name=same") for place in ("a", "b")]
    parts = Parts(*(run.root for run in runs))
    assert [row["run"] for row in parts.table("runs")] == ["a/same", "b/same"]
    assert parts.table("a_same_summary") == parts.table("b_same_summary")
    names = [part.name for part in parts.parts if isinstance(part, Table | Figure)]
    assert len(names) == len(set(names))


def test_a_transfer_matrix(tmp_path: Path) -> None:
    cells = [
        {
            "policy": p,
            "reward": r,
            "metrics": {"eval/rerank_at_1": {"value": v, "low": v - 0.1, "high": v + 0.1}},
        }
        for p, r, v in (("gsm8k", "gsm8k", 0.75), ("gsm8k", "med", 0.5), ("med", "med", 0.625))
    ]
    matrix = {"policies": ["gsm8k", "med"], "rewards": ["gsm8k", "med"], "cells": cells}
    (tmp_path / "transfer.json").write_text(json.dumps(matrix))
    make_report([str(tmp_path)])
    rows = read_csv(tmp_path / "report" / "tables" / "transfer_eval_rerank_at_1.csv")
    assert [(row["policy"], row["reward of gsm8k"], row["reward of med"]) for row in rows] == [
        ("gsm8k", "0.75", "0.5"), ("med", "", "0.625"),
    ]  # fmt: skip
    assert (tmp_path / "report" / "figures" / "transfer_matrix_eval_rerank_at_1.pdf").is_file()
    (tmp_path / "transfer.json").write_text('{"cells": [{"policy": "x"}]}')
    with pytest.raises(DataError, match=r"transfer\.json: is no transfer matrix \(KeyError: 'reward'\)"):
        make_report([str(tmp_path)])


# --- what is missing -------------------------------------------------------------------------------


def test_a_run_without_anything_but_its_configuration_says_so_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "young")
    run.metrics.unlink()
    for path in (run.evaluations / "final").iterdir():
        path.unlink()
    _, missing = make_report([str(run.root)])
    reasons = {part.title: part.reason for part in missing}
    assert reasons["Results: All metrics"] == "the run has no evaluations"
    assert reasons["Learning curves: Learning curves"] == "there is no metrics.jsonl"
    assert all(part.fault == "input" for part in missing)
    text = Page(run.report / "index.html").text
    assert all(f"{title.split(': ')[1]}: missing: {reason}" in text for title, reason in reasons.items())
    assert "reward density" in text  # the settings are there


def test_rows_without_scores_have_samples_and_no_calibration(tmp_path: Path) -> None:
    from dataclasses import replace

    bare = {"score": None, "unit_scores": None, "unit_char_ends": None, "discriminator_version": None}
    rows = [replace(row, **bare, metadata={}) for row in make_rows()]  # type: ignore[arg-type]
    run = make_run(tmp_path / "bare", rows=rows)
    parts = Parts(run.root)
    for title in ("Reranking curves", "Calibration", "Reliability diagram"):
        assert parts.missing[title].reason == "no reward scored these rows"
    assert parts.missing["pass@1 by category"].reason == "the problems have no categories"
    assert len(parts.traces["Right samples"].traces) == 3


def test_a_broken_file_costs_its_own_parts_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "broken")
    add_evaluation(run, "aime", make_rows(problems=3))
    (run.evaluations / "final" / "rows.jsonl").write_text('{"prompt_id": "a"}\nnot json\n{}\n')
    run.config.write_text("policy: [")
    parts = Parts(run.root)
    assert "line 2 is not a JSON object" in parts.missing["Reliability diagram"].reason
    assert all(part.fault == "input" for part in parts.missing.values())
    assert parts.table("aime_calibration") and parts.table("summary") and "aime_reliability" in parts.figures
    assert str(run.config) in collect([str(run.root)]).notes[0]


def test_an_unexpected_error_is_named_and_does_not_stop_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr("rairl_ray.report.calibration.reliability", fail)
    run = make_run(tmp_path / "faulty")
    parts = Parts(run.root)
    [part] = [part for part in parts.missing.values() if part.fault == "report"]
    assert part.title == "Reliability diagram" and "ZeroDivisionError: by hand" in part.reason
    assert "score_histogram" in parts.figures
