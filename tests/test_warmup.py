"""When the policy may start to move."""

from __future__ import annotations

import math

from rairl_ray.algorithms.warmup import WarmupGate
from rairl_ray.config.schema import Discriminator


def test_steps_alone() -> None:
    gate = WarmupGate(Discriminator(warmup_steps=3))
    assert [gate.ready(step, None) for step in range(5)] == [
        (False, "waiting"),
        (False, "waiting"),
        (False, "waiting"),
        (True, "steps"),
        (True, "steps"),
    ]
    assert WarmupGate(Discriminator()).ready(0, None) == (True, "steps")


def test_the_gate_waits_for_the_auroc_but_never_opens_before_the_steps() -> None:
    gate = WarmupGate(Discriminator(warmup_steps=10, warmup_gate_auroc=0.8))
    assert gate.ready(9, 0.99) == (False, "waiting")
    assert gate.ready(10, 0.79) == (False, "waiting")
    assert gate.ready(10, 0.8) == (True, "gate")
    assert gate.ready(20, None) == (False, "waiting")
    assert gate.ready(20, math.nan) == (False, "waiting")


def test_it_gives_up_at_the_latest_step() -> None:
    default = WarmupGate(Discriminator(warmup_steps=10, warmup_gate_auroc=0.8))
    assert default.ready(39, 0.5) == (False, "waiting")
    assert default.ready(40, 0.5) == (True, "gave up")
    assert default.ready(40, 0.9) == (True, "gate")
    stated = WarmupGate(Discriminator(warmup_steps=10, warmup_gate_auroc=0.8, warmup_max_steps=12))
    assert stated.ready(12, None) == (True, "gave up")
