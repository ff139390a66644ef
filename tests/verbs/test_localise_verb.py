"""`launch.py localise` and `transfer`: labelled files, injected errors, matrices, over real reward models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rairl_ray.actors.chunks import Line
from rairl_ray.actors.reading import PolicyReadLines
from rairl_ray.config.schema import Model
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.runfolder import read_summary
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs.localise import localise
from rairl_ray.verbs.transfer import transfer
from tests.finished import finished_run


def labelled(name: str, question: str, steps: str, first_error: int, own: list[float]) -> dict[str, Any]:
    """A row of a labelled file; `own` is a score of each step."""
    return {
        "id": name,
        "question": question,
        "steps": steps.split(),
        "first_error_step": first_error,
        "own": own,
    }


LABELLED = [
    labelled("a", "1+2+3+4=?", "1+2=3 3+3=7 7+4=11", 1, [3, 1, 1]),
    labelled("b", "2+2+2+2=?", "2+2=4 4+2=6 6+2=9", 2, [5, 5, 2]),
    labelled("c", "9+1+1+1=?", "9+1=11 11+1=12", 0, [1, 0]),
    labelled("d", "1+1=?", "1+1=2 2+1=3", -1, [1, 1]),
]
"""The largest drop of `own` finds the errors of a and b, not that of c."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    output = tmp_path_factory.mktemp("runs")
    config = finished_run(output, "sums", "eval.localisation_traces=8", "data.eval_limit=8")
    finished_run(output, "numbers", "data.task=countdown", "data.countdown={numbers: 3, largest: 9}",
                 "data.max_prompt_tokens=80", "rollout.max_completion_tokens=40", "data.system_prompt=''",
                 "eval.prompts=4", seed=1)  # fmt: skip
    with cluster(config):
        yield output


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def values_of(folder: Path) -> dict[str, float]:
    return {name: entry["value"] for name, entry in read_summary(folder / "summary.json").items()}


def test_a_files_own_scores_give_the_numbers_of_a_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = written(tmp_path / "labelled.jsonl", LABELLED), tmp_path / "named.jsonl"
    assert localise(str(file), scores="own", output=output) == 0
    rows = read(output)
    assert [row["predicted_step"] for row in rows] == [1, 2, 1, 0]  # without a threshold d is accused, too
    assert [row["first_error_step"] for row in rows] == [1, 2, 0, -1]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = {line[1]: line[3] for line in lines if len(line) > 3}
    assert float(printed["localisation/step_accuracy"]) == pytest.approx(2 / 3, abs=1e-4)
    assert float(printed["localisation/chance"]) == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3, abs=1e-4)
    assert float(printed["localisation/right_accuracy"]) == 0


def test_a_threshold_calls_a_trace_right(tmp_path: Path) -> None:
    file, output = written(tmp_path / "labelled.jsonl", LABELLED), tmp_path / "named.jsonl"
    localise(str(file), scores="own", output=output, overrides=["eval.localisation_threshold=1.5"])
    assert [row["predicted_step"] for row in read(output)] == [1, 2, -1, -1]


def test_labelled_steps_are_scored_by_a_runs_reward(runs: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "labelled.jsonl", LABELLED)
    output = tmp_path / "named.jsonl"
    assert localise(str(runs / "sums"), file, output=output) == 0
    folder = runs / "sums/evaluations/localisation-labelled"
    rows = read(folder / "localisation.jsonl")
    assert read(output) == rows and sorted(path.name for path in folder.iterdir()) == [
        "localisation.jsonl", "settings.json", "summary.json"
    ]  # fmt: skip
    for row, given in zip(rows, LABELLED, strict=True):
        ends = row["step_char_ends"]
        starts = [len("<think>\n"), *ends[:-1]]
        steps = [row["text"][start:end] for start, end in zip(starts, ends, strict=True)]
        assert steps == [f"{step}\n" for step in given["steps"]]
        # one unit a step, so a step's value is its unit's reward
        assert set(ends) <= set(row["unit_char_ends"])
        by_end = dict(zip(row["unit_char_ends"], row["unit_scores"], strict=True))
        assert row["step_scores"] == pytest.approx([by_end[end] for end in ends])
        drops = np.diff(row["step_scores"], prepend=np.nan)
        drops[0] = row["step_scores"][0] - np.mean(row["step_scores"][1:])
        assert drops[row["predicted_step"]] == pytest.approx(drops.min())
    values = values_of(folder)
    assert {"localisation/step_accuracy_logprob", "localisation/step_accuracy_entropy"} <= set(values)
    assert values["localisation/chance"] == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3)


def test_injected_errors_of_held_out_experts(runs: Path) -> None:
    assert localise(str(runs / "sums"), baselines=False) == 0
    rows = read(runs / "sums/evaluations/localisation/localisation.jsonl")
    assert len(rows) == 8
    for row in rows:
        step = row["first_error_step"]
        assert step is None or row["edit_char"] < row["step_char_ends"][step]
        assert not step or row["edit_char"] >= row["step_char_ends"][step - 1]
    assert "localisation/step_accuracy_logprob" not in values_of(runs / "sums/evaluations/localisation")


def test_the_policy_reads_log_probabilities_and_entropies(runs: Path) -> None:
    """Against transformers alone, one row at a time."""
    folder = str(runs / "sums/final/policy")
    texts = ["<think>\n1+2=3\n", "<think>\n4"]
    lines = [
        Line(n, {"prompt": "1+2=?", "generation": text, "finish_reason": "length"})
        for n, text in enumerate(texts)
    ]
    rows = PolicyReadLines(folder, Model(), "cpu", "", "auto", 1024)(lines)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2=?"}], tokenize=False, add_generation_prompt=True
    )
    for row, text in zip(rows, texts, strict=True):
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        end = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        with torch.no_grad():
            logits = model(torch.tensor([start + end])).logits[0, len(start) - 1 : -1]
        logprobs = torch.log_softmax(logits, -1)
        expected = logprobs[torch.arange(len(end)), end]
        assert row["token_logprobs"] == pytest.approx(expected.tolist(), abs=1e-4)
        entropies = -(logprobs.exp() * logprobs).sum(-1)
        assert row["token_entropies"] == pytest.approx(entropies.tolist(), abs=1e-4)
        assert row["token_char_ends"][-1] == len(text)


@pytest.mark.slow
def test_transfer_judges_each_domain_with_each_reward(runs: Path) -> None:
    names = [str(runs / "sums"), str(runs / "numbers")]
    assert transfer(names, names, [f"output_dir={runs}", "name=matrix"]) == 0
    matrix = json.loads((runs / "matrix/transfer.json").read_text())
    assert matrix["policies"] == matrix["rewards"] == ["sums", "numbers"]
    assert [(cell["policy"], cell["reward"]) for cell in matrix["cells"]] == [
        ("sums", "sums"), ("sums", "numbers"), ("numbers", "sums"), ("numbers", "numbers")
    ]  # fmt: skip
    for cell in matrix["cells"]:
        assert {"eval/rerank_at_1", "localisation/step_accuracy"} <= set(cell["metrics"])
    # the samples are the policy's, whoever judges them
    passed = [cell["metrics"]["eval/pass_at_1"]["value"] for cell in matrix["cells"]]
    assert passed[0] == passed[1] and passed[2] == passed[3]
    assert sorted(path.name for path in (runs / "matrix").iterdir()) == ["transfer.json"]
    briers = [cell["metrics"]["calibration/brier"]["value"] for cell in matrix["cells"]]
    assert briers[0] != briers[1] and briers[2] != briers[3]


@pytest.mark.parametrize(
    ("source", "options", "error", "said"),
    [
        ("labelled.jsonl", {}, ConfigError, r"a file alone has no reward"),
        ("sums", {"scores": "own"}, ConfigError, r"needs a file with that column"),
        ("labelled.jsonl", {"scores": "nothing"}, DataError, r"labelled\.jsonl:1: no column 'nothing'"),
        ("missing.jsonl", {"scores": "own"}, DataError, r"no such file"),
    ],
)
def test_a_wrong_question_is_one_line(
    source: str, options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path, runs: Path
) -> None:
    written(tmp_path / "labelled.jsonl", LABELLED)
    folder = tmp_path if source.endswith(".jsonl") else runs
    with pytest.raises(error, match=said):
        localise(str(folder / source), **options)


def test_transfer_needs_both_sides() -> None:
    with pytest.raises(ConfigError, match="runs on both sides"):
        transfer(["a"], [])
