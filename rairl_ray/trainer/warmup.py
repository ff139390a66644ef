"""What the discriminator learns from before the policy moves: samples of the frozen policy, and experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rairl_ray.actors.rollout import RolloutWorkers
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.cursor import Cursor
from rairl_ray.trainer.evaluator import Evaluator
from rairl_ray.types import Demonstration, RolloutGroup


class WarmupPool:
    """Policy samples for the warm-up: drawn once, since the policy stands still, or fresh for every update.

    Its prompts have a cursor of their own, a function of the number of finished updates, so that a resumed
    warm-up goes on with the same prompts.
    """

    def __init__(
        self,
        config: RunConfig,
        train: Sequence[Demonstration],
        rollouts: RolloutWorkers,
        evaluator: Evaluator,
        stop: Callable[[], bool],
        done: int,
    ) -> None:
        """`done`: finished warm-up updates. `stop`: asked while samples are awaited, as in `Evaluator`."""
        settings = config.discriminator
        self._config, self._train, self._rollouts, self._stop = settings, train, rollouts, stop
        self._per_update = settings.warmup_prompts_per_step or config.trainer.prompts_per_step
        self._prompts = Cursor(len(train), config.seed, "warmup-prompts")
        self._items: list[tuple[RolloutGroup, Demonstration]] = []
        self._places: Cursor | None = None
        if settings.warmup_pool_prompts is not None:
            self._items = self._draw(settings.warmup_pool_prompts, "warmup/pool")
            self._places = Cursor(len(self._items), config.seed, "warmup-pool")
            self._places.next(done * self._per_update)
        else:
            self._prompts.next(done * self._per_update)
        self.heldout = evaluator.sample("heldout")
        """Samples of the held-out problems by the frozen policy, for the gate."""

    def next(self, update: int) -> tuple[list[RolloutGroup], list[Demonstration]]:
        """The groups and experts of the warm-up's `update`, the first of which is 1."""
        if self._places is None:
            items = self._draw(self._per_update, f"warmup/{update}")
        else:
            items = [self._items[index] for index in self._places.next(self._per_update)]
        return [group for group, _ in items], [demonstration for _, demonstration in items]

    def _draw(self, count: int, stream: str) -> list[tuple[RolloutGroup, Demonstration]]:
        demonstrations = [self._train[index] for index in self._prompts.next(count)]
        prompts = [item.prompt for item in demonstrations]
        samples = self._config.warmup_samples_per_prompt
        groups = self._rollouts.generate(prompts, stream, samples, unless=self._stop)
        return list(zip(groups, demonstrations, strict=True))
