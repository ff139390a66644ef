"""Exact resume where each actor is a process begun by itself, as users have them (see test_exact_resume.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer.test_exact_resume import check_resume, compiled  # noqa: F401

pytestmark = [pytest.mark.cold, pytest.mark.slow]


CASES = (
    "airl, implicit, full, ZeRO 1, replay, gate, KL",
    "airl, scalar, intervals, LoRA, ZeRO 2, 2 ranks, replay",
)


@pytest.mark.parametrize("case", CASES)
def test_the_resumed_run_equals_the_uninterrupted_one(
    case: str,
    tmp_path: Path,
    compiled: Path,  # noqa: F811
) -> None:
    check_resume(case, 4, tmp_path, compiled)
