"""`data.expert_error_rate`: which demonstrations are made wrong, and that they are."""

from __future__ import annotations

import json
import logging
from itertools import pairwise

import pytest

from rairl_ray.algorithms.negatives import perturb
from rairl_ray.config.schema import Data, RunConfig
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks import make_task
from rairl_ray.data.tasks.base import Task
from rairl_ray.data.tasks.generated import GeneratedSplit
from rairl_ray.trainer.expert_errors import counted_errors, with_expert_errors
from rairl_ray.trainer.prepare import usable_rows


def wrong_rows(task: Task, rate: float, rows: int) -> dict[str, str]:
    """Id -> text of the demonstrations that differ from the task's own."""
    erring = with_expert_errors(task, rate)
    pairs = [(task.train[i], erring.train[i]) for i in range(rows)]
    assert all(old.prompt == new.prompt for old, new in pairs)
    return {old.prompt.id: new.completion or "" for old, new in pairs if old.completion != new.completion}


@pytest.mark.parametrize("name", ["arithmetic", "countdown"])
def test_the_share_is_kept_and_grows_around_the_same_examples(name: str) -> None:
    task = make_task(Data(task=name, eval_limit=5))
    found = [wrong_rows(task, rate, 1000) for rate in (0.1, 0.2, 0.5, 1.0)]
    for rate, wrong in zip((0.1, 0.2, 0.5, 1.0), found, strict=True):
        assert abs(len(wrong) / 1000 - rate) < 4 * (rate * (1 - rate) / 1000) ** 0.5 + 0.01
    for fewer, more in pairwise(found):
        assert fewer.items() <= more.items()
    assert found[1] == wrong_rows(make_task(Data(task=name, eval_limit=5), seed=7), 0.2, 1000)


def test_nothing_else_changes() -> None:
    task = make_task(Data(eval_limit=5))
    assert with_expert_errors(task, 0.0) is task
    erring = with_expert_errors(task, 0.2)
    assert erring.eval == task.eval and len(erring.train) == len(task.train)
    assert erring.data_hash not in (task.data_hash, with_expert_errors(task, 0.1).data_hash)
    assert erring.train[3:6] == [erring.train[i] for i in (3, 4, 5)] and erring.train[-1].prompt.id
    with pytest.raises(IndexError):
        erring.train[len(task.train)]


def test_generated_demonstrations_are_made_when_asked_for(monkeypatch) -> None:
    made = []
    task = make_task(Data(eval_limit=5))
    own = GeneratedSplit._make
    monkeypatch.setattr(GeneratedSplit, "_make", lambda self, index: made.append(index) or own(self, index))
    erring = with_expert_errors(task, 0.5)
    assert max(made) < 500
    assert erring.train[123_456].prompt.id == "arithmetic/train/123456"


def test_the_share_is_logged_with_what_could_not_be_made_wrong(tmp_path, caplog) -> None:
    rows = [{"prompt": f"p{i}", "target": "a poem", "answer": "rose"} for i in range(30)]
    rows += [{"prompt": f"q{i}", "target": "3+4=7\n#### 7"} for i in range(30)]
    rows += [{"prompt": f"n{i}", "answer": "7"} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task(Data(task="jsonl", path=str(tmp_path), eval_split="train"))
    with caplog.at_level(logging.WARNING):
        erring = with_expert_errors(task, 1.0)
    assert isinstance(erring.train, list)
    assert [r.completion for r in erring.train[:30]] == [r.completion for r in task.train[:30]]
    assert all(a.completion != b.completion for a, b in zip(erring.train[30:60], task.train[30:], strict=False))
    assert all(row.completion is None for row in erring.train[60:])
    assert "30 of 60 demonstrations corrupted (50.0%); 30 could not be" in caplog.text


def test_every_run_learns_from_them() -> None:
    config = RunConfig.model_validate({"data": {"expert_error_rate": 1.0, "eval_limit": 5, "limit": 20}})
    task = make_task(config.data)
    renderer = Renderer(character_tokenizer(256), "", "auto")
    rows = usable_rows(task, renderer, config).train
    assert all(rows[i].completion != task.train[i].completion for i in range(20))


def test_real_experts_are_made_wrong(shared_data) -> None:
    task = make_task(Data(task="gsm8k", path=str(shared_data / "gsm8k"), limit=500, eval_limit=1))
    wrong = wrong_rows(task, 0.3, 500)
    assert 110 < len(wrong) < 190
    path = str(shared_data / "mmlu_pro_sample" / "multi_model_cot.jsonl")
    task = make_task(Data(task="mmlu_pro", path=path, train_split="test"))
    experts = [row for row in task.train if row.completion is not None]
    erring = with_expert_errors(task, 1.0)
    assert sum(a.completion != b.completion for a, b in zip(task.train, erring.train, strict=True)) == len(
        experts
    )


def test_no_chain_gets_the_gold_answer_and_wrong_conclusions_are_counted(tmp_path, caplog) -> None:
    """Of four experts one marks a wrong answer, one states a wrong one in words, one has none, one is right."""
    targets = ["2+2=5\n#### 5", "2+2=3. So the answer is 3.", "two and two", "2+2=4\n#### 4"]
    rows = [
        {
            "prompt": f"2+2? ({i})",
            "answer": "4",
            "target": text,
            "corrupted_reasonings": ["2+2=7. The answer is 7."],
        }
        for i, text in enumerate(targets)
    ]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = make_task(Data(task="jsonl", path=str(tmp_path), grader="number"))
    assert [task.grade(row.prompt, row.completion or "").correct for row in task.train] == [False] * 3 + [True]
    for row in task.train:
        copies, dropped = perturb(row, count=1, kinds=["corrupted"], key=(0, row.prompt.id))
        assert dropped == 0 and task.grade(row.prompt, copies[0].text) == (False, "7", True)
    with caplog.at_level(logging.WARNING):
        assert counted_errors(task) == {"data/expert_error_rate": 2 / 3}
    assert "1 experts mark no answer" in caplog.text
    assert "2 of 3 experts conclude another answer than the gold one (such as jsonl/train/0" in caplog.text
    assert counted_errors(make_task(Data(eval_limit=5))) == {"data/expert_error_rate": 0.0}
    erring = with_expert_errors(make_task(Data(eval_limit=5)), 0.5)
    assert (
        0.2 < counted_errors(erring)["data/expert_error_rate"] < 0.55
    )  # an error in a step may spare the answer
