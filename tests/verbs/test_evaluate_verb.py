"""`launch.py evaluate`: four modes, every kind of target, resumable, with numbers that a hand can check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from rairl_ray.errors import ConfigError, DataError, ModelError, UserError
from rairl_ray.evaluation.rows import EvalRow, read_rows
from rairl_ray.runfolder import read_summary
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs import evaluate as verb
from rairl_ray.verbs.evaluate import evaluate
from rairl_ray.verbs.job import sole_owner
from tests.inprocess import config_of, run
from tests.runs import ROOT

STOPPING = "rollout.max_sequences=1"
"""Chunks of one problem each, so that there is something between two of them."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One real tiny R-AIRL run, on a cluster that its evaluations share."""
    output = tmp_path_factory.mktemp("runs")
    config = config_of("airl", output, "name=tiny")
    with cluster(config):
        run(config)
        yield output


def rows_of(folder: Path, name: str) -> list[EvalRow]:
    return read_rows(folder / "evaluations" / name / "rows.jsonl")


def values_of(folder: Path, name: str) -> dict[str, float]:
    summary = read_summary(folder / "evaluations" / name / "summary.json")
    return {metric: entry["value"] for metric, entry in summary.items()}


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def given(rows: list[dict[str, Any]], runs: Path, tmp_path: Path, mode: str, *overrides: str) -> Path:
    """Evaluate given completions under the tiny run; the folder of the evaluation."""
    file = written(tmp_path / "given.jsonl", rows)
    name = tmp_path.name
    evaluate(str(runs / "tiny"), [f"eval.mode={mode}", f"eval.input={file}", f"eval.name={name}", *overrides])
    return runs / "tiny" / "evaluations" / name


def answer(value: object, step: str = "") -> str:
    return f"<think>\n{step or value}\n</think>\n<answer>\n{value}\n</answer>"


# --- sampling --------------------------------------------------------------------------------------


def test_a_finished_run_is_evaluated_as_it_evaluated_itself(runs: Path) -> None:
    """Same weights, same seeds, another path: the saved policy and reward instead of the live ones."""
    assert evaluate(str(runs / "tiny"), ["eval.name=again"]) == 0
    own, again = rows_of(runs / "tiny", "final"), rows_of(runs / "tiny", "again")
    assert [(row.prompt_id, row.generation) for row in again] == [
        (row.prompt_id, row.generation) for row in own
    ]
    for one, other in zip(own, again, strict=True):
        assert other.score == pytest.approx(one.score, abs=1e-5)
        assert other.unit_scores == pytest.approx(one.unit_scores, abs=1e-5)
        assert (other.correct, other.tokens) == (one.correct, one.tokens)
        assert other.policy_logprobs is not None and len(other.policy_logprobs) == other.tokens
    assert sorted(path.name for path in (runs / "tiny/evaluations/again").iterdir()) == [
        "rows.jsonl", "settings.json", "summary.json"
    ]  # fmt: skip
    values, expected = values_of(runs / "tiny", "again"), values_of(runs / "tiny", "final")
    for metric in ("eval/pass_at_1", "eval/rerank_at_1", "calibration/auroc", "calibration/ece"):
        assert values[metric] == pytest.approx(expected[metric], nan_ok=True)


def test_rows_have_the_official_columns(runs: Path) -> None:
    evaluate(str(runs / "tiny"), ["eval.name=again"])
    row = json.loads((runs / "tiny/evaluations/again/rows.jsonl").read_text().splitlines()[0])
    assert {"prompt", "generation", "generation_idx", "reward_model_score", "policy_log_probs"} <= set(row)
    assert set(row["verifiable_rewards"]) >= {"correctness", "strict_format"}


def test_a_model_folder_and_an_experiment_file_give_the_untrained_row(runs: Path, tmp_path: Path) -> None:
    small = ["eval.prompts=3", "eval.samples_per_prompt=2", "eval.k=[1,2]", "rollout.engine=hf",
             "rollout.max_completion_tokens=20", "data.max_prompt_tokens=32"]  # fmt: skip
    model = next((runs / ".cache" / "models").glob("built-*"))
    evaluate(str(model), ["data.task=arithmetic", f"output_dir={tmp_path}", "name=bare", *small])
    rows = rows_of(tmp_path / "models/bare", "generate")
    assert len(rows) == 6 and all(row.score is None and row.policy_version is None for row in rows)
    demo = str(ROOT / "experiments/demo/airl.yaml")
    evaluate(demo, [f"output_dir={tmp_path}", "name=file", *small])
    assert len(rows_of(tmp_path / "models/file", "generate")) == 6
    assert "calibration/auroc" not in values_of(tmp_path / "models/file", "generate")


def test_aime_takes_the_problems_of_a_file_for_a_run_of_any_task(runs: Path, tmp_path: Path) -> None:
    rows = [
        {"problem": "3+4=?", "answer": "7", "year": 2024},
        {"problem": "5+5=?", "answer": "10", "year": 2025},
    ]
    file = written(tmp_path / "aime.jsonl", rows)
    evaluate(str(runs / "tiny"), ["eval.mode=aime", f"data.path={file}", "data.system_prompt=''"])
    found = rows_of(runs / "tiny", "aime")
    assert [(row.question, row.answer) for row in found[:: len(found) // 2]] == [
        ("3+4=?", "7"),
        ("5+5=?", "10"),
    ]
    assert {"eval/category_pass_at_1/2024", "eval/category_pass_at_1/2025"} <= set(
        values_of(runs / "tiny", "aime")
    )


class Stop(verb.Display):
    """Ctrl-C once a phase has two finished chunks."""

    def __init__(self, phase: str) -> None:
        super().__init__("evaluate", 1)
        self._where = phase

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 2 and self._phase == self._where:
            raise KeyboardInterrupt


def test_a_killed_evaluation_draws_no_sample_twice(runs: Path) -> None:
    evaluate(str(runs / "tiny"), ["eval.name=whole", STOPPING])
    settings = ["eval.name=killed", STOPPING]
    with pytest.raises(KeyboardInterrupt):
        evaluate(str(runs / "tiny"), settings, Stop("sampling"))
    folder = runs / "tiny/evaluations/killed"
    first = folder / "samples" / "000000.jsonl"
    rows = [json.loads(line) for line in first.read_text().splitlines()]
    written(first, [{**row, "generation": "paid for"} for row in rows])
    evaluate(str(runs / "tiny"), settings)
    kept = [row.generation == "paid for" for row in rows_of(runs / "tiny", "killed")]
    assert kept == [True] * len(rows) + [False] * (len(kept) - len(rows))
    whole = rows_of(runs / "tiny", "whole")
    for one, other, mine in zip(whole, rows_of(runs / "tiny", "killed"), kept, strict=True):
        assert mine or one.generation == other.generation


def test_a_finished_evaluation_is_only_summarised_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(str(runs / "tiny"), ["eval.name=again"])
    file = runs / "tiny/evaluations/again/rows.jsonl"
    before = file.stat().st_mtime_ns
    evaluate(str(runs / "tiny"), ["eval.name=again", "eval.k=[1,2]"])
    assert file.stat().st_mtime_ns == before
    assert "eval/pass_at_2" in values_of(runs / "tiny", "again")
    evaluate(str(runs / "tiny"), ["eval.name=again", "eval.temperature=0.5"])
    assert (runs / "tiny/evaluations/again~1/rows.jsonl").stat().st_mtime_ns == before
    assert "temperature (then: 1.0, now: 0.5)" in capsys.readouterr().out


def test_another_selector_needs_no_new_sample(runs: Path) -> None:
    evaluate(str(runs / "tiny"), ["eval.name=chosen", "eval.selector=last"])
    before = rows_of(runs / "tiny", "chosen")
    evaluate(str(runs / "tiny"), ["eval.name=chosen", "eval.selector=min"])
    for row, old in zip(rows_of(runs / "tiny", "chosen"), before, strict=True):
        assert row.generation == old.generation and row.unit_scores == old.unit_scores
        assert row.score == pytest.approx(min(row.unit_scores or [0]))
        assert old.score == pytest.approx((old.unit_scores or [0])[-1])
    assert not (runs / "tiny/evaluations/chosen~1").exists()


def test_two_evaluations_of_one_folder_are_refused(runs: Path) -> None:
    with (
        sole_owner(runs / "tiny/evaluations/held"),
        pytest.raises(ConfigError, match="another process"),
    ):
        evaluate(str(runs / "tiny"), ["eval.name=held"])


def test_a_checkpoint_is_not_taken_for_the_final_policy(runs: Path) -> None:
    with pytest.raises(ModelError, match=r"only final/policy can be evaluated"):
        evaluate(str(next((runs / "tiny/checkpoints").glob("step-*"))), [f"output_dir={runs}"])


# --- given completions -----------------------------------------------------------------------------

PROBLEMS = [
    {"question": "A?", "answer": "1", "generation": answer(1), "generation_idx": 0, "reward_model_score": 0.9},
    {"question": "B?", "answer": "7", "generation": answer(8), "generation_idx": 1, "reward_model_score": 2.0},
    {"question": "A?", "answer": "1", "generation": answer(2), "generation_idx": 2, "reward_model_score": 0.1},
    {"question": "A?", "answer": "1", "generation": answer(1), "generation_idx": 1, "reward_model_score": 0.5},
    {"question": "B?", "answer": "7", "generation": answer(8), "generation_idx": 0, "reward_model_score": -1.0},
    {"question": "B?", "answer": "7", "generation": answer(7), "generation_idx": 2, "reward_model_score": 1.0},
]


def test_given_completions_and_scores_give_the_numbers_of_a_hand(runs: Path, tmp_path: Path) -> None:
    """A: right, right, wrong (scores .9, .5, .1); B: wrong, wrong, right (2, -1, 1): in any order of rows."""
    folder = given(PROBLEMS, runs, tmp_path, "pregenerated_policy_and_reward", "eval.k=[1,2]")
    values = values_of(folder.parent.parent, folder.name)
    expected = {
        "eval/pass_at_1": (2 / 3 + 1 / 3) / 2,
        "eval/pass_at_2": (1 + 2 / 3) / 2,
        "eval/majority_at_3": (1 + 0) / 2,
        "eval/oracle_at_3": 1.0,
        "eval/rerank_at_1": (1 + 0) / 2,
        # of nine pairs of right and wrong the right one is ahead in .9 > .1, -1; .5 > .1, -1; 1 > .1, -1
        "calibration/auroc": 6 / 9,
    }
    assert {metric: values[metric] for metric in expected} == pytest.approx(expected)


def test_the_policys_log_probabilities_are_added(runs: Path, tmp_path: Path) -> None:
    """They are those that sampling recorded: at temperature 1 both are the policy's own."""
    evaluate(str(runs / "tiny"), ["eval.name=again"])
    sampled = rows_of(runs / "tiny", "again")
    rows = [
        {"question": row.question, "answer": row.answer, "generation": row.generation,
         "generation_idx": row.generation_idx, "finish_reason": row.finish_reason}
        for row in sampled
    ]  # fmt: skip
    folder = given(rows, runs, tmp_path, "pregenerated_policy")
    pairs = list(zip(sampled, rows_of(folder.parent.parent, folder.name), strict=True))
    # A policy this raw writes special tokens, too, which no text shows.
    visible = [(one, other) for one, other in pairs if one.tokens == other.tokens]
    assert len(visible) > 1
    for one, other in visible:
        assert other.policy_logprobs == pytest.approx(one.policy_logprobs, abs=1e-4)
        assert other.score == pytest.approx(one.score, abs=1e-4)  # the run's own reward scores them, too


def test_rows_of_an_evaluation_are_an_input(runs: Path, tmp_path: Path) -> None:
    """What we write, we read: with everything given, nothing is started and nothing changes."""
    evaluate(str(runs / "tiny"), ["eval.name=again"])
    file = runs / "tiny/evaluations/again/rows.jsonl"
    evaluate(
        str(runs / "tiny"),
        ["eval.mode=pregenerated_policy_and_reward", f"eval.input={file}", "eval.name=reread"],
    )
    one, other = values_of(runs / "tiny", "again"), values_of(runs / "tiny", "reread")
    assert one == pytest.approx(other, nan_ok=True)


def test_an_answer_is_taken_from_the_tasks_own_problem(runs: Path, tmp_path: Path) -> None:
    evaluate(str(runs / "tiny"), ["eval.name=again"])
    row = rows_of(runs / "tiny", "again")[0]
    rows = [{"prompt": row.question, "generation": answer(row.answer), "score": 1.0}]
    folder = given(rows, runs, tmp_path, "pregenerated_policy_and_reward")
    assert values_of(folder.parent.parent, folder.name)["eval/pass_at_1"] == 1.0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generation_idx": 0}, r"given\.jsonl:4: generation_idx 0 of this question occurs twice"),
        ({"generation_idx": -1}, r"given\.jsonl:4: generation_idx=-1 is no whole number"),
        ({"generation_idx": "1"}, r"given\.jsonl:4: generation_idx='1' is no whole number"),
        ({"generation": None}, r"given\.jsonl:4: no column 'generation'"),
        ({"generation": 5}, r"given\.jsonl:4: the completion is int"),
        (
            {"answer": None, "question": "nobody asked"},
            r"given\.jsonl:4: no column 'answer', and the question is",
        ),
        ({"reward_model_score": "high"}, r"given\.jsonl:4: column 'reward_model_score' is neither"),
        ({"reward_model_score": [None, None]}, r"given\.jsonl:4: column 'reward_model_score' is neither"),
        ({"metadata": "abc"}, r"given\.jsonl:4: column 'metadata' holds str"),
        ({"policy_log_probs": [1, "x"]}, r"given\.jsonl:4: column 'policy_log_probs' is not a list"),
    ],
)
def test_a_bad_row_is_named(change: dict[str, Any], said: str, runs: Path, tmp_path: Path) -> None:
    rows = [dict(row) for row in PROBLEMS]
    rows[3] |= change
    with pytest.raises(DataError, match=said):
        given(rows, runs, tmp_path, "pregenerated_policy_and_reward")
    assert not (runs / "tiny/evaluations" / tmp_path.name).exists()


def test_scores_that_are_missing_need_a_reward(runs: Path, tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "reward_model_score"} for row in PROBLEMS]
    model = next((runs / ".cache" / "models").glob("built-*"))
    mode, file = "pregenerated_policy_and_reward", written(tmp_path / "given.jsonl", rows)
    with pytest.raises(UserError, match=r"no reward is named; set eval\.reward=RUN"):
        small = ["data.max_prompt_tokens=32", "rollout.max_completion_tokens=20"]
        evaluate(str(model), [f"eval.mode={mode}", f"eval.input={file}", f"output_dir={tmp_path}", *small])
    rows[2]["reward_model_score"] = 123.0
    folder = given(rows, runs, tmp_path, mode)  # the run's own reward scores them, but for what is given
    scores = [row.score for row in rows_of(folder.parent.parent, folder.name)]
    assert scores[2] == 123.0 and all(score is not None and score < 1 for score in scores[:2] + scores[3:])


@pytest.mark.parametrize(
    ("target", "overrides", "error", "said"),
    [
        ("tiny", ["eval.mode=pregenerated_policy"], ConfigError, r"set eval\.input=FILE"),
        ("tiny", ["eval.input=x.jsonl"], ConfigError, r"set eval\.mode=pregenerated_policy"),
        ("tiny", ["eval.mode=pregenerated_policy", "eval.input=x.jsonl"], ConfigError, "no such file"),
        ("tiny", ["eval.reward=nothing/here/at/all"], ModelError, "no reward model there"),
        ("no/such/run", [], ModelError, "neither a run folder"),
        ("no_such.yaml", [], ConfigError, r"no_such\.yaml"),
    ],
)
def test_a_wrong_question_is_one_line(
    target: str, overrides: list[str], error: type[Exception], said: str, runs: Path
) -> None:
    with pytest.raises(error, match=said):
        evaluate(target, [f"output_dir={runs}", *overrides])


def test_an_unfinished_run_says_how_to_finish_it(runs: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((runs / "tiny/config.yaml").read_text())
    (unfinished / "metrics.jsonl").touch()
    with pytest.raises(ModelError, match="train --resume"):
        evaluate(str(unfinished))
