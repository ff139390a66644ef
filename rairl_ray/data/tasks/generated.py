"""Problems made by a generator: endless, reproducible, and held out by their text.

Problem i of a split is a function of (task, split, i) and the difficulty alone, never of the run's seed, so
that all seeds of an experiment meet the same evaluation problems. Which split a problem may stand in is
decided by a keyed hash of its question, so no question is ever in both.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, overload

from rairl_ray.config.schema import Data
from rairl_ray.data.tasks.base import Task, TaskRules
from rairl_ray.errors import ConfigError
from rairl_ray.keys import key_seed, keyed_random
from rairl_ray.types import Demonstration, Prompt

KEY = "rairl-generated-1"
"""Part of every draw: a change of a generator's problems changes it."""
EVAL_SHARE = 10
"""One question in so many is held out."""
DEFAULT_TRAIN_SIZE = 200_000
DEFAULT_EVAL_SIZE = 1_000
_ATTEMPTS = 1_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """A drawn problem, before its expert is worked out."""

    question: str
    metadata: dict[str, object] = field(default_factory=dict)
    parts: object = None
    """What the generator needs to solve it."""


class Generator(Protocol):
    name: str

    def draw(self, random: random.Random) -> Problem: ...

    def expert(self, problem: Problem) -> tuple[str, str]:
        """(answer, completion in the task's format)"""
        ...


def is_held_out(question: str) -> bool:
    return key_seed(KEY, "held out", question) % EVAL_SHARE == 0


class GeneratedSplit(Sequence[Demonstration]):
    """Training problems, each made when it is asked for."""

    def __init__(self, generator: Generator, size: int) -> None:
        self._generator, self._size = generator, size
        self._make(0)  # a difficulty with too few problems fails here, not in the middle of a run

    def __len__(self) -> int:
        return self._size

    @overload
    def __getitem__(self, index: int) -> Demonstration: ...

    @overload
    def __getitem__(self, index: slice) -> list[Demonstration]: ...

    def __getitem__(self, index: int | slice) -> Demonstration | list[Demonstration]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._size))]
        if not -self._size <= index < self._size:
            raise IndexError(f"problem {index} of {self._size}")
        return self._make(index % self._size)

    def __iter__(self) -> Iterator[Demonstration]:
        return (self._make(i) for i in range(self._size))

    def _make(self, index: int) -> Demonstration:
        problem = _draw(self._generator, "train", index)
        return _demonstration(self._generator, problem, f"{self._generator.name}/train/{index}")


def evaluation_split(generator: Generator, size: int) -> list[Demonstration]:
    """`size` different held-out problems, or all that the difficulty has."""
    problems: dict[str, Problem] = {}
    for index in range(20 * size):
        problem = _draw(generator, "eval", index)
        problems.setdefault(problem.question, problem)
        if len(problems) == size:
            break
    else:
        _log.warning("%s: this difficulty has only about %d held-out problems", generator.name, len(problems))
    return [
        _demonstration(generator, problem, f"{generator.name}/eval/{index}")
        for index, problem in enumerate(problems.values())
    ]


@dataclass(frozen=True, kw_only=True)
class GeneratedTask:
    """A task whose problems are made: `make` raises ConfigError for an impossible difficulty."""

    name: str
    """Also the section of `data` that holds its difficulty."""
    generator: Callable[[Data], Generator]
    rules: Callable[[Data], TaskRules]

    def make(self, data: Data) -> Task:
        generator, rules = self.generator(data), self.rules(data)
        train_size, eval_size = data.limit or DEFAULT_TRAIN_SIZE, data.eval_limit or DEFAULT_EVAL_SIZE
        difficulty = getattr(data, self.name).model_dump(mode="json")
        return Task(
            name=self.name,
            system_prompt=rules.system_prompt,
            train=GeneratedSplit(generator, train_size),
            eval=evaluation_split(generator, eval_size),
            data_hash=generated_hash(self.name, difficulty, train_size, eval_size),
            grader=rules.grader,
        )


def generated_hash(name: str, parameters: Mapping[str, object], train_size: int, eval_size: int) -> str:
    """Hash of everything the problems depend on."""
    content = [KEY, name, dict(parameters), train_size, eval_size]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _draw(generator: Generator, split: Literal["train", "eval"], index: int) -> Problem:
    for attempt in range(_ATTEMPTS):
        problem = generator.draw(keyed_random(KEY, generator.name, split, index, attempt))
        if is_held_out(problem.question) == (split == "eval"):
            return problem
    raise ConfigError(
        f"data.{generator.name}: too few different problems to hold some out; raise its difficulty"
    )


def _demonstration(generator: Generator, problem: Problem, prompt_id: str) -> Demonstration:
    answer, completion = generator.expert(problem)
    prompt = Prompt(id=prompt_id, question=problem.question, answer=answer, metadata=dict(problem.metadata))
    return Demonstration(prompt=prompt, completion=completion)
