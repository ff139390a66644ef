"""Step times from operations and bytes, against sums written out by hand, and what they must obey."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rairl_ray.config.estimate import PUBLISHED
from rairl_ray.config.load import load_config
from rairl_ray.config.prediction import Assumptions, Prediction, predict
from rairl_ray.plan import show_plan
from rairl_ray.sweep.file import load_sweep
from rairl_ray.sweep.plan import show_sweep_plan
from tests.runs import ROOT

PAPER = ROOT / "experiments/gsm8k/qwen2.5-3b_partial.yaml"


def test_the_papers_step_by_hand() -> None:
    """8 GPUs; 16 prompts of 300 tokens, 8 samples of 824; LoRA under checkpointing; one perturbed copy."""
    found = predict(load_config(PAPER), gpus=8)
    assert found is not None
    shape, gpu = PUBLISHED["Qwen/Qwen2.5-3B-Instruct"], Assumptions()
    n, learner = shape.parameters, gpu.flops * gpu.learner_share * 8
    tokens = 16 * (300 + 8 * 824)
    labelled = 16 * (300 + (8 + 2) * 824)
    assert found.score == pytest.approx(2 * n * tokens / learner)
    assert found.policy == pytest.approx(2 * 3 * n * tokens / learner)  # forward, again, backward by inputs
    assert found.discriminator == pytest.approx(2 * 3 * n * labelled / learner)
    # an engine has 16 samples at once: it reads the weights for each token, and the cache of 712 positions
    cache = 2 * 36 * 2 * 128 * 2 * 712 * 16
    token = (2 * n + cache) / (gpu.bandwidth * gpu.decode_share)
    prefill = 2 * n * 16 * 300 / (gpu.flops * gpu.prefill_share)
    assert found.rollout == pytest.approx(824 * token + prefill)
    assert found.step == pytest.approx(
        found.rollout + found.score + found.policy + found.discriminator + found.sync
    )
    assert found.gpu_hours == pytest.approx(8 * found.hours) and found.hours > 500 * found.step / 3600


@pytest.mark.parametrize("adapter", ["merged", "served"])
def test_what_a_sync_sends(adapter: str) -> None:
    """36 blocks of 2048 by 2 x 2048 + 2 x 256 + 3 x 11008 with biases on q, k and v; or rank 256."""
    found = predict(load_config(PAPER, [f"rollout.adapter={adapter}"]), gpus=8)
    assert found is not None
    blocks = 2048 * (2 * 2048 + 2 * 256 + 3 * 11008) + 2048 + 2 * 256
    factors = 256 * (2 * 4096 + 2 * (2048 + 256) + 3 * (2048 + 11008))
    parameters = 36 * (blocks if adapter == "merged" else factors)
    assert found.sync == pytest.approx(2 * parameters / Assumptions().link)


@given(st.integers(8, 64), st.integers(2, 16), st.integers(16, 2048))
def test_more_tokens_take_longer_and_running_ahead_hides_the_shorter_half(
    prompts: int, samples: int, tokens: int
) -> None:
    def of(*words: str) -> Prediction:
        given = [f"trainer.prompts_per_step={prompts}", f"rollout.samples_per_prompt={samples}"]
        found = predict(load_config(PAPER, [*given, *words]), gpus=8)
        assert found is not None
        return found

    one = of(f"rollout.max_completion_tokens={tokens}")
    more = of(f"rollout.max_completion_tokens={tokens + 16}")
    assert more.step > one.step and more.gpu_hours > one.gpu_hours
    learning = one.score + one.discriminator + one.policy + one.sync
    assert one.step == pytest.approx(one.rollout + learning)
    ahead = of(f"rollout.max_completion_tokens={tokens}", "trainer.max_staleness_steps=1")
    assert ahead.step == pytest.approx(max(one.rollout, learning))


def test_where_nothing_can_be_said() -> None:
    assert predict(load_config(ROOT / "experiments/demo/airl.yaml"), gpus=0) is None
    unknown = load_config(PAPER, ["model.policy.path=someone/unknown"])
    assert predict(unknown, gpus=8) is None


def test_plan_prints_it_for_a_run_and_a_sweep() -> None:
    said = io.StringIO()
    show_plan(load_config(PAPER), Console(file=said, width=200), gpus=8)
    assert "predicted and not measured" in said.getvalue() and "GPU hours" in said.getvalue()
    assert "989 TFLOP/s and 4.8 TB/s" in said.getvalue()
    said = io.StringIO()
    file = load_sweep(str(ROOT / "experiments/sweeps/densities.yaml"))
    show_sweep_plan(file, Console(file=said, width=200), gpus=8, nodes=4, cpus=64)
    assert "GPU hours; at least" in said.getvalue() and "4 trials at once" in said.getvalue()
