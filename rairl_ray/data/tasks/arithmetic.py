"""Generated sums of several numbers, with every step of the expert written out: the embedded default."""

from __future__ import annotations

import random
from collections.abc import Sequence

from rairl_ray.config.schema import Arithmetic, Data
from rairl_ray.data.completion_format import format_completion
from rairl_ray.data.tasks.base import TaskRules, rules_of
from rairl_ray.data.tasks.generated import GeneratedTask, Problem
from rairl_ray.errors import ConfigError


class ArithmeticGenerator:
    """`3+5*2+7=?` with operands of 1 to `digits` digits, never zero."""

    name = "arithmetic"

    def __init__(self, difficulty: Arithmetic) -> None:
        low, high = difficulty.operands_min, difficulty.operands_max
        if not 2 <= low <= high:
            raise ConfigError(
                f"data.arithmetic: operands_min={low} and operands_max={high}; "
                f"a problem needs at least 2 operands, and the largest number last"
            )
        if not difficulty.operators:
            raise ConfigError("data.arithmetic.operators is empty; give at least one of + - *")
        self._difficulty = difficulty

    def draw(self, random: random.Random) -> Problem:
        count = random.randint(self._difficulty.operands_min, self._difficulty.operands_max)
        operands = [_operand(random, self._difficulty.digits) for _ in range(count)]
        operators = [random.choice(self._difficulty.operators) for _ in range(count - 1)]
        text = str(operands[0]) + "".join(f"{op}{n}" for op, n in zip(operators, operands[1:], strict=True))
        return Problem(f"{text}=?", parts=(operands, operators))

    def expert(self, problem: Problem) -> tuple[str, str]:
        assert isinstance(problem.parts, tuple)
        lines, value = worked_steps(*problem.parts)
        return str(value), format_completion("\n".join(lines), str(value))


def worked_steps(operands: Sequence[int], operators: Sequence[str]) -> tuple[list[str], int]:
    """One line a step, products first, then sums, each from left to right; and the value.

    3+4*5-2 gives 4*5=20, 3+20=23, 23-2=21.
    """
    values, pending = list(operands), list(operators)
    lines = []
    while pending:
        at = pending.index("*") if "*" in pending else 0
        left, right, operator = values[at], values[at + 1], pending.pop(at)
        result = {"+": left + right, "-": left - right, "*": left * right}[operator]
        lines.append(f"{left}{operator}{right}={result}")
        values[at : at + 2] = [result]
    return lines, values[0]


def _operand(random: random.Random, digits: int) -> int:
    length = random.randint(1, digits)
    return random.randint(10 ** (length - 1), 10**length - 1)


def _rules(data: Data) -> TaskRules:
    # Models of this task are small and read characters: a system prompt would fill their window.
    return rules_of(data, "number", system_prompt="")


ARITHMETIC = GeneratedTask(
    name="arithmetic", generator=lambda data: ArithmeticGenerator(data.arithmetic), rules=_rules
)
