"""Files of traces with a labelled first wrong step: public layouts, human labels, rows that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.errors import DataError
from rairl_ray.evaluation.localisation import Readout, StepTrace, step_of, step_summary
from rairl_ray.evaluation.localisation_files import LabelledSteps, read_labelled_steps

ROW = {"question": "1+1?", "steps": ["1+1=3", "so 3"], "first_error_step": 0}


def written(folder: Path, *rows: object) -> Path:
    path = folder / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_chance_on_the_human_labels_of_mr_gsm8k(shared_data: Path) -> None:
    traces = read_labelled_steps(shared_data / "mr_gsm8k" / "first_error.jsonl")
    assert len(traces) == 590
    assert all(0 <= trace.first_error < len(trace.steps) for trace in traces if trace.first_error is not None)
    known = [StepTrace(values=range(len(t.steps)), first_error=t.first_error or 0) for t in traces]
    summary = step_summary(known, resamples=20)
    assert summary["localisation/chance"]["value"] == pytest.approx(0.143, abs=0.0005)
    assert summary["localisation/step_accuracy"]["n"] == 590
    first = traces[0]
    assert (first.line, first.first_error) == (1, 1)
    end = first.step_char_ends[0]
    assert first.completion[:end].rstrip("\n") == first.steps[0] and first.completion[end:].startswith("Step 2")


def test_processbench_layout(tmp_path: Path) -> None:
    """Ids, steps, `label` from 0 with -1 for right, `final_answer_correct`; F1 by hand from scores."""
    rows = [
        {"id": "gsm8k-0", "problem": "p", "steps": ["a", "b", "c"], "label": 1, "final_answer_correct": False},
        {"id": "gsm8k-1", "problem": "p", "steps": ["a", "b"], "label": 0, "final_answer_correct": False},
        {"id": "gsm8k-2", "problem": "p", "steps": ["a", "b"], "label": -1, "final_answer_correct": True},
        {"id": "gsm8k-3", "problem": "p", "steps": ["a", "b"], "label": -1, "final_answer_correct": True},
    ]
    scores = [[0.9, 0.1, 0.1], [0.9, 0.2], [0.8, 0.7], [0.9, 0.3]]
    rows = [{**row, "prm": s} for row, s in zip(rows, scores, strict=True)]
    traces = read_labelled_steps(written(tmp_path, *rows), scores="prm")
    assert [t.first_error for t in traces] == [1, 0, -1, -1]
    assert [t.final_answer_correct for t in traces] == [False, False, True, True]
    known = [StepTrace(values=t.step_scores or (), first_error=t.first_error or 0) for t in traces]
    summary = step_summary(known, Readout(threshold=0.25), resamples=20)
    value = {name: numbers["value"] for name, numbers in summary.items()}
    assert value["localisation/step_accuracy"] == 0.5  # step 1 found; step 1 named where it was step 0
    assert value["localisation/right_accuracy"] == 0.5
    assert value["localisation/processbench_f1"] == pytest.approx(0.5)
    assert value["localisation/chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)


@pytest.mark.parametrize(
    ("labels", "first_error"),
    [
        ({"first_error_step": 1}, 1),
        ({"first_error_step": -1}, -1),
        ({"first_error_step": None}, -1),
        ({"first_error_step_1based": 2}, 1),
        ({"first_error_step_1based": 2.0}, 1),
        ({"model_output_solution_first_error_step": "N/A"}, -1),
        ({"model_output_solution_first_error_step": "1"}, 0),
        ({"label": 0, "first_error_step_1based": 1}, 0),
    ],
)
def test_the_public_spellings_of_a_label(tmp_path: Path, labels: dict, first_error: int) -> None:
    row = {"prompt": "1+1?", "model_output_steps": ["1+1=3", "so 3"], "uuid": "u", **labels}
    (trace,) = read_labelled_steps(written(tmp_path, row))
    assert (trace.first_error, trace.id, trace.question, len(trace.steps)) == (first_error, "u", "1+1?", 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"question": None}, "question"),
        ({"steps": "1+1=3"}, "no list of texts"),
        ({"steps": []}, "no list of texts"),
        ({"steps": [" ", ""]}, "all empty"),
        ({"first_error_step": 2}, "is 2; its 2 steps count from 0 to 1"),
        ({"first_error_step": -2}, "is -2"),
        ({"first_error_step": "first"}, "not the number of a step"),
        ({"first_error_step": True}, "not the number of a step"),
        ({"first_error_step": 0, "first_error_step_1based": 0}, "is 0; its 2 steps count from 1 to 2"),
        ({"first_error_step": 0, "label": 1}, "name different steps"),
        ({"final_answer_correct": "yes"}, "not true or false"),
        ({"prm": [1.0]}, "1 values, not one number for each of the 2 steps"),
        ({"prm": [1.0, None]}, "not a finite number"),
        ({"prm": [1.0, float("nan")]}, "not a finite number"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, changes: dict, reason: str) -> None:
    good = {**ROW, "prm": [0.5, 0.1]}
    path = written(tmp_path, good, {**good, **changes})
    with pytest.raises(DataError, match=reason) as error:
        read_labelled_steps(path, scores="prm")
    assert str(error.value).startswith(f"{path}:2: ") and "\n" not in str(error.value)
    (kept,) = read_labelled_steps(path, scores="prm", on_bad_row="skip")
    assert (kept.step_scores, kept.id) == ((0.5, 0.1), "1")


def test_missing_labels_scores_files_and_ids_given_twice(tmp_path: Path) -> None:
    bare = {name: value for name, value in ROW.items() if name != "first_error_step"}
    path = written(tmp_path, bare)
    with pytest.raises(DataError, match=r":1: no column with the first wrong step \(first_error_step, label"):
        read_labelled_steps(path)
    assert read_labelled_steps(path, labels="optional")[0].first_error is None
    with pytest.raises(DataError, match=r":1: no column 'prm'"):
        read_labelled_steps(path, labels="optional", scores="prm")
    with pytest.raises(DataError, match=r":2: id 'x' is that of row 1 too"):
        read_labelled_steps(written(tmp_path, {**ROW, "id": "x"}, {**ROW, "id": "x"}))
    with pytest.raises(DataError, match="no such file"):
        read_labelled_steps(tmp_path / "nothing.jsonl")


def test_parquet_holds_the_same_traces(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "a"}, {**ROW, "id": "b", "first_error_step": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "traces.parquet")
    assert read_labelled_steps(tmp_path / "traces.parquet") == read_labelled_steps(written(tmp_path, *rows))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=6), min_size=1, max_size=6))
def test_every_character_of_a_step_lies_in_it(steps: list[str]) -> None:
    trace = LabelledSteps(
        id="a", question="q", steps=tuple(steps), first_error=-1, final_answer_correct=None, step_scores=None,
        line=1,
    )  # fmt: skip
    ends, start = trace.step_char_ends, 0
    assert ends[-1] == len(trace.completion)
    for index, step in enumerate(steps):
        assert trace.completion[start : start + len(step)] == step
        assert all(step_of(char, ends) == index for char in range(start, start + len(step)))
        start += len(step) + 1
