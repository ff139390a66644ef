"""Forks against their runs in a report, beside differences that are computed by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rairl_ray.report.collect import collect
from rairl_ray.report.forks import fork_parts, paired
from rairl_ray.report.parts import Absent, Number, Table
from tests.report_material import make_rows, make_run


def test_the_difference_is_that_of_each_problem(tmp_path: Path) -> None:
    parent = make_run(tmp_path / "parent")
    rows = make_rows(problems=5)  # one problem fewer, and in each of the others the last sample is right, too
    better = [dataclasses.replace(row, correct=row.correct or row.generation_idx == 3) for row in rows]
    fork = make_run(tmp_path / "fork", rows=better)
    fork.write_fork(parent.root, 3, ["advantage.gamma (run: 0.5, now: 0.6)"])
    runs = collect([str(parent.root), str(fork.root)]).runs
    problems, (passed, reranked) = paired(*runs)
    # samples right of 4: before 0 1 2 3 4 (of problems 0..4), after 1 2 3 4 4
    differences = np.array([1, 1, 1, 1, 0]) / 4
    assert problems == 5 and passed is not None and passed.value == pytest.approx(differences.mean())
    assert 0.1 <= passed.low < passed.value < passed.high <= 0.25
    # the best-scored sample: wrong before and after where no other one is right, since scores do not change
    assert reranked is not None and reranked.value == pytest.approx(0.25 / 5)
    (table,) = fork_parts(runs)
    assert isinstance(table, Table)
    (row,) = table.rows
    assert row[:3] == ("fork", "parent@3", "advantage.gamma (run: 0.5, now: 0.6)")
    assert isinstance(row[3], Number) and row[3].value == 5 and row[4] == passed


def test_why_there_is_none(tmp_path: Path) -> None:
    parent, fork = make_run(tmp_path / "parent"), make_run(tmp_path / "fork")
    with pytest.raises(Absent, match="none of the runs is a fork"):
        fork_parts(collect([str(parent.root), str(fork.root)]).runs)
    fork.write_fork(parent.root, 3, [])
    with pytest.raises(Absent, match=r"left out: fork \(its run .*parent is not among .*; name it too\)"):
        fork_parts(collect([str(fork.root)]).runs)


def test_a_fork_that_shares_no_problem_with_its_run_is_named_and_the_others_stay(tmp_path: Path) -> None:
    parent, fork = make_run(tmp_path / "parent"), make_run(tmp_path / "fork")
    elsewhere = [dataclasses.replace(row, prompt_id=f"other/{row.prompt_id}") for row in make_rows(problems=2)]
    other = make_run(tmp_path / "other", rows=elsewhere)
    for run in (fork, other):
        run.write_fork(parent.root, 3, [])
    (table,) = fork_parts(collect([str(run.root) for run in (parent, fork, other)]).runs)
    assert isinstance(table, Table) and [row[0] for row in table.rows] == ["fork"]
    assert "Left out: other (other and parent were not evaluated on the same problems)." in table.note
