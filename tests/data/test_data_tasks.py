"""Tasks: generated problems and experts, GSM8K, tables, grading of each (docs/method.md 8, defect 17)."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.config.schema import Arithmetic, Countdown, Data, Fields
from rairl_ray.data.completion_format import format_completion, is_well_formed
from rairl_ray.data.tasks import TASKS, make_task
from rairl_ray.data.tasks.arithmetic import worked_steps
from rairl_ray.data.tasks.countdown import expression_value, solve
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.types import Prompt
from tests.data.test_datasets import DATASETS

# --- registry --------------------------------------------------------------------------------------


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"data\.task=arithmetics: unknown task; did you mean arithmetic\?"):
        make_task(Data(task="arithmetics"))
    with pytest.raises(ConfigError, match="choose one of aime, arithmetic, countdown, gsm8k"):
        make_task(Data(task="zzz"))


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_generated_tasks_repeat_themselves_and_ignore_the_run_seed(name: str) -> None:
    data = Data(task=name, eval_limit=20)
    first, second = make_task(data, 0), make_task(data, 1)
    assert first.eval == second.eval and first.train[12_345] == second.train[12_345]
    assert first.data_hash == second.data_hash
    assert first.train[17].prompt.id == f"{name}/train/17" and len(first.train) == 200_000
    assert first.train[-1] == first.train[199_999] and first.train[3:5] == [first.train[3], first.train[4]]
    with pytest.raises(IndexError):
        first.train[200_000]
    assert len(make_task(data.model_copy(update={"limit": 7})).train) == 7
    assert pickle.loads(pickle.dumps(first)).eval == first.eval


def test_generated_problems_do_not_depend_on_the_process() -> None:
    code = "from rairl_ray.config.schema import Data; from rairl_ray.data.tasks import make_task; " \
           "print(make_task(Data()).train[5].prompt.question)"  # fmt: skip
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert printed.stdout.strip() == make_task(Data()).train[5].prompt.question


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_generated_splits_share_no_question(name: str) -> None:
    task = make_task(Data(task=name, eval_limit=300))
    questions = [row.prompt.question for row in task.eval]
    assert len(set(questions)) == 300
    assert not set(questions) & {task.train[i].prompt.question for i in range(3_000)}


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_generated_experts_are_right_and_well_formed(name: str) -> None:
    task = make_task(Data(task=name, eval_limit=100))
    for row in task.eval:
        assert row.completion is not None
        grade = task.grade(row.prompt, row.completion)
        assert grade.correct and grade.format_ok and is_well_formed(row.completion)


def test_data_hash_follows_what_the_run_reads() -> None:
    hashes = [
        make_task(Data(eval_limit=5, **changes)).data_hash
        for changes in ({}, {"limit": 5}, {"arithmetic": Arithmetic(digits=2)}, {"task": "countdown"})
    ]
    assert len(set(hashes)) == 4


# --- arithmetic ------------------------------------------------------------------------------------

operand_lists = st.lists(st.integers(1, 99), min_size=2, max_size=6)


@given(operand_lists, st.data())
def test_steps_follow_precedence_and_each_is_true(operands: list[int], data: st.DataObject) -> None:
    size = len(operands) - 1
    operators = data.draw(st.lists(st.sampled_from("+-*"), min_size=size, max_size=size))
    lines, value = worked_steps(operands, operators)
    text = str(operands[0]) + "".join(f"{o}{n}" for o, n in zip(operators, operands[1:], strict=True))
    found = expression_value(text)
    assert found is not None and found[0] == value
    assert len(lines) == size
    signs = []
    for line in lines:
        match = re.fullmatch(r"(-?\d+)([-+*])(-?\d+)=(-?\d+)", line)
        assert match is not None
        left, sign, right, result = int(match[1]), match[2], int(match[3]), int(match[4])
        assert {"+": left + right, "-": left - right, "*": left * right}[sign] == result
        signs.append(sign)
    assert Counter(signs) == Counter(operators)
    assert all(b != "*" or a == "*" for a, b in pairwise(signs))  # products first


def test_steps_as_written() -> None:
    assert worked_steps([3, 5, 2, 7], "+++") == (["3+5=8", "8+2=10", "10+7=17"], 17)
    assert worked_steps([3, 4, 5, 2], "+*-") == (["4*5=20", "3+20=23", "23-2=21"], 21)
    assert worked_steps([2, 9, 1], "-+") == (["2-9=-7", "-7+1=-6"], -6)


def test_arithmetic_difficulty() -> None:
    settings = Arithmetic(operands_min=3, operands_max=5, digits=2, operators=("+", "-"))
    task = make_task(Data(arithmetic=settings, eval_limit=5))
    problems = [task.train[i].prompt.question for i in range(300)]
    operands = [re.findall(r"\d+", text) for text in problems]
    assert {len(numbers) for numbers in operands} == {3, 4, 5}
    assert {len(n) for numbers in operands for n in numbers} == {1, 2}
    assert all(n[0] != "0" for numbers in operands for n in numbers)
    assert {c for text in problems for c in text if not c.isdigit()} == set("+-=?")
    assert make_task(Data()).train[0].prompt.question.count("+") == 3
    assert make_task(Data()).system_prompt == ""
    assert make_task(Data(system_prompt="Add.")).system_prompt == "Add."


def test_arithmetic_refuses_impossible_difficulties(caplog) -> None:
    with pytest.raises(ConfigError, match=r"operands_min=5 and operands_max=4"):
        make_task(Data(arithmetic=Arithmetic(operands_min=5)))
    with pytest.raises(ConfigError, match="operators is empty"):
        make_task(Data(arithmetic=Arithmetic(operators=())))
    few = make_task(
        Data(arithmetic=Arithmetic(operands_min=2, operands_max=2), eval_limit=30)
    )  # 81 problems in all
    assert 1 <= len(few.eval) < 30 and "only about" in caplog.text


# --- countdown -------------------------------------------------------------------------------------


def _countdown(numbers: list[int], target: int) -> Prompt:
    return Prompt(id="c", question="?", answer=None, metadata={"numbers": numbers, "target": target})


@pytest.mark.parametrize(
    ("answer", "correct"),
    [
        ("(3+5)*2", True), ("2*(5+3)", True), ("2 × (5 + 3)", True), ("(3+5)*2 = 16", True), ("[3+5]*2", True),
        ("7+9", False), ("(3+5)*2*1", False), ("8+8", False), ("16", False), ("(3+5)*2=17", False),
        ("3+5", False), ("2**(7-3)", False), ("2*-(3-5-7)", False), ("7//3*5+3-2", False), ("(3+5)*2)", False),
        ("(3+5)*2.0", False), ("0x10", False), ("1_6", False), ("True+7", False), ("3+5/0", False), ("", False),
        ("__import__('os').system('touch pwned')", False), ("lambda: 16", False), ("9**9**9**9", False),
        ("(" * 90 + "16" + ")" * 90, False), ("(3+5)*2;1", False), ("1e1+6", False), ("16 if 1 else 0", False),
        ("(3+5)*2\n+0", False), ("+".join(["3"] * 5000), False), ("03+5+8", False),
    ],
)  # fmt: skip
def test_countdown_grading(answer: str, correct: bool, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    task = make_task(Data(task="countdown", eval_limit=1))
    assert task.grade(_countdown([3, 5, 2, 7], 16), format_completion("x", answer)).correct is correct
    assert not list(tmp_path.iterdir())


def test_countdown_counts_every_use_and_stays_exact() -> None:
    task = make_task(Data(task="countdown", eval_limit=1))
    assert task.grade(_countdown([4, 4, 1, 2], 8), format_completion("x", "4+4")).correct
    assert not task.grade(_countdown([4, 8, 1, 2], 8), format_completion("x", "4+4")).correct
    assert task.grade(_countdown([1, 3, 3, 7], 3), format_completion("x", "1/3*3*3")).correct is False
    assert task.grade(_countdown([1, 3, 9, 7], 3), format_completion("x", "1/3*9")).correct
    assert not task.grade(_countdown([1, 3, 3, 7], 3), "so 3").correct


@given(st.text(alphabet="0123456789+-*/() .*abc_[]'=", max_size=30))
def test_expressions_agree_with_an_independent_reading(text: str) -> None:
    """Only sums, products and quotients of whole numbers have a value, and it is the exact one."""
    found = expression_value(text)
    if found is None:
        return
    assert re.fullmatch(r"[0-9+\-*/() ]+", text) and "**" not in text and "//" not in text
    exact = re.sub(r"\d+", lambda m: f"Fraction({m[0]})", text.strip())
    assert found[0] == eval(exact, {"Fraction": Fraction})  # only what matched the pattern above
    assert found[1] == Counter(map(int, re.findall(r"\d+", text)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(1, 60))
def test_search_finds_true_solutions(numbers: list[int], target: int) -> None:
    solution = solve(numbers, target, nodes=10**9)
    reachable = target in _reachable(numbers)
    assert (solution is not None) == reachable
    if solution:
        found = expression_value(solution.expression)
        assert found is not None and found[0] == target and found[1] <= Counter(numbers)
        assert solution.steps[-1].endswith(f"={target}")
        for step in solution.steps:
            left, _, right = step.partition("=")
            value = expression_value(left)
            assert value is not None and value[0] == int(right)


def _reachable(numbers: list[int]) -> set[int]:
    """All results of at least one operation on a sub-multiset, positive whole intermediates, by brute force."""
    results: set[int] = set()

    def walk(values: tuple[int, ...]) -> None:
        for i in range(len(values)):
            for j in range(len(values)):
                if i == j:
                    continue
                a, b = values[i], values[j]
                rest = tuple(v for k, v in enumerate(values) if k not in (i, j))
                found = [a + b] + ([a - b] if a > b else [])
                if 1 not in (a, b):  # by one, nothing new comes of it
                    found += [a * b] + ([a // b] if a % b == 0 else [])
                results.update(found)
                for value in found:
                    walk((value, *rest))

    walk(tuple(numbers))
    return results


def test_countdown_difficulty() -> None:
    task = make_task(Data(task="countdown", countdown=Countdown(numbers=6, largest=25), eval_limit=10))
    for row in task.eval:
        numbers, target = row.prompt.metadata["numbers"], row.prompt.metadata["target"]
        assert len(numbers) == 6 and max(numbers) <= 25 and target not in numbers and target <= 1_000
        assert str(numbers)[1:-1] in row.prompt.question and f"Target: {target}." in row.prompt.question
    assert "each number at most once" in task.system_prompt


# --- gsm8k -----------------------------------------------------------------------------------------


def test_gsm8k_experts_are_the_worked_solutions(shared_data) -> None:
    task = make_task(Data(task="gsm8k", path=str(shared_data / "gsm8k"), eval_limit=None))
    assert (len(task.train), len(task.eval)) == (7473, 1319)
    for row in [*task.train, *task.eval]:
        assert row.completion is not None and is_well_formed(row.completion)
        assert "<<" not in row.completion and "####" not in row.completion
        assert task.grade(row.prompt, row.completion) == (True, row.prompt.answer, True)
    assert task.train[0].completion == format_completion(
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.", "72"
    )
    assert task.train[0].prompt.id == "gsm8k/train/0" and "<think>" in task.system_prompt


def test_gsm8k_limits_and_single_file(shared_data) -> None:
    path = shared_data / "gsm8k" / "test.jsonl"
    task = make_task(Data(task="gsm8k", path=str(path), limit=100, eval_limit=20))
    assert (len(task.train), len(task.eval)) == (100, 20)
    whole = make_task(Data(task="gsm8k", path=str(path), eval_limit=None))
    assert len(whole.train) + len(whole.eval) == 1319 and 90 < len(whole.eval) < 180
    assert not {r.prompt.question for r in whole.train} & {r.prompt.question for r in whole.eval}
    same = make_task(Data(task="gsm8k", path=str(path), train_split="test", eval_limit=None))
    assert len(same.train) == len(same.eval) == 1319


def test_gsm8k_bad_rows(tmp_path) -> None:
    row = {"question": "q?", "answer": "1+1=2\n#### 2"}
    for bad, reason in (
        ({"question": "q?", "answer": "1+1=2"}, "ends in no number after ####"),
        ({"answer": "#### 2"}, "no column 'question'"),
        ({"question": "q?"}, "no column 'answer'"),
    ):
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, [row, bad])))
        (tmp_path / "test.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match=rf"train\.jsonl:2: .*{reason}"):
            make_task(Data(task="gsm8k", path=str(tmp_path)))


def test_other_chains_of_thought_replace_the_experts(tmp_path) -> None:
    rows = [{"question": f"q{i}?", "answer": f"own\n#### {i}"} for i in range(3)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chains = [
        {"prompt": "q1?", "target": "so it is one"},
        {"prompt": "q2?", "target": "<think>two</think> \\boxed{2}"},
    ]
    file = tmp_path / "chains.jsonl"
    file.write_text("\n".join(map(json.dumps, chains)))
    data = Data(task="gsm8k", path=str(tmp_path), demonstrations=str(file))
    task = make_task(data)
    assert [row.completion for row in task.train] == [
        None,
        "so it is one",
        format_completion("two \\boxed{2}", "2"),
    ]
    assert task.eval[0].completion == format_completion("own", "0")
    file.write_text(json.dumps({"prompt": "another?", "target": "x"}))
    with pytest.raises(
        DataError, match=r"data\.demonstrations=.*no row matches a training problem by column 'prompt'"
    ):
        make_task(data)
    with pytest.raises(DataError, match=r"data\.demonstrations=.*gone\.jsonl: no such file"):
        make_task(data.model_copy(update={"demonstrations": str(tmp_path / "gone.jsonl")}))
    file.write_text('{"prompt": "q1?"}')
    with pytest.raises(DataError, match=r"chains\.jsonl:1: no text in column 'target'"):
        make_task(data)


# --- jsonl -----------------------------------------------------------------------------------------


def _jsonl(tmp_path, rows: list[dict], **changes: object) -> Data:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return Data(task="jsonl", path=str(tmp_path), **changes)


def test_jsonl_expert_texts_take_the_one_format(tmp_path) -> None:
    own = format_completion("reasoned", "7")
    cases = [
        ({"target": own}, own),
        ({"target": "three and four\n#### 7"}, format_completion("three and four", "7")),
        ({"target": "it is \\boxed{7}"}, format_completion("it is \\boxed{7}", "7")),
        # the gold answer is never put into an expert's mouth; what the expert states in words is its own
        ({"target": "three and four", "answer": 7}, "three and four"),
        ({"target": "So the answer is 8.", "answer": 7}, format_completion("So the answer is 8.", "8")),
        ({"target": "<think>hm</think><answer>7</answer> bye"}, format_completion("hm bye", "7")),
        ({"target": "a poem"}, "a poem"),
        ({"target": None, "answer": "7"}, None),
        ({"answer": "7"}, None),
    ]
    task = make_task(_jsonl(tmp_path, [{"prompt": f"p{i}", **row} for i, (row, _) in enumerate(cases)]))
    assert [row.completion for row in task.train] == [expected for _, expected in cases]


def test_jsonl_nested_columns_ids_and_shipped_corruptions(tmp_path) -> None:
    row = {"q": {"text": "2+2?"}, "gold": {"value": 4}, "runs": [{"cot": "four"}], "uid": "x-1",
           "corrupted_reasonings": ["five\n#### 5"]}  # fmt: skip
    fields = Fields(prompt="q.text", answer="gold.value", demonstration="runs.0.cot", id="uid")
    task = make_task(_jsonl(tmp_path, [row], fields=fields))
    demonstration = task.train[0]
    assert demonstration.prompt == Prompt(id="jsonl/train/x-1", question="2+2?", answer="4")
    assert demonstration.completion == "four"
    assert demonstration.corrupted == (format_completion("five", "5"),)


@pytest.mark.parametrize(
    ("grader", "gold", "right", "wrong"),
    [
        ("number", "18", "18 cm", "18 or 19"),
        ("math", "\\frac{1}{2}", "0.5", "x"),
        ("text", "Paris", "paris.", "Rome"),
    ],
)
def test_jsonl_graders(tmp_path, grader: str, gold: str, right: str, wrong: str) -> None:
    task = make_task(_jsonl(tmp_path, [{"prompt": "p", "answer": gold}], grader=grader))
    assert task.grade(task.eval[0].prompt, format_completion("x", right)).correct
    assert not task.grade(task.eval[0].prompt, format_completion("x", wrong)).correct


def test_jsonl_choice_on_real_questions(shared_data) -> None:
    fields = Fields(prompt="question", answer="answer_idx")
    path = str(shared_data / "medqa")
    data = Data(task="jsonl", path=path, train_split="test", grader="choice", fields=fields, eval_limit=None)
    task = make_task(data)
    assert len(task.eval) == 1273
    for row in task.eval:
        options = row.prompt.metadata["options"]
        gold = row.prompt.answer
        assert f"\n{gold}. {options[gold]}" in row.prompt.question
        assert task.grade(row.prompt, format_completion("x", gold)).correct
        assert task.grade(row.prompt, format_completion("x", options[gold])).correct
        assert task.grade(row.prompt, format_completion("x", f"{gold}) {options[gold]}")).correct
        wrong = next(letter for letter in options if letter != gold)
        assert not task.grade(row.prompt, format_completion("x", wrong)).correct
        assert not task.grade(row.prompt, format_completion("x", options[wrong])).correct
        assert not task.grade(row.prompt, format_completion("x", f"{gold} or {wrong}")).correct


def test_jsonl_refuses_what_it_cannot_use(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path is not set; data\.task=jsonl needs"):
        make_task(Data(task="jsonl"))
    with pytest.raises(DataError, match=r"neither answers .* nor experts"):
        make_task(_jsonl(tmp_path, [{"prompt": "p", "label": "x"}]))
    with pytest.raises(DataError, match=r"train\.jsonl:1: data\.grader=choice needs a column 'options'"):
        make_task(_jsonl(tmp_path, [{"prompt": "p", "answer": "A"}], grader="choice"))
    with pytest.raises(DataError, match="the answer 'Z' is none of the options"):
        make_task(_jsonl(tmp_path, [{"prompt": "p", "answer": "Z", "options": ["x", "y"]}], grader="choice"))


def test_every_task_is_covered_here_or_in_test_datasets() -> None:
    assert set(TASKS) == {"arithmetic", "countdown", "gsm8k", "jsonl"} | DATASETS
