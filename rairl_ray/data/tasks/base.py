"""What a task is: problems with experts, and the one function that grades them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from rairl_ray.config.schema import Data
from rairl_ray.data.completion_format import REASONING_SYSTEM_PROMPT
from rairl_ray.data.grading import Grade, grade_answer
from rairl_ray.types import Demonstration, Prompt

CHOICE_SYSTEM_PROMPT = (
    f"{REASONING_SYSTEM_PROMPT}\nThe problem is multiple choice. The final result is the letter of the one "
    "right option alone."
)


@dataclass(frozen=True, kw_only=True)
class TaskRules:
    """What a task asks for and how it grades: all that given completions need, without any data."""

    system_prompt: str
    """Empty: no system message at all."""
    grader: Callable[[Prompt, str], Grade]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A domain. `grade` is used alike for rewards, evaluation, reranking and reports."""

    name: str
    system_prompt: str
    """Empty: no system message at all."""
    train: Sequence[Demonstration]
    """`completion` is None where the data has no expert."""
    eval: Sequence[Demonstration]
    """Held out; generated tasks share no question with `train`."""
    data_hash: str
    """Hash of the content that a run reads: equal hashes, equal problems and experts."""
    grader: Callable[[Prompt, str], Grade]

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verdict on one completion of `prompt`."""
        return self.grader(prompt, text)


class TaskKind(Protocol):
    """What the registry holds: one task as such, before its data."""

    def rules(self, data: Data) -> TaskRules: ...

    def make(self, data: Data) -> Task: ...


def rules_of(data: Data, grader: str, system_prompt: str = REASONING_SYSTEM_PROMPT) -> TaskRules:
    """The task's own system prompt unless `data.system_prompt` replaces it, and `grading.grade_answer`."""
    return TaskRules(
        system_prompt=system_prompt if data.system_prompt is None else data.system_prompt,
        grader=partial(grade, grader),
    )


def grade(grader: str, prompt: Prompt, text: str) -> Grade:
    """Grades against the prompt's gold answer; `choice` reads the options in its metadata."""
    options = prompt.metadata.get("options")
    return grade_answer(text, prompt.answer, grader, options if isinstance(options, dict) else None)


def content_hash(*splits: Iterable[Demonstration]) -> str:
    """Hash of problems and experts, independent of the file format they came in."""
    digest = hashlib.sha256()
    for split in splits:
        for row in split:
            prompt = row.prompt
            record = [prompt.id, prompt.question, prompt.answer, prompt.metadata, row.completion, row.corrupted]
            digest.update(json.dumps(record, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
        digest.update(b"\x1e")
    return digest.hexdigest()[:16]
