"""A stop request inside an evaluation ends the run there, and the resume evaluates as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from rairl_ray.trainer.evaluator import Evaluator
from rairl_ray.trainer.run import run as run_of
from rairl_ray.trainer.run_context import StopRequest
from rairl_ray.types import RolloutGroup
from tests.inprocess import config_of, differing, killed_after, rows_of, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_cluster")]

RUN = ("trainer.steps=3", "eval.every=2", "eval.at_start=true", "trainer.checkpoint_every=0")


def test_a_run_stopped_in_each_of_its_evaluations_has_the_rows_of_the_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(config_of("airl", tmp_path / "whole", *RUN))
    config = config_of("airl", tmp_path / "stopped", *RUN)
    drawn: list[str] = []
    sample = Evaluator.sample

    def stopped(self: Evaluator, stream: str) -> list[RolloutGroup]:
        """Asks for a stop while the last awaited sampling of this attempt is on."""
        drawn.append(stream)
        if len(drawn) == at:
            stop.ask()
        return sample(self, stream)

    monkeypatch.setattr(Evaluator, "sample", stopped)
    # the sampling to stop in: at the start; then (start, warm-up,) step 2; then (step 2,) the end
    for attempt, at in enumerate((1, 3, 2)):
        drawn.clear()
        stop = StopRequest()
        ended = run_of(config, resume=config.name if attempt else None, stop=stop)
        assert (ended.status, ended.summary) == ("stopped", {})
        assert len(drawn) == at, "nothing is evaluated after the stop"
    at = 0
    assert differing(run(config, resume=True), whole) == []
    assert [row["step"] for row in rows_of(config)] == [row["step"] for row in whole]
    # killed after an evaluation was logged and before the next checkpoint, it begins with that evaluation again
    for step in (2, 0):
        again = killed_after(config, step, tmp_path / f"again-{step}")
        assert differing(run(again, resume=True), whole) == []
