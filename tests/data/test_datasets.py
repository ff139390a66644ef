"""The data sets of the hub: columns, splits, experts and grading, on invented rows and on real ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from rairl_ray.config.schema import Data, Fields, RunConfig
from rairl_ray.data.choices import gold_letter, read_options
from rairl_ray.data.completion_format import format_completion, is_well_formed
from rairl_ray.data.rows import BadRow
from rairl_ray.data.tasks import TASKS, make_task, task_rules
from rairl_ray.data.tasks.base import Task
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.trainer.prepare import usable_rows

DATASETS = {"aime", "gsm8k_distilled", "math500", "medical_o1", "medqa", "medreason", "mmlu_pro"}

ROWS: dict[str, dict[str, object]] = {
    "aime": {"problem": "Find n.", "answer": "033", "year": "2024"},
    "gsm8k_distilled": {
        "problem": "2+2?",
        "groud_truth_solution": "2+2=4\n#### 4",
        "reasoning_solution": "<think>two and two</think> So it is \\boxed{4}.",
    },
    "math500": {
        "problem": "Half?", "solution": "It is $\\boxed{\\frac12}$.", "answer": "\\frac12",
        "subject": "Algebra", "level": 2,
    },
    "medical_o1": {"Question": "Why?", "Complex_CoT": "Hm.\nSo.", "Response": "Because of iron, mostly."},
    "medqa": {
        "question": "Which?", "options": {"A": "iron", "B": "zinc"}, "answer": "zinc", "answer_idx": "B",
        "meta_info": "step1",
    },
    "medreason": {
        "question": "Which?", "options": "Answer Choices:\nA. iron\nB. zinc", "dataset_name": "medmcqa",
        "answer": "Zinc. Explanation: it is not A.", "reasoning": "Paths:\n1. a -> b\nConclusion: zinc.",
    },
    "mmlu_pro": {
        "question": "Which?", "options": ["iron", "zinc", "lead"], "answer": "C", "answer_index": 2,
        "category": "chemistry",
        "outputs": [
            {"text": "It is zinc. The answer is (B).", "pred": "B", "correct": False},
            {"text": "It is cut short", "pred": "C", "correct": True},
            {"text": "It is lead. The answer is (C).", "pred": "C", "correct": True},
        ],
    },
}  # fmt: skip

EXPERTS: dict[str, str | None] = {
    "aime": None,
    "gsm8k_distilled": format_completion("two and two So it is \\boxed{4}.", "4"),
    "math500": format_completion("It is $\\boxed{\\frac12}$.", "\\frac12"),
    "medical_o1": format_completion("Hm.\nSo.", "Because of iron, mostly."),
    "medqa": None,
    "medreason": format_completion("Paths:\n1. a -> b\nConclusion: zinc.", "B"),
    "mmlu_pro": format_completion("It is lead. The answer is (C).", "C"),
}


def loaded(tmp_path: Path, name: str, rows: list[dict], **changes: object) -> Task:
    """The task over one file whose rows serve both splits."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return make_task(Data(task=name, path=str(file), **{"train_split": "test", **changes}))


# --- invented rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_a_row_becomes_a_problem_with_its_expert(tmp_path, name: str) -> None:
    row = loaded(tmp_path, name, [ROWS[name]]).train[0]
    assert row.prompt.id == f"{name}/test/0"
    assert row.completion == EXPERTS[name]
    category = {"aime": "2024", "math500": "Algebra", "medqa": "step1", "medreason": "medmcqa",
                "mmlu_pro": "chemistry"}.get(name)  # fmt: skip
    assert row.prompt.metadata.get("category") == category
    golds = {"aime": "33", "gsm8k_distilled": "4", "medqa": "B", "medreason": "B", "mmlu_pro": "C"}
    assert row.prompt.answer == golds.get(name, row.prompt.answer)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_experts_are_right_and_other_answers_wrong_under_the_rules_alone(tmp_path, name: str) -> None:
    row = loaded(tmp_path, name, [ROWS[name]]).train[0]
    rules = task_rules(Data(task=name))
    expert = row.completion or format_completion("x", row.prompt.answer or "")
    assert rules.grader(row.prompt, expert) == (True, rules.grader(row.prompt, expert).answer, True)
    assert not rules.grader(row.prompt, format_completion("x", "A")).correct
    assert not rules.grader(row.prompt, format_completion("x", "A or B")).correct
    assert "<think>" in rules.system_prompt
    assert ("letter" in rules.system_prompt) == (name in ("medqa", "medreason", "mmlu_pro"))
    assert task_rules(Data(task=name, system_prompt="Go.")).system_prompt == "Go."


@pytest.mark.parametrize("name", sorted(set(TASKS) - DATASETS - {"gsm8k", "jsonl"}))
def test_rules_are_those_of_the_loaded_task(name: str) -> None:
    data = Data(task=name, eval_limit=3, limit=3)
    task, rules = make_task(data), task_rules(data)
    assert task.system_prompt == rules.system_prompt
    for row in task.eval:
        assert task.grade(row.prompt, row.completion) == rules.grader(row.prompt, row.completion)
    with pytest.raises(ConfigError, match="unknown task"):
        task_rules(Data(task="nothing"))


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_columns_may_have_other_names(tmp_path, name: str) -> None:
    own = TASKS[name].columns
    renames = {own.prompt: "q", own.answer: "a", own.demonstration or "-": "e"}
    row = {renames.get(key, key): value for key, value in ROWS[name].items()}
    expected = loaded(tmp_path, name, [ROWS[name]]).train
    fields = {"prompt": "q", "answer": "a"} | ({"demonstration": "e"} if name not in ("mmlu_pro",) else {})
    if own.demonstration is None:
        fields["demonstration"] = None
    found = loaded(tmp_path, name, [row], fields=Fields(**fields)).train
    assert found[0].prompt == expected[0].prompt
    assert name == "mmlu_pro" or found[0].completion == expected[0].completion
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no column 'nowhere'"):
        loaded(tmp_path, name, [ROWS[name]], fields=Fields(demonstration="nowhere"))


def test_the_general_names_serve_where_only_they_exist(tmp_path) -> None:
    row = {"prompt": "2+2?", "answer": "4", "target": "so \\boxed{4}"}
    assert loaded(tmp_path, "gsm8k_distilled", [row]).train[0].completion == format_completion(
        "so \\boxed{4}", "4"
    )


BAD_ROWS = [
    ("aime", {"answer": "1000"}, "not a whole number from 0 to 999"),
    ("aime", {"answer": "x+1"}, "not a whole number from 0 to 999"),
    ("aime", {"problem": None}, "column 'problem' holds NoneType"),
    ("gsm8k_distilled", {"groud_truth_solution": "a few"}, "no number in a box or after ####"),
    ("medqa", {"answer_idx": "E"}, r"the answer 'E' is none of the options \(A, B\)"),
    ("medqa", {"answer_idx": 2}, "the answer '2' is none of the options"),
    ("medqa", {"options": 7}, "column 'options' holds no options"),
    ("medreason", {"answer": "lead"}, "the answer 'lead' is none of the options"),
    ("medical_o1", {"Response": " "}, "column 'Response' is empty"),
    ("mmlu_pro", {"answer_index": 1}, "answer_index 1 is not the place of the answer C"),
    ("mmlu_pro", {"answer": "K"}, "the answer 'K' is none of the options"),
    ("mmlu_pro", {"outputs": [3]}, "not a list of objects with text, pred and correct"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path, name: str, changes: dict, reason: str) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl:2: .*{reason}") as error:
        loaded(tmp_path, name, [ROWS[name], {**ROWS[name], **changes}])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", sorted(DATASETS))
def test_every_column_that_a_task_needs_is_missed(tmp_path, name: str) -> None:
    own = TASKS[name].columns
    for column in {own.prompt, own.answer, own.demonstration} - {None, "outputs"}:
        row = {key: value for key, value in ROWS[name].items() if key not in (column, "answer")}
        with pytest.raises(DataError, match=r"rows\.jsonl:1: no column"):
            loaded(tmp_path, name, [row])


def test_duplicate_ids_are_named(tmp_path) -> None:
    rows = [{**ROWS["math500"], "unique_id": "u"}] * 2
    with pytest.raises(DataError, match=r"rows\.jsonl:2: unique_id 'u' occurs twice"):
        loaded(tmp_path, "math500", rows, fields=Fields(id="unique_id"))


def test_options_are_read_in_every_layout() -> None:
    expected = {"A": "iron", "B": "zinc"}
    for value in (
        ["iron", "zinc"], expected, {"a": "iron", "b": "zinc", "c": None}, '["iron", "zinc"]',
        '{"A": "iron", "B": "zinc"}', "A. iron\nB. zinc", "Answer Choices:\n(A) iron\n\nB: zinc",
    ):  # fmt: skip
        assert read_options(value) == expected
    assert read_options("no options here") is None and read_options(3) is None and read_options("") is None


def test_gold_letters() -> None:
    options = {"A": "7", "B": "1", "C": "lead"}
    assert [gold_letter(g, options) for g in ("c", "(C)", "Lead", 2, "7", 7, 0)] == list("CCCCAAA")
    for gold in (1, 3, "zinc", "A or B", True):  # 1: the place of B and the text of B agree
        if gold == 1 and gold is not True:
            assert gold_letter(gold, options) == "B"
        else:
            with pytest.raises(BadRow):
                gold_letter(gold, options)
    with pytest.raises(BadRow, match="the answer 1 is the place of option B and names option A"):
        gold_letter(1, {"A": "1", "B": "2"})


def test_chains_of_mmlu_pro(tmp_path) -> None:
    row = {**ROWS["mmlu_pro"], "cot_content": "A: Let's think step by step. It is lead. The answer is (C)."}
    without = {key: value for key, value in row.items() if key != "outputs"}
    expert = format_completion("It is lead. The answer is (C).", "C")
    assert loaded(tmp_path, "mmlu_pro", [without]).train[0].completion == expert
    assert loaded(tmp_path, "mmlu_pro", [{**without, "cot_content": ""}]).train[0].completion is None
    assert loaded(tmp_path, "mmlu_pro", [row]).train[0].completion == expert


def test_a_distilled_chain_with_a_wrong_answer_is_no_expert(tmp_path) -> None:
    row = {**ROWS["gsm8k_distilled"], "reasoning_solution": "So \\boxed{5}."}
    assert loaded(tmp_path, "gsm8k_distilled", [row]).train[0].completion is None


# --- splits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aime", "math500"])
def test_evaluation_only_data_are_not_split_and_refuse_training(tmp_path, name: str) -> None:
    rows = [{**ROWS[name], "problem": f"Find {i}."} for i in range(40)]
    task = loaded(tmp_path, name, rows, train_split="train", eval_limit=None)
    assert (len(task.train), len(task.eval)) == (0, 40)
    for algorithm in ("airl", "sft", "grpo"):
        config = RunConfig.model_validate({"algorithm": {"type": algorithm}})
        with pytest.raises(DataError, match=rf"data\.task={name}: .* nothing to train on; give data\.path"):
            usable_rows(task, None, config)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "test.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    task = make_task(Data(task=name, path=str(folder)))
    assert (len(task.train), len(task.eval)) == (0, 40)
    (folder / "train.jsonl").write_text((tmp_path / "rows.jsonl").read_text())
    assert len(make_task(Data(task=name, path=str(folder))).train) == 40


def test_data_without_experts_say_so(tmp_path) -> None:
    task = loaded(tmp_path, "medqa", [ROWS["medqa"]])
    with pytest.raises(DataError, match=r"data\.task=medqa: the training data has no expert chains"):
        usable_rows(task, None, RunConfig())


@pytest.mark.parametrize("name", ["gsm8k_distilled", "medreason", "medical_o1"])
def test_data_of_one_split_hold_some_out(tmp_path, name: str) -> None:
    prompt = TASKS[name].columns.prompt
    rows = [{**ROWS[name], prompt: f"Question {i}?"} for i in range(200)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task(Data(task=name, path=str(tmp_path), eval_limit=None))
    assert len(task.train) + len(task.eval) == 200 and 8 < len(task.eval) < 40
    assert not {r.prompt.question for r in task.train} & {r.prompt.question for r in task.eval}


def test_default_hub_sources_are_read_split_by_split(monkeypatch) -> None:
    asked = []

    def fake(source: str, split: str, config_name: str | None):
        asked.append((source, split, config_name))
        return iter(())

    monkeypatch.setattr("rairl_ray.data.rows._read_hub", fake)
    for name in sorted(DATASETS | {"gsm8k"}):
        with pytest.raises(DataError, match="no rows"):
            make_task(Data(task=name))
    with pytest.raises(DataError, match="no rows"):
        make_task(Data(task="mmlu_pro", train_split="extra", config_name="other"))
    assert asked == [
        ("HuggingFaceH4/aime_2024", "train", None),
        ("openai/gsm8k", "train", "main"),
        ("camel-ai/gsm8k_distilled", "train", None),
        ("HuggingFaceH4/MATH-500", "test", None),
        ("FreedomIntelligence/medical-o1-reasoning-SFT", "train", "en"),
        ("GBaker/MedQA-USMLE-4-options", "train", None),
        ("UCSC-VLAA/MedReason", "train", None),
        ("TIGER-Lab/MMLU-Pro", "validation", None),
        ("TIGER-Lab/MMLU-Pro", "extra", "other"),
    ]


def test_both_years_of_aime_come_from_their_own_hub_data(monkeypatch) -> None:
    from rairl_ray.data import rows as reading

    def fake(source: str, split: str, config_name: str | None):
        row = {**ROWS["aime"], "year": 2024} if source.endswith("2024") else {"problem": "?", "answer": 7}
        for i in range(3):
            yield reading.Row(f"{source}: row {i}", i, row)

    monkeypatch.setattr("rairl_ray.data.rows._read_hub", fake)
    task = make_task(Data(task="aime"))
    assert [row.prompt.id for row in task.eval] == [f"aime/{y}/{i}" for y in (2024, 2025) for i in range(3)]
    assert [row.prompt.metadata["category"] for row in task.eval] == ["2024"] * 3 + ["2025"] * 3
    assert len(make_task(Data(task="aime", eval_limit=4)).eval) == 4


# --- real rows -------------------------------------------------------------------------------------


def test_math500_experts_are_right(shared_data) -> None:
    path = shared_data / "math500" / "test.jsonl"
    task = make_task(Data(task="math500", path=str(path), eval_limit=None))
    assert (len(task.train), len(task.eval)) == (0, 500)
    wrong = [r.prompt.id for r in task.eval if not task.grade(r.prompt, r.completion or "").correct]
    assert wrong == []
    assert all(is_well_formed(row.completion or "") for row in task.eval)
    assert len({row.prompt.metadata["category"] for row in task.eval}) == 7
    assert {row.prompt.metadata["level"] for row in task.eval} == set("12345")


def test_mmlu_pro_experts_are_right_and_other_letters_wrong(shared_data) -> None:
    path = shared_data / "mmlu_pro_sample" / "multi_model_cot.jsonl"
    task = make_task(Data(task="mmlu_pro", path=str(path), train_split="test", eval_limit=None))
    assert len(task.eval) == 420
    assert Counter(row.prompt.metadata["category"] for row in task.eval).most_common()[-1][1] == 30
    experts = [row for row in task.eval if row.completion is not None]
    assert len(experts) == 371 - GUESSED
    for row in experts:
        assert task.grade(row.prompt, row.completion) == (True, row.prompt.answer, True)
    for row in task.eval:
        options = row.prompt.metadata["options"]
        for letter in options:
            verdict = task.grade(row.prompt, format_completion("x", letter))
            assert verdict.correct is (letter == row.prompt.answer)


GUESSED = 6
"""Problems whose only chains that count as correct do not say their letter: guesses of the upstream reader."""


def test_medqa_on_real_rows(shared_data) -> None:
    path = shared_data / "medqa" / "test.jsonl"
    task = make_task(Data(task="medqa", path=str(path), eval_limit=None))
    assert len(task.train) + len(task.eval) == 1273 and 90 < len(task.eval) < 170
    for row in [*task.train, *task.eval]:
        options, gold = row.prompt.metadata["options"], row.prompt.answer
        assert row.prompt.question.endswith("\n".join(f"{k}. {v}" for k, v in options.items()))
        assert task.grade(row.prompt, format_completion("x", options[gold])).correct
        for letter in options:
            assert task.grade(row.prompt, format_completion("x", letter)).correct is (letter == gold)


def test_gsm8k_rows_serve_as_distilled_ones(shared_data) -> None:
    """The same problems in the other layout: worked solutions as the chains, boxed."""
    path = str(shared_data / "gsm8k" / "test.jsonl")
    fields = Fields(prompt="question", demonstration="answer")
    task = make_task(Data(task="gsm8k_distilled", path=path, fields=fields, eval_limit=None))
    assert len(task.train) + len(task.eval) == 1319
    for row in [*task.train, *task.eval]:
        assert row.completion is not None and task.grade(row.prompt, row.completion).correct
