"""Perturbed expert traces: always wrong, never a no-op, keyed (docs/method.md 3)."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.algorithms.completion_text import read_source
from rairl_ray.algorithms.equations import Number, evaluate_text, find_equations, find_numbers, write_number
from rairl_ray.algorithms.negatives import Perturbed, _weight, changed_span, perturb
from rairl_ray.algorithms.propagated_error import near_values
from rairl_ray.types import Demonstration, Prompt

ARITHMETIC_KINDS = ["operator", "numbers", "propagated_error", "answer", "swap_answer"]
STEP = re.compile(r"^(-?\d+)([+\-*/])(-?\d+)=(-?\d+)$")


def tagged(think: str, answer: str) -> str:
    return f"<think>\n{think}\n</think>\n<answer>\n{answer}\n</answer>"


def demonstration(completion: str | None, answer: str | None = None, **metadata: object) -> Demonstration:
    prompt = Prompt(id="p1", question="?", answer=answer, metadata=metadata)
    return Demonstration(prompt=prompt, completion=completion)


def one(item: Demonstration, kind: str, *key: object) -> Perturbed | None:
    copies, dropped = perturb(item, count=1, kinds=[kind], key=(0, "p1", *key))
    assert len(copies) + dropped == 1
    return copies[0] if copies else None


@st.composite
def sums(draw: st.DrawFn) -> Demonstration:
    """A running sum as the `arithmetic` task writes it: one step a line."""
    operands = draw(st.lists(st.integers(0, 30), min_size=2, max_size=6))
    operators = [draw(st.sampled_from("+-*")) for _ in operands[1:]]
    total, lines = operands[0], []
    for sign, operand in zip(operators, operands[1:], strict=True):
        result = {"+": total + operand, "-": total - operand, "*": total * operand}[sign]
        if result < 0:
            sign, result = "+", total + operand
        lines.append(f"{total}{sign}{operand}={result}")
        total = result
    return demonstration(tagged("\n".join(lines), str(total)), str(total))


def verdicts(text: str) -> tuple[list[bool], str]:
    """Which steps are true, by an independent reading, and the answer."""
    think = text[text.index("<think>") + 8 : text.index("\n</think>")]
    holds = []
    for line in think.split("\n"):
        match = STEP.match(line)
        assert match, line
        a, sign, b, c = int(match[1]), match[2], int(match[3]), int(match[4])
        value = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b) if b else None}[sign]
        holds.append(value == c)
    return holds, text[text.index("<answer>") + 9 : text.index("\n</answer>")]


@settings(max_examples=200, deadline=None)
@given(sums(), st.sampled_from(ARITHMETIC_KINDS), st.integers(0, 1000))
def test_a_copy_is_wrong_where_it_says_so(item: Demonstration, kind: str, seed: int) -> None:
    copy = one(item, kind, seed)
    if copy is None:
        return
    original = item.completion
    assert original is not None
    assert copy.text != original
    assert copy.text[: copy.edit_char] == original[: copy.edit_char], "nothing changes before the edit"
    assert copy.text[copy.edit_char :] != original[copy.edit_char :]
    assert copy.text[copy.edit_char] != original[copy.edit_char]
    assert copy.edit_char < copy.edit_end <= len(copy.text)
    holds, answer = verdicts(copy.text)
    if kind in ("answer", "swap_answer"):
        assert all(holds)
        assert Fraction(answer) != Fraction(item.prompt.answer or "0")
    else:
        assert not all(holds), "an edited equation that is still true is no negative"
        first_wrong = holds.index(False)
        line = copy.text[: copy.edit_char].count("\n") - 1
        assert line == first_wrong, "the edit is the first error"
    if kind == "operator":
        assert len(copy.text) == len(original)
    if kind == "propagated_error":
        assert holds.count(False) == 1, "every later step is right given the error"
        assert answer == copy.text.split("=")[-1].split("\n")[0], "and the answer is its last result"
        assert answer != item.prompt.answer
    if kind == "answer":
        assert abs(int(answer) - int(item.prompt.answer or "0")) == 1


@given(sums())
@settings(max_examples=60, deadline=None)
def test_every_arithmetic_trace_gives_a_copy_of_some_kind(item: Demonstration) -> None:
    copies, dropped = perturb(item, count=2, kinds=ARITHMETIC_KINDS, key=(1, "p1", 0))
    assert dropped == 0
    assert len({copy.text for copy in copies}) == 2


@pytest.mark.parametrize(("text", "wrong"), [("2+2=4", "2*2=4"), ("3+0=3", "3-0=3"), ("7*1=7", "7/1=7")])
def test_a_flip_that_stays_true_is_never_taken(text: str, wrong: str) -> None:
    item = demonstration(tagged(text, text[-1]), text[-1])
    flips = {copy.text for key in range(60) if (copy := one(item, "operator", key))}
    assert flips
    assert all(wrong not in flip for flip in flips)


def test_a_nudge_that_stays_true_is_never_taken() -> None:
    """7*0=0 is as true as 8*0=0, and 1+4=5 as 0+4=4."""
    item = demonstration(tagged("7*0=0\n0+4=4\n4+5=9\n9+1=10", "10"), "10")
    for key in range(150):
        copy = one(item, "numbers", key)
        assert copy is not None
        holds, _ = verdicts(copy.text)
        before, after = ((text or "").split("\n")[1:5] for text in (item.completion, copy.text))
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        assert changed and not any(holds[i] for i in changed)


def test_a_flip_outside_an_equation_still_changes_the_value() -> None:
    item = demonstration(tagged("the price of 8*1 or 8/1 or 5-0 things", "8"), "8")
    flips = {one(item, "operator", key).text for key in range(60)}  # type: ignore[union-attr]
    for flip in flips:
        assert "8/1 or 8/1" not in flip and "8*1 or 8*1" not in flip and "5+0" not in flip and "/0" not in flip


def test_plain_text_is_perturbed_in_its_own_notation() -> None:
    text = "He sold 48/2 = 24 clips at $1,250.50 each.\nSo 48 + 24 = 72 clips.\n#### 72"
    item = demonstration(text, "72")
    seen = {kind: {c.text for key in range(40) if (c := one(item, kind, key))} for kind in ARITHMETIC_KINDS}
    assert all(seen.values())
    assert seen["answer"] == {text[:-2] + "71", text[:-2] + "73"}
    assert all(t.startswith(text[:-2]) for t in seen["swap_answer"])
    assert any("1,250.5" not in t for t in seen["numbers"])
    for changed in seen["propagated_error"]:
        half, total = re.findall(r"= (\d+) clips", changed)
        assert changed.endswith(f"So 48 + {half} = {total} clips.\n#### {total}")
        assert (half == "24") != (48 + int(half) == int(total)), "exactly one of the two steps is wrong"


def test_a_propagated_error_is_carried_into_prose_and_answer() -> None:
    text = tagged("3 boxes of 4 is 3*4={a}.\nThose {a} and 5 more make {a}+5={b}.", "{b} things")
    item = demonstration(text.format(a=12, b=17), "17")
    wrong = Counter[str]()
    for key in range(40):
        copy = one(item, "propagated_error", key)
        assert copy is not None
        a = int(re.findall(r"4=(\d+)", copy.text)[0])
        b = int(re.findall(r"(\d+) things", copy.text)[0])
        assert copy.text == text.format(a=a, b=b), "every mention follows"
        assert b != 17
        assert (a == 12) != (b == a + 5)
        wrong["first" if a != 12 else "second"] += 1
    assert min(wrong["first"], wrong["second"]) > 5


def test_a_propagated_error_leaves_the_problems_own_number_of_the_same_value_alone() -> None:
    item = demonstration(tagged("4+4=8\n8+8=16", "16"), "16")
    for key in range(30):
        copy = one(item, "propagated_error", key)
        assert copy is not None
        second = copy.text.split("\n")[2]
        assert re.fullmatch(r"\d+\+8=\d+", second), "the second 8 is an operand of the problem"


def test_choice_moves_answer_and_conclusion_to_the_same_distractor() -> None:
    options = {"A": "aspirin", "B": "heparin", "C": "warfarin"}
    think = "The patient needs rapid anticoagulation.\nThat is heparin, so the answer is B."
    item = demonstration(tagged(think, "B"), "B", options=options)
    texts = {one(item, "choice", key).text for key in range(20)}  # type: ignore[union-attr]
    assert len(texts) == 2, "both distractors come up"
    for text in texts:
        letter = text[text.index("<answer>") + 9]
        assert letter in "AC"
        assert f"That is {options[letter]}, so the answer is {letter}." in text
        assert "heparin" not in text


def test_choice_by_option_text_and_from_a_list() -> None:
    item = demonstration(tagged("It is Rome.", "Rome"), "Rome", options=["Paris", "Rome"])
    copy = one(item, "choice")
    assert copy is not None
    assert copy.text == tagged("It is Paris.", "Paris")
    assert one(demonstration(tagged("It is Rome.", "Rome"), "Rome"), "choice") is None


def test_corrupted_chains_of_the_dataset() -> None:
    item = Demonstration(
        prompt=Prompt(id="p1", question="?"), completion="a b c", corrupted=("a  b c", "a x c")
    )
    copies, dropped = perturb(item, count=3, kinds=["corrupted"], key=(0, "p1", 0))
    assert [c.text for c in copies] == ["a x c"], "a copy that only differs in white space is a no-op"
    assert (copies[0].edit_char, copies[0].edit_end) == (2, 3)
    assert dropped == 2


def test_a_numerically_equal_answer_is_not_wrong() -> None:
    item = demonstration(tagged("5.0 and 5.00 and 005 and 1*5", "5"), "5")
    for key in range(20):
        copy = one(item, "swap_answer", key)
        assert copy is not None
        assert verdict(copy.text) == 1
    expression = demonstration(tagged("7 and 9", "3*0"), "0")
    for key in range(20):
        copy = one(expression, "answer", key)
        assert copy is None or evaluate_text(answer_of(copy.text)) != 0


def answer_of(text: str) -> str:
    return text[text.index("<answer>") + 9 : text.index("\n</answer>")]


def verdict(text: str) -> Fraction:
    return Fraction(answer_of(text))


def test_an_answer_that_becomes_the_gold_one_is_not_wrong() -> None:
    item = demonstration(tagged("7 8 9", "8"), "9")  # the expert itself is wrong: nudging it must not heal it
    assert {answer_of(one(item, "answer", key).text) for key in range(20)} == {"7"}  # type: ignore[union-attr]
    assert {answer_of(one(item, "swap_answer", key).text) for key in range(20)} == {"7"}  # type: ignore[union-attr]


def test_nothing_to_perturb_is_dropped_and_counted() -> None:
    assert perturb(demonstration("no numbers here"), count=2, kinds=ARITHMETIC_KINDS, key=(0,)) == ([], 2)
    assert perturb(demonstration(None), count=3, kinds=ARITHMETIC_KINDS, key=(0,)) == ([], 3)
    item = demonstration("no numbers but 7")
    copies, dropped = perturb(item, count=9, kinds=["answer"], key=(0,))
    assert {c.text for c in copies} == {"no numbers but 6", "no numbers but 8"}, "copies never repeat"
    assert dropped == 7


def test_copies_depend_on_the_key_alone() -> None:
    item = demonstration(tagged("3+5=8\n8+2=10\n10+7=17", "17"), "17")
    first = perturb(item, count=3, kinds=ARITHMETIC_KINDS, key=(0, "p1", 4))
    assert first == perturb(item, count=3, kinds=ARITHMETIC_KINDS, key=(0, "p1", 4))
    assert first[0][:2] == perturb(item, count=2, kinds=ARITHMETIC_KINDS, key=(0, "p1", 4))[0]
    others = [perturb(item, count=3, kinds=ARITHMETIC_KINDS, key=k) for k in [(1, "p1", 4), (0, "p1", 5)]]
    assert all(other != first for other in others)


@given(st.text(alphabet="ab1", max_size=12), st.text(alphabet="ab1", max_size=12))
def test_changed_span_holds_every_difference(before: str, after: str) -> None:
    start, end = changed_span(before, after)
    assert before[:start] == after[:start]
    tail = after[end:]
    assert before.endswith(tail) and len(before) - len(tail) >= start
    assert end >= start + 1


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("3+5=8", [True]),
        ("so 16 - 3 - 4 = $9 left", [True]),
        ("(2+3)*4 = 20 and 7/2=3.5", [True, True]),
        ("80,000*1.5=120,000", [True]),
        ("100/3 = 33.33, or 100/3=33.4", [True, False]),
        ("5% = 0.05", [True]),
        ("4 x 3 = 12 = 6×2", [True, True]),
        ("-3 + 5 = 2; 3 - 5 = -2", [True, True]),
        ("- 3 + 4 = 7\n* 2*3 = 6", [True, True]),
        ("it is 12 = 3*4 - as said", [True]),
        ("x = 5, y == 3, 2 >= 1", []),
        ("8/0 = 4", []),
        ("in 2024 3+4=7", [True]),
        ("3+5=9", [False]),
    ],
)
def test_equations(text: str, holds: list[bool]) -> None:
    assert [equation.holds for equation in find_equations(text)] == holds


def test_results_are_nudged_before_operands_and_operands_before_prose() -> None:
    text = "In 9 steps 3+4=7"
    numbers = find_numbers(text, 0, len(text))
    weights = {number.value: _weight(find_equations(text), number) for number in numbers}
    assert weights[7] > weights[3] == weights[4] > weights[9]


@given(st.integers(-(10**6), 10**6), st.integers(0, 3), st.booleans())
def test_numbers_are_read_as_they_are_written(units: int, decimals: int, commas: bool) -> None:
    value = Fraction(units, 10**decimals)
    written = f"{float(value):,.{decimals}f}" if commas else f"{float(value):.{decimals}f}"
    (number,) = find_numbers(f"It is {written} now")
    assert number.value == value
    assert number.decimals == decimals
    assert write_number(value, number) == written.replace("-0", "-0") if value else True


def test_a_nudged_answer_may_become_zero_and_so_may_a_propagated_error() -> None:
    item = demonstration(tagged("3-2=1", "1"), "1")
    for kind in ("answer", "propagated_error"):
        answers = {answer_of(copy.text) for key in range(40) if (copy := one(item, kind, key))}
        assert "0" in answers and "1" not in answers, kind
    nothing = demonstration(tagged("3-3=0", "0"), "0")
    copies = [one(nothing, "answer", key) for key in range(20)]
    assert {answer_of(copy.text) for copy in copies if copy} == {"1"}
    assert any(one(nothing, "propagated_error", key) for key in range(20))


def test_the_number_of_an_answer_in_words_is_nudged_too() -> None:
    copy = one(demonstration(tagged("2+3=5", "5 apples"), "5"), "answer")
    assert copy is not None and answer_of(copy.text) in ("4 apples", "6 apples")


def test_values_near_a_number_are_off_by_its_unit_and_by_ten_units_where_it_is_large() -> None:
    def always(value: str, decimals: int) -> set[Fraction]:
        number = Number(0, 1, Fraction(value), decimals, False)
        draws = [set(near_values(number, random.Random(seed))) for seed in range(60)]
        return {v - number.value for v in set.intersection(*draws)}

    assert always("20", 0) == {1, -1, 2, -2, 10, -10} and always("19", 0) == {1, -1, 2, -2}
    assert always("2.50", 2) == {Fraction(k, 100) for k in (1, -1, 2, -2, 10, -10)}


def test_at_most_three_numbers_are_corrupted() -> None:
    text = " ".join(f"{a}+{a}={2 * a}." for a in range(11, 31))
    item = demonstration(tagged(text, "60"), "60")
    counts = set()
    for key in range(60):
        copy = one(item, "numbers", key)
        assert copy is not None
        pairs = zip(re.findall(r"\d+", item.completion or ""), re.findall(r"\d+", copy.text), strict=True)
        counts.add(sum(old != new for old, new in pairs))
    assert counts == {1, 2, 3}


def test_operators_of_true_equations_are_flipped_before_others() -> None:
    item = demonstration(tagged("Pages 3-4 and 5-6 and 7-8 and 9-10. 6+7=13", "13"), "13")
    for key in range(20):
        copy = one(item, "operator", key)
        assert copy is not None and "6+7=13" not in copy.text


def test_what_is_said_to_be_the_answer_is_it_whatever_number_follows() -> None:
    source = read_source(demonstration("3+4=7\nThe answer is 7.\nI looked 3 times", "7"))
    assert source.answer is not None and source.text[slice(*source.answer)] == "7"
    listed = read_source(demonstration("So A", "A", options=["x", "y", "z"]))
    assert listed.options == {"A": "x", "B": "y", "C": "z"}


def test_no_text_of_any_kind_is_evaluated_as_code() -> None:
    assert evaluate_text("__import__('os').system('true')") is None
    assert evaluate_text("9**9**9**9") is None
    assert evaluate_text("(" * 5000 + "1" + ")" * 5000) is None
    assert evaluate_text("2*(3+4)") == 14


def test_real_experts(shared_data: Path) -> None:
    """GSM8K solutions: enough copies of every kind, none a no-op, most verified by the equations left."""
    found: Counter[str] = Counter()
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:300]
    for index, line in enumerate(lines):
        row = json.loads(line)
        solution, answer = re.sub(r"<<.*?>>", "", row["answer"]).split("####")
        item = demonstration(tagged(solution.strip(), answer.strip()), answer.strip())
        for kind in ARITHMETIC_KINDS:
            copy = one(item, kind, index)
            if copy is None:
                continue
            found[kind] += 1
            assert copy.text.split() != (item.completion or "").split()
            if kind in ("answer", "swap_answer", "propagated_error"):
                both = (answer_of(item.completion or ""), answer_of(copy.text))
                old, new = (find_numbers(answer, skip_enumerators=False) for answer in both)
                assert [n.value for n in old] != [n.value for n in new]
    assert min(found[kind] for kind in ("numbers", "answer", "swap_answer")) >= 295
    assert found["operator"] >= 250
    assert found["propagated_error"] >= 200
