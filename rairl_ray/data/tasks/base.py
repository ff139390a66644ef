"""What a task is: problems with experts, and the one function that grades them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rairl_ray.data.grading import Grade
from rairl_ray.types import Demonstration, Prompt


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
