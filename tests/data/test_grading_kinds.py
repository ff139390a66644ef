"""Kinds of notation, denial and relation; MATH-500's own golds; math-verify beside our own verdict."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.config.schema import Data
from rairl_ray.data import expression_values, expressions
from rairl_ray.data.choices import chosen_letter, gold_letter, options_in, read_options
from rairl_ray.data.grading import canonical_answer, extract_answer, grade_answer
from rairl_ray.data.math_equality import equal_expressions, equal_mathematics
from rairl_ray.data.notation import plain
from rairl_ray.data.rows import BadRow
from rairl_ray.data.tasks import task_rules
from rairl_ray.types import Prompt
from tests import grading_kinds as kinds

GIVEN_OTHERWISE = {
    54: "1,2345 as 12345: no locale groups digits by four with a comma; a misplaced comma is likelier",
    144: "18!: the exclamation mark of a number is a factorial, as 5! is 120; `18 dollars!` is 18",
}
"""Given cases in which we decide otherwise, and why."""


def right(gold: str, answer: str, grader: str) -> bool:
    return grade_answer(f"<answer>{answer}</answer>", gold, grader).correct


@pytest.mark.parametrize(("gold", "answer"), kinds.NUMBERS_EQUAL)
def test_a_number_in_other_notation_is_equal(gold: str, answer: str) -> None:
    assert right(gold, answer, "number")


@pytest.mark.parametrize(("gold", "answer"), kinds.NUMBERS_OTHER)
def test_what_is_not_said_to_be_the_number_is_not(gold: str, answer: str) -> None:
    assert not right(gold, answer, "number")


@pytest.mark.parametrize(("gold", "answer"), kinds.MATHEMATICS_EQUAL)
def test_mathematics_in_other_notation_is_equal(gold: str, answer: str) -> None:
    assert right(gold, answer, "math")


@pytest.mark.parametrize(("gold", "answer"), kinds.MATHEMATICS_OTHER)
def test_other_mathematics_is_not_equal(gold: str, answer: str) -> None:
    assert not right(gold, answer, "math")


@pytest.mark.parametrize("grader", ["number", "math"])
def test_units_are_compared_where_both_name_one(grader: str) -> None:
    for gold, answers in itertools.product(kinds.MEASURED, repeat=2):
        for written, answer in itertools.product(gold, answers):
            assert right(written, answer, grader) is (gold is answers), (written, answer)


@pytest.mark.parametrize(("gold", "answer"), kinds.UNMEASURED)
def test_a_unit_that_is_not_said_is_not_missed(gold: str, answer: str) -> None:
    assert right(gold, answer, "number") and right(answer, gold, "number")


def test_a_compound_quantity_is_no_number_without_its_unit() -> None:
    assert not right("2.5", "2 hours 30 minutes", "number") and not right("2 hours 30 minutes", "2.5", "math")
    assert not right("150 minutes", "30 minutes 2 hours", "number")
    assert right("1 hour", "60 minutes = 1 hour", "number") and not right(
        "1 hour", "60 seconds = 1 hour", "number"
    )


def test_options_that_differ_in_their_unit_are_told_apart() -> None:
    options = {"A": "15 cm^2", "B": "15 m^2", "C": "15 m"}
    assert [chosen_letter(said, options) for said in ("15 square meters", "15 meters", "15 cm²", "15")] == [
        "B", "C", "A", None,
    ]  # fmt: skip


def test_the_given_cases_but_for_those_with_a_reason(shared_faults: Path) -> None:
    found = set()
    rows = [json.loads(line) for line in (shared_faults / "grading_cases.jsonl").open(encoding="utf-8")]
    for row in rows:
        if row["grader"] == "countdown":
            prompt = Prompt(id="c", question="?", metadata=row["metadata"])
            correct = task_rules(Data(task="countdown")).grader(prompt, row["completion"]).correct
        else:
            correct = grade_answer(row["completion"], row["gold"], row["grader"], row.get("options")).correct
        if correct != row["expected"]:
            found.add(row["id"])
    assert found == set(GIVEN_OTHERWISE) and len(found) <= 0.03 * len(rows)


# --- votes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grader", "answers"),
    [
        ("number", ["50%", "0.5", "1/2", "½", "\\frac12", "x = 0.5", "0.50 liters"]),
        ("number", ["2k", "2000", "two thousand", "2,000 apples left"]),
        ("math", ["50\\%", "0.5", "\\frac{1}{2}", "x=1/2"]),
        ("math", ["\\sqrt{12}", "2\\sqrt3", "2√3"]),
        ("math", ["(x+1)^2", "x^2+2x+1", "1 + 2x + x²"]),
        ("math", ["x+y=5", "5 = y + x", "2x+2y-10=0"]),
        ("math", ["\\{1,2\\}", "2, 1", "x=1 or x=2", "{2, 1}"]),
        ("math", ["[2,3)", "2 \\le x < 3", "x \\in [2, 3)"]),
        ("math", ["\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1.0\\\\4/2\\end{bmatrix}"]),
    ],
)
def test_equal_answers_are_one_vote(grader: str, answers: list[str]) -> None:
    assert len({canonical_answer(answer, grader) for answer in answers}) == 1


@pytest.mark.parametrize(
    "answers",
    [
        ["x^2+y^2=25", "x+y=25", "25", "x^2+y^2"],
        ["5", ".5", "-5", "5x", "5!", "x>5", "(5, 5)", "5, 5", "1:5"],
        ["[0,1]", "(0,1)", "[0,1)", "0, 1", "{0, 2}", "\\begin{pmatrix}0\\\\1\\end{pmatrix}"],
        ["52_8", "52", "42", "52_9"],
    ],
)
def test_other_answers_are_other_votes(answers: list[str]) -> None:
    assert len({canonical_answer(answer, "math") for answer in answers}) == len(answers)


# --- MATH-500 -------------------------------------------------------------------------------------


def rewritings(gold: str) -> Iterator[str]:
    """What models write for the same answer."""
    yield from (
        gold,
        f"${gold}$",
        f"\\boxed{{{gold}}}",
        f"**{gold}**",
        f"The answer is ${gold}$.",
        f"\\({gold}\\)",
    )
    yield gold.replace("\\frac", "\\dfrac").replace("\\left", "").replace("\\right", "").replace(" ", "  ")
    yield gold.replace("\\pi", "π").replace("\\infty", "∞").replace("^\\circ", "°").replace("\\cup", "∪")
    yield re.sub(r"(?<!\d)\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", gold) if gold.count("\\frac") == 1 else gold


def neighbours(gold: str) -> Iterator[str]:
    """Answers next to it that are not it: another digit, another sign, something denied, one more."""
    # what a unit is raised to is not compared: gold 864 inches^2 is 864
    for match in re.finditer(r"(?<!s}\^)(?<!m}\^)\d+", gold):
        yield f"{gold[: match.start()]}{int(match[0]) + 1}{gold[match.end() :]}"
    yield from (f"not {gold}", f"{gold} or {gold}1", f"{gold} + 1", f"{gold}, 77", f"\\sqrt{{{gold}}} + 77", "")


def test_every_gold_of_math500_equals_its_rewritings_and_none_of_its_neighbours(shared_data: Path) -> None:
    lines = (shared_data / "math500" / "test.jsonl").open(encoding="utf-8")
    wrong = []
    for gold in {json.loads(line)["answer"] for line in lines}:
        wrong += [(gold, text) for text in rewritings(gold) if not right(gold, text, "math")]
        wrong += [(gold, text) for text in neighbours(gold) if right(gold, text, "math")]
    assert wrong == []


def test_math_verify_agrees_on_whole_expressions(shared_data: Path) -> None:
    """On pairs of MATH-500's golds that are whole expressions: there its parse covers the text."""
    math_verify = pytest.importorskip("math_verify")
    lines = (shared_data / "math500" / "test.jsonl").open(encoding="utf-8")
    golds = sorted({json.loads(line)["answer"] for line in lines})
    whole = [gold for gold in golds if expressions.parse(plain(gold)) is not None][:120]
    pairs = [(a, b) for a, b in zip(whole, [*whole[1:], whole[0]], strict=True)]
    pairs += [(gold, gold.replace("\\frac", "\\dfrac")) for gold in whole]
    differ = []
    for gold, answer in pairs:
        parsed = [math_verify.parse(f"${text}$", parsing_timeout=None) for text in (gold, answer)]
        if math_verify.verify(*parsed, timeout_seconds=None) != equal_mathematics(gold, answer):
            differ.append((gold, answer))
    assert differ == []


# --- expressions ----------------------------------------------------------------------------------


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 50), st.integers(1, 9))
@settings(deadline=None)
def test_constants_are_exact(a: int, b: int, c: int, d: int) -> None:
    node = expressions.parse(plain(f"\\frac{{{a}}}{{{c}}} - ({b}) \\cdot {d}^{{2}} / {c}"))
    assert node is not None and expression_values.rational(node) == Fraction(a, c) - Fraction(b * d * d, c)


@given(st.lists(st.integers(-5, 5), min_size=2, max_size=4), st.integers(-5, 5))
@settings(deadline=None)
def test_a_product_of_factors_equals_its_expansion_alone(roots: list[int], other: int) -> None:
    product = "".join(f"(x - ({root}))" for root in roots)
    coefficients = [1]
    for root in roots:
        shifted, scaled = [*coefficients, 0], [0, *(root * value for value in coefficients)]
        coefficients = [value - lower for value, lower in zip(shifted, scaled, strict=True)]
    terms = [f"({value})x^{{{len(roots) - place}}}" for place, value in enumerate(coefficients)]
    assert equal_expressions(" + ".join(terms), product)
    assert canonical_answer(" + ".join(terms), "math") == canonical_answer(product, "math")
    assert equal_expressions(f"{product} + {other}", product) == (other == 0)


def test_values_are_the_same_in_many_threads() -> None:
    pairs = [("\\sqrt{12}", "2\\sqrt{3}"), ("\\sin^2 x + \\cos^2 x", "1"), ("\\ln 8", "3\\ln 2")] * 30
    expressions.parse.cache_clear()
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.extend(equal_expressions(a, b) for a, b in pairs))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * (4 * len(pairs))


# --- choices --------------------------------------------------------------------------------------

OPTIONS = {"A": "Aspirin", "B": "Ibuprofen", "C": "Acetaminophen", "D": "None of the above"}
NAMES_B = [
    "B", "(B)", "b", "b)", "[B]", "B) Ibuprofen", "B - Ibuprofen", "Ibuprofen (B)", "ibuprofen.",
    "The correct answer is: B", "Answer: (B) Ibuprofen", "Final answer: **B**", "\\boxed{\\text{(B)}}",
    "I would choose B", "option b", "Option B is correct", "It must be B", "B because it is an NSAID",
    "B. It inhibits COX.", "Ibuprofen is the best choice", "b) ibuprofen",
]  # fmt: skip
NAMES_NONE = [
    "not B", "B is wrong", "Not Ibuprofen", "anything but B", "not A, not B", "A or B", "A, B", "A B",
    "A/B", "B?", "neither", "I don't think it's B", "It isn't B", "All except B", "B) Aspirin",
    "Ibuprofen or Aspirin", "Aspirin, not Ibuprofen", "Ibuprofen is contraindicated", "B is unlikely",
    "A is wrong, so B", "B (not A)", "Avoid ibuprofen", "The answer is not B", "B cannot be right",
    "B - no",
]  # fmt: skip


@pytest.mark.parametrize("text", NAMES_B)
def test_an_option_is_named(text: str) -> None:
    assert chosen_letter(text, OPTIONS) == "B"


@pytest.mark.parametrize("text", NAMES_NONE)
def test_an_option_that_is_denied_or_one_of_several_is_not_named(text: str) -> None:
    assert chosen_letter(text, OPTIONS) is None


def test_options_are_named_by_their_value() -> None:
    options = {"A": "12", "B": "1/2", "C": "25%", "D": "-3", "E": "3 cm"}
    named = {"12.0": "A", "0.5": "B", "\\frac12": "B", "0.25": "C", "25": "C", "-3": "D", "3": "E", "$12": "A"}
    assert {text: chosen_letter(text, options) for text in named} == named
    assert [chosen_letter(text, options) for text in (".12", "1.2", "-12", "4")] == [None] * 4


@pytest.mark.parametrize(
    ("value", "options"),
    [
        (["A)125", "B)150"], {"A": "125", "B": "150"}),
        (["(A) x", "(B) y"], {"A": "x", "B": "y"}),
        (["A) x", "y"], {"A": "A) x", "B": "y"}),
        ([{"label": "A", "text": "x"}, {"label": "B", "text": "y"}], {"A": "x", "B": "y"}),
        ({"text": ["x", "y"], "label": ["A", "B"]}, {"A": "x", "B": "y"}),
        ([1, 2.0, 3.5], {"A": "1", "B": "2", "C": "3.5"}),
        (["x", None, "z"], {"A": "x", "C": "z"}),
        ([float("nan"), "y"], {"B": "y"}),
        ({"a": "x", "b": None}, {"A": "x"}),
    ],
)
def test_options_of_every_shape(value: object, options: dict[str, str]) -> None:
    assert read_options(value) == options


@pytest.mark.parametrize(
    "row",
    [
        {"options": ["x", "y"]},
        {"choices": {"text": ["x", "y"], "label": ["A", "B"]}},
        {"A": "x", "B": "y"},
        {"opa": "x", "opb": "y", "opc": None},
        {"option_a": "x", "option_b": "y"},
    ],
)
def test_options_lie_in_one_column_or_in_one_each(row: dict[str, object]) -> None:
    assert options_in({"question": "?", **row}) == {"A": "x", "B": "y"}
    assert options_in({"question": "?", "a": "x"}) is None


def test_a_place_counts_null_options_and_is_never_taken_for_a_text() -> None:
    assert gold_letter(2, read_options(["x", None, "z"]) or {}) == "C"
    assert gold_letter(2.0, {"A": "red", "B": "green", "C": "blue"}) == "C"
    with pytest.raises(BadRow, match="is the place of option C and names option B"):
        gold_letter(2, {"A": "1", "B": "2", "C": "3"})


# --- marks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### Step 1: add\n9+9\n#### 18", "18"),
        ("#### 17\n#### 18", None),
        ("#### Plan\nthink", None),
        ("\\boxed{\\boxed{18}}", "18"),
        ("<answer>.5</answer><answer>5</answer>", None),
        ("<answer>0.5</answer><answer>1/2</answer>", "1/2"),
    ],
)
def test_marks_and_headings(text: str, answer: str | None) -> None:
    assert extract_answer(text) == answer
