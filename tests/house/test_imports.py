"""What a process of a run loads: each second of imports is paid by every actor, trial and test."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch

from rairl_ray.imports import NOT_FOR_TEXT, uncompiled, without
from rairl_ray.sweep.run import trainable
from tests.runs import ROOT

COMPILER = "torch._inductor.codecache"
LEARNER = (
    "rairl_ray.actors.policy, rairl_ray.engines.deepspeed_engine, rairl_ray.engines.models, "
    "rairl_ray.engines.heads, rairl_ray.engines.reward_heads, transformers.models.llama.modeling_llama, "
    # what ZeRO loads when it starts
    "deepspeed.runtime.zero.stage3, deepspeed.runtime.zero.muon.muon_optimizer"
)


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (LEARNER, {"sklearn", "mlflow", "pandas", "boto3", "peft", COMPILER}),
        (
            "rairl_ray.actors.rollout_actor, rairl_ray.engines.hf_engine",
            {"sklearn", "mlflow", "pandas", "boto3", "peft", COMPILER},
        ),
        (
            "rairl_ray.trainer.run, rairl_ray.trainer.rl_trainer",
            {"sklearn", "scipy.stats", "mlflow", "deepspeed", "boto3", "peft", "ray.train"},
        ),
        ("rairl_ray.tracking.tracker; rairl_ray.tracking.tracker.import_mlflow()", {"pandas", "torch"}),
        ("rairl_ray.sweep.supervise", {"torch", "transformers", "sklearn", "scipy", "optuna", "mlflow"}),
    ],
    ids=["learner", "rollout", "driver", "driver's tracker", "trial's watcher"],
)
def test_a_process_loads_nothing_that_it_does_not_use(modules: str, absent: set[str]) -> None:
    code = f"import sys, {modules}; print('loaded', *sys.modules)"
    if {*NOT_FOR_TEXT} <= absent:  # what was hidden can still be loaded
        code += "; import sklearn.metrics"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    [loaded] = [line.split() for line in done.stdout.splitlines() if line.startswith("loaded")]
    assert not absent & set(loaded) and "rairl_ray" in loaded


def test_tunes_worker_imports_the_watcher_alone() -> None:
    """A function travels to a worker as the name of its module, which is imported there."""
    assert trainable.__module__ == "rairl_ray.sweep.supervise"


def test_functions_stay_as_they_are_written_within_and_are_compiled_afterwards() -> None:
    compiler = torch.compile
    with pytest.raises(ValueError), uncompiled():

        @torch.compile
        def double(x: int) -> int:
            return 2 * x

        @torch.compile(dynamic=True)
        def triple(x: int) -> int:
            return 3 * x

        assert type(double) is type(triple) is type(uncompiled) and (double(2), triple(2)) == (4, 6)
        raise ValueError
    assert torch.compile is compiler


def test_a_library_is_missing_within_and_there_afterwards() -> None:
    sys.modules.pop("colorsys", None)
    with without("colorsys", "json"):
        with pytest.raises(ImportError):
            import colorsys
        import json  # loaded already: stays
    import colorsys

    assert colorsys.rgb_to_hsv and json.dumps


def test_the_collector_of_cycles_rests_within() -> None:
    assert gc.isenabled()
    with pytest.raises(ValueError), without():
        assert not gc.isenabled()
        raise ValueError
    assert gc.isenabled()
    gc.disable()
    try:
        with without():
            pass
        assert not gc.isenabled(), "it was somebody else's choice"
    finally:
        gc.enable()


def test_it_is_there_afterwards_even_where_an_import_fails() -> None:
    sys.modules.pop("colorsys", None)
    with pytest.raises(ModuleNotFoundError), without("colorsys"):
        import no_such_library  # type: ignore[import-not-found]  # noqa: F401
    assert "colorsys" not in sys.modules
