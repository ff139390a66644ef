"""Bootstrap intervals, the summary of an evaluation, and its rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_ind
from sklearn.metrics import roc_auc_score

from rairl_ray.errors import DataError
from rairl_ray.evaluation import bootstrap as bootstrap_module
from rairl_ray.evaluation.bootstrap import bootstrap, bootstrap_statistic, resampled_sums
from rairl_ray.evaluation.rows import EvalRow, read_numbers, read_rows, write_rows
from rairl_ray.evaluation.summary import legal_category, summarise


def row(prompt: str, index: int, correct: bool, **changes: object) -> EvalRow:
    values: dict = {
        "prompt_id": prompt,
        "question": "1+1?",
        "generation": "<think>\n1+1=2\n</think>",
        "generation_idx": index,
        "answer": "2",
        "correct": correct,
        "extracted": "2" if correct else "3",
        "format_ok": True,
        "finish_reason": "stop",
        "tokens": 10,
        "policy_version": 3,
    }
    return EvalRow(**values | changes)


def test_bootstrap_is_keyed_and_near_the_normal_interval() -> None:
    values = (np.random.default_rng(2).random(400) < 0.3).astype(float)
    value, low, high = bootstrap(values, 4000, (0, "x"))
    assert (value, low, high) == bootstrap(values, 4000, (0, "x"))
    assert (low, high) != bootstrap(values, 4000, (1, "x"))[1:]
    half = 1.96 * values.std() / math.sqrt(400)
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.006)
    assert bootstrap([0.5, math.nan], 10, ()) == (0.5, 0.5, 0.5)
    assert all(math.isnan(x) for x in bootstrap([], 10, ()))


def test_bootstrap_resamples_problems_not_rows() -> None:
    """Eight copies of each problem's value carry no more information than one."""
    correct = np.repeat(np.random.default_rng(3).random(100) < 0.5, 8)
    problem = np.repeat(np.arange(100), 8)
    _, low, high = bootstrap_statistic(
        lambda counts: float(np.average(correct, weights=counts[problem])), 100, 2000, ()
    )
    assert high - low == pytest.approx(2 * 1.96 * correct.std() / math.sqrt(100), rel=0.1)


def test_resamples_in_blocks_are_as_many_and_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many problems do not fit one block: no block repeats another's draws, and both ways to use them agree."""
    values = np.random.default_rng(4).random(50)
    whole = resampled_sums(values, 21, ("one",))
    monkeypatch.setattr(bootstrap_module, "BLOCK", 8 * 50)
    parts = resampled_sums(values, 21, ("one",))
    assert parts.shape == whole.shape == (21,)
    assert len(set(parts.round(9))) == 21
    assert parts[:8] == pytest.approx(whole[:8])
    mean = bootstrap(values, 21, ("one",))
    assert mean == pytest.approx(bootstrap_statistic(lambda counts: counts @ values / 50, 50, 21, ("one",)))


def test_summary_against_values_by_hand() -> None:
    rows = [
        row("a", 0, True, score=2.0, tokens=4),
        row("a", 1, False, score=1.0, tokens=9),
        row("a", 2, False, score=-1.0, tokens=9),
        row("b", 0, False, score=3.0, tokens=5, extracted=None, format_ok=False, finish_reason="length"),
        row("b", 1, True, score=0.0, tokens=7),
        row("b", 2, True, score=0.0, tokens=9),
        row("c", 0, True, score=1.5),  # two of its samples are lost
    ]
    summary = summarise(rows, k=(1, 3), resamples=50, key=(0,))
    value = {name: entry["value"] for name, entry in summary.items()}
    count = {name: entry["n"] for name, entry in summary.items()}
    assert value["eval/pass_at_1"] == pytest.approx((1 / 3 + 2 / 3 + 1) / 3)
    assert value["eval/pass_at_3"] == 1.0 and count["eval/pass_at_3"] == 2
    assert value["eval/random_at_1"] == pytest.approx(0.5)
    assert value["eval/majority_at_3"] == pytest.approx((0 + 1) / 2)
    assert value["eval/oracle_at_3"] == 1.0
    assert value["eval/rerank_at_1"] == pytest.approx((1 + 0) / 2)
    assert value["eval/shortest_at_1"] == pytest.approx((1 + 0) / 2)
    assert value["eval/longest_at_1"] == pytest.approx((0 + 1) / 2)
    assert value["eval/format_share"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert value["eval/truncated_share"] == pytest.approx((0 + 1 / 3 + 0) / 3)
    correct, scores = [r.correct for r in rows], [r.score for r in rows]
    assert value["calibration/auroc"] == pytest.approx(roc_auc_score(correct, scores))
    assert value["calibration/auroc_within_problem"] == pytest.approx((1.0 + 0.0) / 2)
    assert (count["calibration/auroc_within_problem"], count["calibration/auroc"]) == (2, 3)
    for name, entry in summary.items():
        assert set(entry) == {"value", "low", "high", "n"} or name == "calibration/right_wrong_p"
        assert (
            math.isnan(entry.get("low", math.nan))
            or entry["low"] - 1e-12 <= entry["value"] <= entry["high"] + 1e-12
        )


def test_summary_without_reward_has_no_reward_metrics() -> None:
    summary = summarise([row("a", 0, True), row("a", 1, False)], resamples=10)
    assert "eval/pass_at_1" in summary and "eval/rerank_at_1" not in summary
    assert not any(name.startswith("calibration/") for name in summary)
    assert summarise([]) == {}


def test_summary_refuses_a_generation_counted_twice() -> None:
    with pytest.raises(ValueError, match="generation_idx 0 more than once"):
        summarise([row("a", 0, True), row("a", 0, True)])


def test_rows_round_trip(tmp_path: Path) -> None:
    rows = [
        row(
            "ä",
            0,
            True,
            generation="two\nlines \u2028",
            unit_scores=[0.5, -1.0],
            unit_char_ends=[3, 9],
            score=-0.25,
        ),
        row("b", 1, False, answer=None, extracted=None),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text('{"prompt_id": "a"}\n')
    with pytest.raises(DataError, match="row 1 lacks"):
        read_rows(tmp_path / "rows.jsonl")


def test_every_selector_baseline_and_category_against_values_by_hand() -> None:
    """Units, log-probabilities and answers of two problems; each chooser picks the sample noted behind it."""
    rows = [
        row("a", 0, True, unit_scores=[1.0, 1.0, 1.0, 1.0], policy_logprobs=[-3.0, -1.0]),  # sum
        row("a", 1, False, unit_scores=[0.0, 0.0, 0.0, 3.9], policy_logprobs=[-1.0]),  # last, tail, logprob
        row("a", 2, False, unit_scores=[1.5], policy_logprobs=[-9.0]),  # mean, min, discounted
        row("b", 0, False, unit_scores=[-1.0, 0.1], extracted="7"),  # mean, sum; discounted if by 0.95
        row("b", 1, True, unit_scores=[0.0, -1.0]),  # discounted
        row("b", 2, False, unit_scores=[], extracted="7"),  # no unit: worst
    ]
    rows = [
        dataclasses.replace(r, score=s, metadata={"category": c})
        for r, s, c in zip(rows, [3.0, -2.0, -2.0, 0.0, 0.0, None], ["bio/med"] * 3 + ["a b"] * 3, strict=True)
    ]
    summary = summarise(rows, k=(2,), resamples=20, discount=0.5, tail_share=0.25)
    value = {name: numbers["value"] for name, numbers in summary.items()}
    expected = {"mean": 0.0, "sum": 0.5, "min": 0.25, "last": 0.0, "tail": 0.0, "discounted": 0.5}
    for selector, share in expected.items():
        assert value[f"eval/rerank_{selector}_at_1_of_3"] == pytest.approx(share), selector
    assert value["eval/rerank_min_at_2_of_3"] == pytest.approx(1.0)
    assert value["eval/rerank_tail_at_2_of_3"] == pytest.approx((0 + 1) / 2)
    # a: sigmoid(3) > 2 sigmoid(-2); b: 7 has one vote with a score, as has 2
    assert value["eval/weighted_majority_at_3"] == pytest.approx((1 + 0.5) / 2)
    assert value["eval/logprob_at_1"] == 0.0 and summary["eval/logprob_at_1"]["n"] == 1
    assert value["eval/category_pass_at_1/bio_med"] == pytest.approx(1 / 3)
    assert summary["eval/category_pass_at_1/a b"]["n"] == 1


def test_controlled_auroc_t_and_p_are_those_of_the_strata_and_of_scipy() -> None:
    generator = np.random.default_rng(5)
    rows = []
    for index in range(200):
        tokens = int(generator.integers(1, 200))
        correct, form = bool(generator.random() < 0.7 - tokens / 400), bool(generator.random() < 0.5)
        score = float(form - tokens / 100 + generator.normal() + 0.4 * correct)
        rows.append(row(str(index // 4), index % 4, correct, score=score, tokens=tokens, format_ok=form))
    summary = summarise(rows, resamples=100)
    correct, scores = np.array([r.correct for r in rows]), np.array([r.score for r in rows])

    def pooled(strata: list[int]) -> float:
        won = pairs = 0.0
        for stratum in set(strata):
            inside = np.array(strata) == stratum
            count = int(correct[inside].sum() * (~correct[inside]).sum())
            pairs += count
            won += count * roc_auc_score(correct[inside], scores[inside]) if count else 0.0
        return won / pairs

    order = sorted(r.tokens for r in rows)
    deciles = [sum(r.tokens >= np.quantile(order, q / 10) for q in range(1, 10)) for r in rows]
    assert summary["calibration/auroc_within_length"]["value"] == pytest.approx(pooled(deciles))
    assert summary["calibration/auroc_within_format"]["value"] == pytest.approx(
        pooled([int(r.format_ok) for r in rows])
    )
    t, p = ttest_ind(scores[correct], scores[~correct], equal_var=False)
    numbers = summary["calibration/right_wrong_t"]
    assert numbers["value"] == pytest.approx(t) and numbers["low"] < t < numbers["high"]
    assert summary["calibration/right_wrong_p"] == {"value": pytest.approx(p), "n": 50}


@pytest.mark.parametrize(
    ("category", "legal"),
    [("computer science", "computer science"), ("a/b", "a_b"), ("50%?", "50__"), ("..", "_.."), ("", "_")],
)
def test_a_category_becomes_part_of_a_legal_metric_name(category: str, legal: str) -> None:
    assert legal_category(category) == legal


def test_a_file_of_real_chains_equals_a_count_by_hand(shared_data: Path, tmp_path: Path) -> None:
    """MMLU-Pro, up to ten chains a question with known correctness: pass@1, pass@3, oracle, majority."""
    source = shared_data / "mmlu_pro_sample" / "multi_model_cot.jsonl"
    questions = [json.loads(line) for line in source.open()][::7]
    rows = [
        row(
            str(question["question_id"]),
            index,
            chain["correct"],
            extracted=chain["pred"],
            metadata={"category": question["category"]},
        )
        for question in questions
        for index, chain in enumerate(question["outputs"])
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    summary = summarise(read_rows(tmp_path / "rows.jsonl"), k=(1, 3), resamples=20)

    correct = [[chain["correct"] for chain in question["outputs"]] for question in questions]
    ten = [question for question in questions if len(question["outputs"]) == 10]
    majority = []
    for question in ten:
        votes = Counter(chain["pred"] for chain in question["outputs"] if chain["pred"] is not None)
        elected = [answer for answer, count in votes.items() if count == max(votes.values())]
        majority.append(np.mean([answer == question["answer"] for answer in elected]) if votes else 0.0)
    triples = [np.mean([any(draw) for draw in itertools.combinations(c, 3)]) for c in correct]
    for name, expected, n in (
        ("eval/pass_at_1", np.mean([np.mean(c) for c in correct]), len(questions)),
        ("eval/pass_at_3", np.mean(triples), len(questions)),
        ("eval/majority_at_10", np.mean(majority), len(ten)),
        ("eval/oracle_at_10", np.mean([any(c) for c in correct if len(c) == 10]), len(ten)),
        (
            "eval/category_pass_at_1/computer science",
            np.mean([np.mean(c) for c, q in zip(correct, questions, strict=True) if "comp" in q["category"]]),
            sum(question["category"] == "computer science" for question in questions),
        ),
    ):
        assert summary[name]["value"] == pytest.approx(expected), name
        assert summary[name]["n"] == n > 0, name


def test_the_numbers_alone_give_the_same_summary(tmp_path: Path) -> None:
    rows = [
        EvalRow(
            prompt_id=f"p{n // 4}", question="q" * 50, generation="g" * n, generation_idx=n % 4, answer="1",
            correct=n % 3 == 0, extracted=str(n % 3), format_ok=n % 2 == 0, finish_reason="stop", tokens=n + 1,
            policy_version=None, unit_scores=[0.1 * n, -0.2 * n], unit_char_ends=[1, 2], score=0.1 * n,
            policy_logprobs=[-0.1, -0.01 * n], metadata={"category": "ab"[n // 4 % 2]},
        )
        for n in range(40)
    ]  # fmt: skip
    write_rows(tmp_path / "rows.jsonl", rows)
    slim = read_numbers(tmp_path / "rows.jsonl")
    assert all(row.generation == row.question == "" for row in slim)
    whole, found = summarise(rows, k=(1, 2), resamples=20), summarise(slim, k=(1, 2), resamples=20)
    assert set(found) == set(whole) and len(whole) > 20
    for name, entry in whole.items():
        assert found[name] == pytest.approx(entry, nan_ok=True), name
