"""The run folder: files that survive a kill, one writer, flat summaries; and the spool beside it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rairl_ray.errors import ConfigError, DataError, ResumeError
from rairl_ray.files import json_text, read_json_lines, write_atomic
from rairl_ray.runfolder import RunFolder, read_summary, write_summary


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "runs" / "demo" / "airl")
    folder.create()
    return folder


def test_paths_are_those_of_the_design(folder: RunFolder) -> None:
    root = folder.root
    assert folder.config == root / "config.yaml" and folder.metrics == root / "metrics.jsonl"
    assert folder.events == root / "events.log" and folder.checkpoints == root / "checkpoints"
    assert (
        folder.final_policy == root / "final/policy"
        and folder.final_reward_model == root / "final/reward_model"
    )
    assert folder.evaluation("late") == root / "evaluations/late" and folder.evaluation("late").is_dir()
    assert folder.write_rollouts(20, [{"text": "a"}]) == root / "rollouts/step-000020.jsonl"


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"output_dir: cannot write to .*file/run.*output_dir=FOLDER"
    ) as error:
        RunFolder(tmp_path / "file" / "run").create()
    assert "\n" not in str(error.value)


def test_metrics_round_trip_in_standard_json(folder: RunFolder) -> None:
    assert folder.read_metrics() == [] and not folder.has_run
    folder.append_metrics(1, {"policy/loss": 0.5, "policy/kl": math.nan})
    folder.append_metrics(2, {"policy/loss": math.inf})
    assert folder.has_run

    def refuse(name: str) -> float:
        raise AssertionError(f"not standard JSON: {name}")

    for line in folder.metrics.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    first, second = folder.read_metrics()
    assert first["step"] == 1 and first["policy/loss"] == 0.5 and math.isnan(first["policy/kl"])
    assert math.isnan(second["policy/loss"])


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_torn_line_spoils_only_itself(folder: RunFolder, cut: int) -> None:
    folder.append_metrics(1, {"x": 1.0})
    folder.append_metrics(2, {"x": 2.0})
    data = folder.metrics.read_bytes()
    folder.metrics.write_bytes(data[:-cut])
    kept = [row["step"] for row in folder.read_metrics()]
    assert kept == ([1, 2] if cut == 1 else [1]) or cut > data.index(b"\n")
    folder.append_metrics(3, {"x": 3.0})
    assert [row["step"] for row in folder.read_metrics()] == [*kept, 3]


def test_truncation_forgets_what_a_resume_writes_again(folder: RunFolder) -> None:
    assert folder.truncate_to_step(3) == 0
    for step in range(6):
        folder.append_metrics(step, {"x": float(step)})
        folder.append_metrics(step, {"eval/pass_at_1": 0.1})
        folder.write_rollouts(step, [{"step": step}])
    with open(folder.metrics, "ab") as file:
        file.write(b'{"step": 6, "x"')
    assert folder.truncate_to_step(3) == 4
    assert [row["step"] for row in folder.read_metrics()] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sorted(path.name for path in folder.rollouts.iterdir()) == [f"step-00000{i}.jsonl" for i in range(4)]
    assert folder.metrics.read_bytes().endswith(b"}\n")


def test_truncation_forgets_evaluations_that_are_made_again_and_no_others(folder: RunFolder) -> None:
    folder.append_metrics(0, {"eval/pass_at_1": 0.1})
    for step in (-1, 0):
        folder.append_metrics(step, {"discriminator/warmup_step": step + 2.0})
    for step in (1, 2):
        folder.append_metrics(step, {"policy/loss": 0.5})
    folder.append_metrics(2, {"eval/pass_at_1": 0.2})
    assert folder.truncate_to_step(2, 1) == 1
    assert [row["step"] for row in folder.read_metrics()] == [0, -1, 0, 1, 2]
    assert folder.truncate_to_step(-1, 0) == 3
    start, warmup = folder.read_metrics()
    assert (start["step"], warmup["step"]) == (0, -1), (
        "a resume in the warm-up does not evaluate the start again"
    )
    assert folder.truncate_to_step(-2, -1) == 2


def test_events_are_one_line_each(folder: RunFolder) -> None:
    folder.event("first\nwith a second line")
    folder.event("second")
    lines = folder.events.read_text().splitlines()
    assert len(lines) == 2 and all(re.match(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00 ", line) for line in lines)


HOLD = """
import sys, time
from rairl_ray.runfolder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_writer_at_a_time_and_a_killed_one_leaves_no_lock(folder: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder.root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ResumeError, match=f"process {holder.pid} on"), folder.lock():
            pass
    finally:
        holder.kill()
        holder.communicate()
    with (
        folder.lock(),
        pytest.raises(ResumeError, match=f"process {os.getpid()}"),
        RunFolder(folder.root).lock(),
    ):
        pass
    with folder.lock():
        pass


def test_summary_is_flat_and_round_trips(tmp_path: Path) -> None:
    summary = {"eval/pass_at_1": {"value": 0.5, "low": 0.4, "high": math.nan, "n": 256}, "x": {"value": 1.0}}
    write_summary(tmp_path / "summary.json", summary)
    read = read_summary(tmp_path / "summary.json")
    assert math.isnan(read["eval/pass_at_1"].pop("high"))
    assert read == {"eval/pass_at_1": {"value": 0.5, "low": 0.4, "n": 256}, "x": {"value": 1.0}}
    with pytest.raises(ValueError, match="needs value"):
        write_summary(tmp_path / "summary.json", {"x": {"mean": 1.0}})
    (tmp_path / "summary.json").write_text("[1]")
    with pytest.raises(DataError, match=r"summary\.json"):
        read_summary(tmp_path / "summary.json")


def test_a_failed_atomic_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomic(tmp_path / "config.yaml", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "config.yaml", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "old")]


def test_broken_json_lines_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl: line 2"):
        read_json_lines(path)
    assert read_json_lines(path, skip_broken=True) == [{"a": 1}, {"a": 2}]
    assert json_text({"a": [math.inf, (1.5, math.nan)]}) == '{"a": [null, [1.5, null]]}'
