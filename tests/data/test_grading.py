"""Grading: extraction, notation, hedges, hostile text (docs/method.md 8, defects 15 and 17)."""

from __future__ import annotations

import json
import threading
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rairl_ray.data.choices import chosen_letter
from rairl_ray.data.completion_format import format_completion, is_well_formed
from rairl_ray.data.grading import extract_answer, grade_answer
from rairl_ray.data.math_equality import equal_expressions
from rairl_ray.data.quantities import parse_quantity


def correct(answer: str, gold: str, grader: str = "number") -> bool:
    return grade_answer(format_completion("x", answer), gold, grader).correct


# --- where the answer is ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\n7\n</think>\n<answer>\n18\n</answer>", "18"),
        ("<answer>18</answer> and more text 20", "18"),
        ("<answer>18</answer><answer>18.0</answer>", "18.0"),
        ("<answer>17</answer> no: <answer>18</answer>", None),  # several that disagree
        ("<answer>18", None),  # unclosed
        ("<answer>18</answer> wait <answer>", None),
        ("<answer><answer>18</answer>", None),
        ("<answer>  \n</answer>", None),
        ("so it is 18", None),  # a number that merely stands last
        ("so it is \\boxed{18}.", "18"),
        ("\\boxed{\\frac{1}{2}} of it", "\\frac{1}{2}"),
        ("\\boxed{17} or \\boxed{18}", None),
        ("\\boxed{18", None),
        ("steps\n#### 18", "18"),
        ("<answer>\n</answer>\n#### 18", None),  # the tag is there, so the other marks do not count
        ("<answer>\\boxed{18}</answer>", "18"),
        ("<answer>$18$</answer>", "18"),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (format_completion("a", "1"), True),
        (format_completion("", "1"), True),
        ("<think>a</think> <answer>1</answer>\n", True),
        ("so <think>a</think><answer>1</answer>", False),
        ("<think>a</think><answer>1</answer> bye", False),
        ("<think>a</think> hm <answer>1</answer>", False),
        ("<answer>1</answer><think>a</think>", False),
        ("<think>a</think><answer>1</answer><answer>1</answer>", False),
        ("<think>a</think><answer> </answer>", False),
        ("<think>a<answer>1</answer>", False),
    ],
)
def test_format(text: str, ok: bool) -> None:
    assert is_well_formed(text) is ok


# --- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "18.0"), ("18", "$18"), ("18", "18 dollars"), ("18", "\\$18.00"), ("18", "x = 18"),
        ("18", "**18**"), ("18", "18."), ("18", "+18"), ("18", "36/2"), ("18", "\\frac{36}{2}"),
        ("18", "9+9=18"), ("18", "18 km/h"), ("18", "\\text{18 apples}"), ("18", "The answer is 18"),
        ("1234567", "1,234,567"), ("1,234", "1234"), ("10000", "10{,}000"), ("10000", "10,\\!000"),
        ("-5", "−5"), ("-5", "-$5"), ("-5", "$-5"), ("-5", "minus 5"), ("-5", "(-5)"), ("-5", "- 5"),
        ("0.5", ".5"), ("0.5", "1/2"), ("0.5", "50%"), ("50", "50%"), ("50", "50 percent"), ("50%", "0.5"),
        ("3.5", "3 1/2"), ("-3.5", "-3 1/2"), ("2000000", "2 million"), ("24", "2 dozen"), ("1/3", "0.3333333"),
        ("5000", "5e3"), ("18", "18\u00a0dollars"),
    ],
)  # fmt: skip
def test_the_same_number_in_other_notation_is_right(gold: str, answer: str) -> None:
    assert correct(answer, gold)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("18", "19"), ("18", "18 or 20"), ("18", "20 or 18"), ("18", "17-18"), ("18", "-18"), ("18", "18.5"),
        ("18", "181"), ("18", "not 18"), ("18", "1 8"), ("18", "1,8"), ("18", "18 apples and 3 pears"),
        ("9", "9:30"), ("18", "18^2"), ("18", "18%%2 + 1"), ("18", "√18"), ("18", "sqrt(18)"), ("18", "36/0"),
        ("1234", "1,23,4"), ("2", "2 million"), ("2", "half of 2"), ("123", "1, 2, 3"), ("34", "3*4"),
        ("34", "3 4"), ("234", "2**34"), ("0.5", "5%"), ("10000001", "10000000"), ("3", "3/4"), ("5", "x-5"),
        ("5", "5 and a half"), ("1", "1e400"), ("18", "one or eighteen"), ("18", "1.8.0"),
    ],
)  # fmt: skip
def test_another_number_or_a_hedge_is_wrong(gold: str, answer: str) -> None:
    assert not correct(answer, gold)


@given(
    st.integers(-(10**12), 10**12),
    st.sampled_from(["{}", "{:,}", "{}.00", "${:,}", "{} cats", "\\boxed{{{}}}"]),
)
def test_every_integer_survives_its_notations(value: int, notation: str) -> None:
    assert correct(notation.format(value), str(value))
    assert not correct(notation.format(value + 1), str(value))


@given(st.fractions(max_denominator=10**6), st.fractions(max_denominator=10**6))
def test_fractions_are_read_exactly(a: Fraction, b: Fraction) -> None:
    read = parse_quantity(f"{a.numerator}/{a.denominator}")
    assert read is not None and read.value == a
    far_apart = abs(a - b) > Fraction(1, 10**5) * max(abs(a), abs(b), 1)
    assert not (far_apart and correct(str(b), str(a)) and b * 100 != a and a * 100 != b)


@given(st.text(max_size=120))
def test_no_text_crashes_a_grader(text: str) -> None:
    for grader in ("number", "text"):
        grade_answer(text, "18", grader)
        grade_answer(f"<answer>{text}</answer>", "18", grader)
    grade_answer(f"<answer>{text}</answer>", "A", "choice", {"A": "yes", "B": "no"})


def test_canonical_answers_make_equal_votes() -> None:
    votes = {
        grade_answer(format_completion("x", a), "1", "number").answer for a in ("18", "18.0", "$18", "18 cats")
    }
    assert votes == {"18"}


def test_no_gold_answer_is_never_correct_but_extracted() -> None:
    assert grade_answer(format_completion("x", "18"), None, "number") == (False, "18", True)


# --- LaTeX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        ("\\frac{\\pi}{2}", "\\pi/2", True),
        ("\\sqrt{12}", "2\\sqrt{3}", True),
        ("\\sqrt{12}", "2*sqrt(3)", True),
        ("x^2-1", "(x-1)(x+1)", True),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\frac{\\pi}{2})", True),
        ("90^\\circ", "90", True),
        ("2", "2x", False),
        ("5", "5, 7", False),
        ("5", "5 or 7", False),
        ("(1,2)", "(2,1)", False),
        ("[0,1)", "[0,1]", False),
        ("\\pi", "\\pi or e", False),
    ],
)
def test_latex(gold: str, answer: str, equal: bool) -> None:
    assert correct(answer, gold, "math") is equal


def test_an_expression_too_large_to_compute_is_refused_at_once_in_any_thread() -> None:
    results: list[object] = []

    def work() -> None:
        start = time.monotonic()
        results.append(equal_expressions("y", "9^{9^{9^{9}}}"))
        results.append(time.monotonic() - start < 60)
        results.append(equal_expressions("\\frac{\\pi}{2}", "0.5\\pi"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=240)
    assert results == [False, True, True]


# --- choices ---------------------------------------------------------------------------------------

OPTIONS = {"A": "Hepatitis", "B": "Hepatitis B", "C": "A fever", "D": "-5", "E": "5"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B) Hepatitis B", "B"), ("B: Hepatitis B.", "B"),
        ("The answer is (B)", "B"), ("Option C", "C"), ("hepatitis b", "B"), ("Hepatitis", "A"),
        ("a fever", "C"), ("It is hepatitis B.", "B"), ("-5", "D"), ("5", "E"),
        ("A or B", None), ("B and C", None), ("(A), (B)", None), ("B) a fever", None), ("", None), ("Z", None),
        ("none of them", None), ("Hepatitis and a fever", None),
    ],
)  # fmt: skip
def test_choice_by_letter_or_text_refuses_several(text: str, letter: str | None) -> None:
    assert chosen_letter(text, OPTIONS) == letter


def test_choice_gold_may_be_letter_or_text() -> None:
    completion = format_completion("x", "Hepatitis B")
    assert grade_answer(completion, "B", "choice", OPTIONS).correct
    assert grade_answer(completion, "Hepatitis B", "choice", OPTIONS).correct
    assert not grade_answer(completion, "A", "choice", OPTIONS).correct


# --- size and speed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" + "9" * 1_000_000 + "</answer>",
        "<answer>" * 125_000,
        "<answer>1</answer>" * 60_000,
        "\\boxed{" * 150_000,
        "<answer>" + "(" * 1_000_000 + "</answer>",
        "#### 1\n" * 150_000,
        "<answer>" + " " * 1_000_000 + "18</answer>",
        "<answer>" + "1," * 500_000 + "</answer>",
        "<answer>" + "\\frac{1}{2}" * 100_000 + "</answer>",
    ],
    ids=lambda text: text[:12],
)
def test_a_megabyte_neither_crashes_nor_stalls(text: str) -> None:
    start = time.process_time()
    for grader in ("number", "math", "text", "choice"):
        grade_answer(text, "18", grader, {"A": "18", "B": "19"})
    assert time.process_time() - start < 5


def test_ten_thousand_numeric_answers_take_less_than_three_seconds() -> None:
    completions = [format_completion("3+5=8", f"{i:,}.0") for i in range(10_000)]
    start = time.process_time()
    assert all(grade_answer(text, str(i), "number").correct for i, text in enumerate(completions))
    assert time.process_time() - start < 3


# --- real data -------------------------------------------------------------------------------------


def test_every_math500_solution_earns_its_own_answer(shared_data) -> None:
    rows = [json.loads(line) for line in (shared_data / "math500" / "test.jsonl").open(encoding="utf-8")]
    assert [r["answer"] for r in rows if not grade_answer(r["solution"], r["answer"], "math").correct] == []


def test_every_gsm8k_solution_earns_its_own_answer_and_no_other(shared_data) -> None:
    for line in (shared_data / "gsm8k" / "test.jsonl").open(encoding="utf-8"):
        solution = json.loads(line)["answer"]
        gold = solution.rpartition("####")[2].strip()
        assert grade_answer(solution, gold, "number").correct
        wrong = str(int(gold.replace(",", "")) + 1)
        assert not grade_answer(solution, wrong, "number").correct
