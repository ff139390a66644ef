"""Draws the problems that come next: keyed permutations of the training split with saved cursors."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from rairl_ray.data.cursor import Cursor
from rairl_ray.data.tasks.base import Task
from rairl_ray.errors import DataError
from rairl_ray.keys import keyed_random
from rairl_ray.types import Demonstration, Prompt


class PromptSampler:
    """Two independent cursors over the training split: one for prompts, one for expert traces."""

    def __init__(self, task: Task, seed: int, ahead: int = 0) -> None:
        """`ahead`: draws after the current one whose demonstrations stay at hand too."""
        self._task = task
        self._seed = seed
        self._prompts = Cursor(len(task.train), seed, "prompts")
        self._experts = Cursor(len(task.train), seed, "experts")
        self._drawn: deque[dict[str, Demonstration]] = deque(maxlen=ahead + 1)

    def next_prompts(self, count: int) -> list[Prompt]:
        """The next `count` training prompts."""
        return self.prompts(self.next_rows(count))

    def next_rows(self, count: int) -> list[int]:
        """Rows of the next `count` training prompts."""
        return self._prompts.next(count)

    def prompts(self, rows: Sequence[int]) -> list[Prompt]:
        """The prompts of these rows; their demonstrations are at hand until `ahead` more draws were made."""
        drawn = [self._task.train[row] for row in rows]
        self._drawn.append({item.prompt.id: item for item in drawn})
        return [item.prompt for item in drawn]

    def demonstration(self, prompt_id: str) -> Demonstration:
        """The expert trace of a prompt that was drawn lately."""
        item = next(drawn[prompt_id] for drawn in self._drawn if prompt_id in drawn)
        if item.completion is None:
            raise DataError(
                f"data: problem {prompt_id} has no expert trace; algorithm.type=airl needs one for every "
                "training problem: set data.demonstrations, or drop such rows"
            )
        return item

    def next_demonstrations(self, count: int) -> list[Demonstration]:
        """The next `count` expert traces of the experts' own cursor."""
        return [self._task.train[index] for index in self._experts.next(count)]

    def fixed(self, count: int, stream: str) -> list[Demonstration]:
        """`count` training problems (or all, if fewer), the same in every call and every run of this seed."""
        total = len(self._task.train)
        chosen = keyed_random(self._seed, "fixed", stream).sample(range(total), min(count, total))
        return [self._task.train[index] for index in chosen]

    def state(self) -> dict[str, object]:
        return {"prompts": self._prompts.state(), "experts": self._experts.state()}

    def restore(self, state: dict) -> None:
        self._prompts.restore(state["prompts"])
        self._experts.restore(state["experts"])
