"""How long the policy stands still while the discriminator learns (METHOD 3: a gate, not a number)."""

from __future__ import annotations

from typing import Literal

from rairl_ray.config.schema import Discriminator

Reason = Literal["waiting", "steps", "gate", "gave up"]


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

    def ready(self, step: int, auroc: float | None) -> tuple[bool, Reason]:
        """step: discriminator updates done so far. auroc: the newest; None or NaN passes no gate."""
        if step < self.min_steps:
            return False, "waiting"
        if self.gate is None:
            return True, "steps"
        if auroc is not None and auroc >= self.gate:
            return True, "gate"
        if step >= self.max_steps:
            return True, "gave up"
        return False, "waiting"
