"""What a perturbation needs to know of a completion: where its reasoning and its answer are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from rairl_ray.algorithms.equations import Equation, evaluate_text, find_equations, find_numbers
from rairl_ray.types import Demonstration

Span = tuple[int, int]

_ANSWER_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)
_THINK_TAG = re.compile(r"<think>\s*(.*?)\s*</think>", re.DOTALL)
_PLAIN_ANSWER = re.compile(
    r"####[ \t]*(?P<hash>\S[^\n]*)|\\boxed\{(?P<boxed>[^{}]*)\}"
    r"|answer(?:\s+is:?|:)[ \t]+(?P<said>\S[^\n]*?)\.?[ \t]*(?=\n|$)",
    re.IGNORECASE,
)


class Edit(NamedTuple):
    """Replace text[start:end] by `new`."""

    start: int
    end: int
    new: str


@dataclass(frozen=True)
class Source:
    """An expert's completion, taken apart."""

    text: str
    reasoning: Span
    answer: Span | None
    """Span of the final answer's content; None where none can be told."""
    gold: str | None
    options: dict[str, str]
    """Letter -> text, for multiple choice."""
    corrupted: tuple[str, ...]

    @cached_property
    def equations(self) -> list[Equation]:
        start, end = self.reasoning
        return [e for e in find_equations(self.text) if start <= e.start and e.end <= end]

    @cached_property
    def gold_value(self) -> Fraction | None:
        """The gold answer as a number, where it is one."""
        if self.gold is None:
            return None
        numbers = find_numbers(self.gold, skip_enumerators=False)
        value = evaluate_text(self.gold.replace("#", " "))
        return numbers[-1].value if value is None and numbers else value


def read_source(demonstration: Demonstration) -> Source:
    """Tagged completions (docs/method.md 5) and plain ones: "#### n", a boxed answer, "the answer is n", else
    the last number of the text."""
    text = demonstration.completion or ""
    answer, end = _answer_span(text)
    think = _THINK_TAG.search(text, 0, end)
    return Source(
        text=text,
        reasoning=think.span(1) if think else (0, end),
        answer=answer,
        gold=demonstration.prompt.answer,
        options=_options(demonstration.prompt.metadata.get("options")),
        corrupted=demonstration.corrupted,
    )


def apply_edits(text: str, edits: Sequence[Edit]) -> tuple[str, list[Span]]:
    """The edited text, and where each replacement stands in it. Edits must be in order and apart."""
    parts: list[str] = []
    spans: list[Span] = []
    done = length = 0
    for edit in edits:
        parts += [text[done : edit.start], edit.new]
        length += edit.start - done
        spans.append((length, length + len(edit.new)))
        length += len(edit.new)
        done = edit.end
    return "".join([*parts, text[done:]]), spans


def _answer_span(text: str) -> tuple[Span | None, int]:
    """The answer's span, and where the reasoning ends."""
    tagged = list(_ANSWER_TAG.finditer(text))
    if tagged:
        return tagged[-1].span(1), tagged[-1].start()
    said = list(_PLAIN_ANSWER.finditer(text))
    if said and said[-1].lastgroup is not None:
        return said[-1].span(said[-1].lastgroup), said[-1].start()
    numbers = find_numbers(text)  # the last number may be the result of the last step, so all is reasoning
    return ((numbers[-1].start, numbers[-1].end) if numbers else None), len(text)


def _options(value: object) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {str(letter).strip().upper(): str(option) for letter, option in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {chr(ord("A") + index): str(option) for index, option in enumerate(value[:26])}
    return {}
