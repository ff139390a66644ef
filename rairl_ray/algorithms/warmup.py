"""How long the policy stands still while the discriminator learns (docs/method.md 3: a gate, not a number)."""

from __future__ import annotations

from typing import Literal

from rairl_ray.config.schema import Discriminator

Reason = Literal["waiting", "steps", "gate", "gave up"]

MEASURED_EVERY = 25
"""Warm-up updates between two measurements of the AUROC."""


def frozen(config: Discriminator) -> bool:
    """Whether the discriminator never learns: it scores as the model that it starts from."""
    return config.updates_per_policy_step == 0 and WarmupGate(config).max_steps == 0


class WarmupGate:
    """Decides when the policy may start to move.

    Without `warmup_gate_auroc`: after `warmup_steps` updates. With it: after at least `warmup_steps` updates,
    once the AUROC on held-out right against wrong policy samples reaches the gate, and at the latest after
    `warmup_max_steps`, which the caller reports as a warning.
    """

    def __init__(self, config: Discriminator) -> None:
        self.min_steps = config.warmup_steps
        self.gate = config.warmup_gate_auroc
        limit = 4 * config.warmup_steps if config.warmup_max_steps is None else config.warmup_max_steps
        self.max_steps = max(limit, config.warmup_steps)

    def measures(self, step: int) -> bool:
        """Whether the AUROC is measured after so many updates.

        It depends on their number alone, so that a resumed warm-up opens its gate where an uninterrupted one
        does.
        """
        return step in (self.min_steps, self.max_steps) or (step > 0 and step % MEASURED_EVERY == 0)

    def ready(self, step: int, auroc: float | None) -> tuple[bool, Reason]:
        """step: discriminator updates done so far. auroc: of this very step; None or NaN passes no gate."""
        if step < self.min_steps:
            return False, "waiting"
        if self.gate is None:
            return True, "steps"
        if auroc is not None and auroc >= self.gate:
            return True, "gate"
        if step >= self.max_steps:
            return True, "gave up"
        return False, "waiting"
