"""When the policy may start to move."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rairl_ray.algorithms.warmup import WarmupGate, frozen
from rairl_ray.config.schema import Discriminator, RunConfig
from rairl_ray.trainer import rl_trainer
from rairl_ray.trainer.rl_trainer import Progress, RLTrainer


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


class Killed(Exception):
    pass


@pytest.fixture(autouse=True)
def no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        rl_trainer, "WarmupPool", lambda *_: SimpleNamespace(next=lambda update: ([], []), heldout=[])
    )


def warmed_up(
    config: RunConfig, progress: Progress, auroc_of: Callable[[int], float], kill_at: int | None = None
) -> tuple[Progress, list[str]]:
    """The driver's own loop over a discriminator whose AUROC is a function of its updates; what it said."""
    said: list[str] = []
    checkpoints = [Progress(**vars(progress))]
    run: Any = object.__new__(RLTrainer)
    run.config, run.progress = config, progress
    run.workers = SimpleNamespace(monitor=SimpleNamespace(draining=set), discriminator=None, rollouts=None)
    run.rollout_pool = SimpleNamespace(grow=lambda: None, leave_drained=lambda: None)
    run.airl = SimpleNamespace(update=lambda groups, demonstrations, epoch: {})
    run.evaluator = None
    run._separation = lambda pool: auroc_of(progress.warmup)

    def save() -> None:
        checkpoints.append(Progress(**vars(progress)))

    def log(step: int, metrics: dict[str, float]) -> None:
        if progress.warmup == kill_at:
            raise Killed

    run._save = save
    display = SimpleNamespace(phase=lambda *_: None, step=lambda *_: None)
    prepared = SimpleNamespace(task=SimpleNamespace(train=[]))
    run.context = SimpleNamespace(display=display, stop=False, event=said.append, log=log, prepared=prepared)
    try:
        assert run._warm_up()
    except Killed:
        return checkpoints[-1], said
    return progress, said


@pytest.mark.parametrize("every", [1, 7, 10])
@pytest.mark.parametrize("steps", [0, 10, 20, 25])
def test_a_resumed_warm_up_opens_its_gate_where_the_uninterrupted_one_does(steps: int, every: int) -> None:
    config = RunConfig.model_validate({
        "discriminator": {"warmup_steps": steps, "warmup_gate_auroc": 0.75, "warmup_max_steps": 90},
        "trainer": {"checkpoint_every": every},
    })  # fmt: skip

    def rising(update: int) -> float:
        return 0.5 + update * 0.0093  # 0.75 from update 27 on

    whole, said = warmed_up(config, Progress(), rising)
    assert whole.warmup == 50
    for kill_at in range(1, 50):
        left, _ = warmed_up(config, Progress(), rising, kill_at)
        resumed, said_again = warmed_up(config, left, rising)
        assert (resumed.warmup, said_again) == (whole.warmup, said), f"killed at {kill_at}"


@pytest.mark.parametrize("steps", [10, 20, 25, 60])
def test_the_gate_never_opens_on_a_number_of_earlier_weights(steps: int) -> None:
    """A head that happens to rank well before it learned anything, and forgets it."""
    config = RunConfig.model_validate({
        "discriminator": {"warmup_steps": steps, "warmup_gate_auroc": 0.75, "warmup_max_steps": 90}
    })  # fmt: skip
    ended, said = warmed_up(config, Progress(), lambda update: 0.9 if update < 10 else 0.6)
    assert ended.warmup == 90 and "gave up" in said[0] and "0.600" in said[0]


@pytest.mark.parametrize(
    ("updates", "warmup", "never"), [(0, 0, True), (0, 5, False), (1, 0, False), (1, 5, False)]
)
def test_a_discriminator_is_frozen_where_it_never_learns(updates: int, warmup: int, never: bool) -> None:
    assert frozen(Discriminator(updates_per_policy_step=updates, warmup_steps=warmup)) is never
