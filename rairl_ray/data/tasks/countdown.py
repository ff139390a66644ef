"""Countdown: reach a target from given numbers with + - * and /. Answers are expressions, parsed, never run."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from fractions import Fraction
from typing import NamedTuple

from rairl_ray.config.schema import Countdown, Data
from rairl_ray.data.completion_format import REASONING_SYSTEM_PROMPT, format_completion, is_well_formed
from rairl_ray.data.grading import Grade, extract_answer
from rairl_ray.data.notation import plain, without_label
from rairl_ray.data.tasks.base import TaskRules
from rairl_ray.data.tasks.generated import GeneratedTask, Problem
from rairl_ray.errors import ConfigError
from rairl_ray.types import Prompt

SYSTEM_PROMPT = (
    f"{REASONING_SYSTEM_PROMPT}\nCombine the given numbers with + - * / and parentheses so that they make the "
    "target. Use each number at most once. The final result is the expression alone, such as (1+2)*3."
)
LARGEST_TARGET = 1_000
SEARCH_NODES = 20_000
MAX_EXPRESSION_LENGTH = 200
_EXPRESSION = re.compile(r"[0-9+\-*/() ]+")
_SIGNS = str.maketrans({"[": "(", "]": ")", "{": "(", "}": ")"})


class Term(NamedTuple):
    value: int
    text: str
    """Its expression, in parentheses unless it is a plain number."""


class Solution(NamedTuple):
    expression: str
    steps: tuple[str, ...]


class CountdownGenerator:
    """Numbers from 1 to `largest` and a target that they reach."""

    name = "countdown"

    def __init__(self, difficulty: Countdown) -> None:
        self._difficulty = difficulty

    def draw(self, random: random.Random) -> Problem:
        for _ in range(1_000):
            numbers = [random.randint(1, self._difficulty.largest) for _ in range(self._difficulty.numbers)]
            target, solution = _combined_at_random(numbers, random)
            if target <= LARGEST_TARGET and target not in numbers:
                question = f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."
                return Problem(question, {"numbers": numbers, "target": target}, solution)
        raise ConfigError(
            f"data.countdown.largest={self._difficulty.largest}: hardly any target to reach; raise it"
        )

    def expert(self, problem: Problem) -> tuple[str, str]:
        numbers, target = problem.metadata["numbers"], problem.metadata["target"]
        assert isinstance(numbers, list) and isinstance(target, int) and isinstance(problem.parts, Solution)
        # The search finds solutions without idle steps; with many numbers it may run out of nodes, and then
        # the way in which the target was made is a solution too.
        solution = solve(numbers, target) or problem.parts
        return solution.expression, format_completion("\n".join(solution.steps), solution.expression)


def solve(numbers: list[int], target: int, nodes: int = SEARCH_NODES) -> Solution | None:
    """Depth-first search over positive whole intermediate results; None where there is none within `nodes`."""
    left = nodes

    def search(terms: list[Term], steps: tuple[str, ...]) -> Solution | None:
        nonlocal left
        for i in range(len(terms)):
            for j in range(i + 1, len(terms)):
                rest = [term for k, term in enumerate(terms) if k not in (i, j)]
                for term, step in _combinations(terms[i], terms[j]):
                    left -= 1
                    if left < 0:
                        return None
                    if term.value == target:
                        return Solution(term.text[1:-1], (*steps, step))
                    found = search([*rest, term], (*steps, step)) if rest else None
                    if found:
                        return found
        return None

    return search([Term(n, str(n)) for n in numbers], ())


def _combinations(a: Term, b: Term) -> list[tuple[Term, str]]:
    """Every useful operation on two terms, the larger first: no negative, fractional or idle result."""
    high, low = (a, b) if a.value >= b.value else (b, a)
    results = [("+", high.value + low.value)]
    if high.value > low.value:
        results.append(("-", high.value - low.value))
    if low.value > 1:
        results.append(("*", high.value * low.value))
        if high.value % low.value == 0:
            results.append(("/", high.value // low.value))
    return [
        (Term(value, f"({high.text}{op}{low.text})"), f"{high.value}{op}{low.value}={value}")
        for op, value in results
    ]


def _combined_at_random(numbers: list[int], random: random.Random) -> tuple[int, Solution]:
    terms, steps = [Term(n, str(n)) for n in numbers], []
    while len(terms) > 1:
        a, b = (terms.pop(random.randrange(len(terms))) for _ in range(2))
        term, step = random.choice(_combinations(a, b))
        terms.append(term)
        steps.append(step)
    return terms[0].value, Solution(terms[0].text[1:-1], tuple(steps))


def expression_value(text: str) -> tuple[Fraction, Counter[int]] | None:
    """Exact value of an expression and the numbers it uses, or None if it is anything but whole numbers,
    + - * / and parentheses, is longer than 200 characters, or divides by zero."""
    if len(text) > MAX_EXPRESSION_LENGTH or not _EXPRESSION.fullmatch(text):
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        used: Counter[int] = Counter()
        return _value(tree, used), used
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    """Walks a parsed tree; every kind of node that is not named here raises ValueError."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError(f"not allowed in an expression: {type(node).__name__}")


def _in_signs(answer: str) -> str:
    """Plain notation with + - * / and parentheses alone; models write \\times, \\div, 5 x 2 and \\frac too."""
    answer = re.sub(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])", "*", plain(answer)).replace("\\div", "/")
    answer = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", answer)
    return without_label(answer).translate(_SIGNS)


def grade(prompt: Prompt, text: str) -> Grade:
    """Right if the expression makes the target with the given numbers, each as often as given at most.

    A trailing `= target` is allowed.
    """
    answer = extract_answer(text)
    format_ok = is_well_formed(text)
    if answer is None:
        return Grade(False, None, format_ok)
    expression, _, claimed = _in_signs(answer).partition("=")
    if expression.strip() == str(prompt.metadata["target"]) and claimed:
        expression, claimed = claimed, expression
    found = expression_value(expression)
    if found is None:
        return Grade(False, answer, format_ok)
    value, used = found
    numbers, target = prompt.metadata["numbers"], prompt.metadata["target"]
    assert isinstance(numbers, list)
    within = used <= Counter(numbers)
    claims_target = not claimed.strip() or claimed.strip() == str(target)
    return Grade(value == target and within and claims_target, "".join(expression.split()), format_ok)


def _rules(data: Data) -> TaskRules:
    return TaskRules(
        system_prompt=SYSTEM_PROMPT if data.system_prompt is None else data.system_prompt, grader=grade
    )


COUNTDOWN = GeneratedTask(
    name="countdown", generator=lambda data: CountdownGenerator(data.countdown), rules=_rules
)
