"""The one truth about answers: reward, evaluation, reranking and reports all grade through `grade_answer`.

Where the answer is (strict, `extract_answer`): the content of the `<answer>` section; a completion without
any `<answer>` tag may mark its answer with `\\boxed{...}` or a last line `#### ...` instead. A number that
merely stands last in the text is no answer. A section that is never closed is no answer, and several marked
answers must agree: a hedge is never graded by its luckier half.

How it is compared (lenient in notation, `notation`): an answer is right where ALL of it is understood and
equal. See `quantities` for numbers, `choices` for options, `math_equality` for mathematics. Model text is
never evaluated as code, every value is bounded before it is computed, and the cost is linear in the text's
length."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from rairl_ray.config.schema import Data
from rairl_ray.config.variants import complete
from rairl_ray.data.choices import Options, chosen_letter, letter_of
from rairl_ray.data.completion_format import ANSWER_OPEN, answer_sections, is_well_formed
from rairl_ray.data.math_equality import canonical_mathematics, equal_mathematics
from rairl_ray.data.notation import plain
from rairl_ray.data.quantities import canonical, equal_quantities, parse_quantity

MAX_ANSWER_LENGTH = 2000
"""A longer answer section is no answer."""

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"[{}]")
_HASHES = re.compile(r"^[ \t]*####[ \t]*(\S[^\n]*)$", re.MULTILINE)
_DELIMITERS = (("\\(", "\\)"), ("\\[", "\\]"), ("$$", "$$"), ("$", "$"))


class Grade(NamedTuple):
    """The verdict on one completion."""

    correct: bool
    answer: str | None
    """The extracted answer in canonical notation (equal numbers are equal strings), None without one."""
    format_ok: bool
    """Whether the completion has the canonical format (docs/method.md 5); `correct` does not need it."""


def extract_answer(text: str) -> str | None:
    """The one marked answer of a completion, or None (no mark, unclosed, empty, or several that differ)."""
    found = answer_sections(text) if ANSWER_OPEN in text else _boxed(text) or _hashed(text)
    if not found:
        return None
    answers = [_unwrapped(answer) for answer in found]
    if any(len(answer) > MAX_ANSWER_LENGTH for answer in answers):
        return None
    last = answers[-1]
    return last if last and all(_agree(answer, last) for answer in set(answers)) else None


def grade_answer(text: str, gold: str | None, grader: str, options: Options | None = None) -> Grade:
    """Grades a completion; `grader` is number | math | text | choice (config `data.grader`).

    Without a gold answer nothing is correct, but the answer is still extracted.
    """
    answer = extract_answer(text)
    format_ok = is_well_formed(text)
    if answer is None:
        return Grade(False, None, format_ok)
    if grader == "choice":
        letter = chosen_letter(answer, options or {})
        gold_letter = None if gold is None else letter_of(gold, options or {})
        return Grade(letter is not None and letter == gold_letter, letter, format_ok)
    correct = gold is not None and _EQUAL[grader](gold.strip(), answer)
    return Grade(correct, canonical_answer(answer, grader), format_ok)


def canonical_answer(answer: str, grader: str) -> str:
    """Equal answers as equal strings where notation is all that differs: what a majority vote counts."""
    if grader == "text":
        return _normal(answer)
    quantity = parse_quantity(answer) if grader == "number" else None
    return canonical_mathematics(answer) if quantity is None else canonical(quantity)


def equal_numbers(gold: str, answer: str) -> bool:
    """One number against one number, units and notation aside; as mathematics where gold is no number."""
    gold_quantity = parse_quantity(gold)
    if gold_quantity is None:
        return equal_mathematics(gold, answer)
    quantity = parse_quantity(answer)
    return quantity is not None and equal_quantities(gold_quantity, quantity)


def equal_texts(gold: str, answer: str) -> bool:
    """Equal apart from case, spacing, quotes and a final stop."""
    return _normal(gold) == _normal(answer)


_EQUAL: dict[str, Callable[[str, str], bool]] = {
    "number": equal_numbers,
    "math": equal_mathematics,
    "text": equal_texts,
}
complete(f"{__name__}._EQUAL", {**_EQUAL, "choice": letter_of}, Data, "grader")


def _agree(first: str, second: str) -> bool:
    return _normal(first) == _normal(second) or equal_mathematics(first, second) or equal_numbers(first, second)


def _boxed(text: str) -> list[str]:
    """Contents of all complete `\\boxed{...}`, braces balanced; nested ones belong to their outermost."""
    found: list[str] = []
    end = 0
    for match in _BOXED.finditer(text):
        if match.start() < end:
            continue
        depth, end = 1, len(text)
        for brace in _BRACE.finditer(text, match.end()):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                end = brace.end()
                found.append(text[match.end() : brace.start()].strip())
                break
    return found


def _hashed(text: str) -> list[str]:
    """Lines `#### answer`; one that says no number is a heading, unless it ends the text."""
    lines = [match.strip() for match in _HASHES.findall(text)]
    if not lines:
        return []
    numbers = {line: parse_quantity(line) is not None for line in set(lines)}
    ends = text.rstrip().endswith(lines[-1])
    return [line for index, line in enumerate(lines) if numbers[line] or (ends and index == len(lines) - 1)]


def _unwrapped(answer: str) -> str:
    """The answer without a box or delimiters of mathematics around all of it."""
    answer = answer.strip()
    if len(answer) > MAX_ANSWER_LENGTH:
        return answer
    before = None
    while before != answer:
        before = answer
        box = _BOXED.match(answer)
        if (
            box
            and answer.endswith("}")
            and len(boxes := _boxed(answer)) == 1
            and len(boxes[0]) >= len(answer) - box.end() - 3
        ):
            answer = boxes[0]
        for opening, closing in _DELIMITERS:
            inner = answer[len(opening) : -len(closing)]
            if answer.startswith(opening) and answer.endswith(closing) and inner and closing not in inner:
                answer = inner.strip()
    return answer


def _normal(text: str) -> str:
    text = " ".join(text.casefold().split()).strip(" \"'`*")
    return plain(text.removesuffix(".").rstrip()) if len(text) < MAX_ANSWER_LENGTH else text
