"""The contract of rollout engines on CUDA, by `make gpu-test`. None of these has run yet (docs/gpu.md).

vLLM takes its V2 model runner on CUDA and its V1 runner on a CPU, so what test_rollout_engines.py shows on a
CPU is shown anew here. Kernels round differently with the batch: means are compared, not bits.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rairl_ray.engines.hf_engine import HfEngine
from rairl_ray.engines.rollout_engine import EngineOptions, StaleEngineError
from tests import gpu_needs
from tests.rollout_harness import (
    COMPLETION,
    EOS,
    PROMPT,
    RANK,
    SAMPLING,
    EngineProcess,
    adapter,
    chunks,
    decode,
    reference_logprobs,
    requests,
    small_model,
    tokens,
)

pytestmark = [pytest.mark.gpu, gpu_needs.gpus(1)]

# Mean |difference| of a token's log-probability from float32 on a CPU: other weights differ by 1 and more.
CLOSE = {"float32": 0.01, "bfloat16": 0.1}
SHARE = 0.2

ENGINES = [
    pytest.param(("hf", "float32", 1), id="hf"),
    pytest.param(("vllm", "float32", 1), id="vllm float32", marks=gpu_needs.vllm),
    pytest.param(("vllm", "bfloat16", 1), id="vllm bfloat16", marks=gpu_needs.vllm),
    pytest.param(("vllm", "bfloat16", 2), id="vllm tensor-parallel", marks=[gpu_needs.vllm, gpu_needs.gpus(2)]),
]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model(0).save_pretrained(folder)
    return folder


def options_for(folder: Path, dtype: Any, parallel: int, lora_rank: int | None, sleep: bool) -> EngineOptions:
    return EngineOptions(
        model_path=str(folder),
        eos_id=EOS,
        max_prompt_tokens=PROMPT,
        max_completion_tokens=COMPLETION,
        max_sequences=64,
        dtype=dtype,
        device="cuda",
        tensor_parallel=parallel,
        memory_share=SHARE,
        lora_rank=lora_rank,
        sleep=sleep,
    )


def opened(kind: str, options: EngineOptions, folder: Path) -> Iterator[Any]:
    if kind == "hf":
        yield HfEngine(options, decode)
        return
    process = EngineProcess(options, folder)
    try:
        process.wait_started()
        yield process
        process.assert_closes_cleanly()
    finally:
        process.process.kill()


@pytest.fixture(scope="module", params=ENGINES)
def full(request: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(engine for full weights, tolerance)"""
    kind, dtype, parallel = request.param
    options = options_for(model_folder, dtype, parallel, None, sleep=False)
    for engine in opened(kind, options, tmp_path_factory.mktemp("full")):
        with pytest.raises(StaleEngineError):
            engine.generate(requests(1), SAMPLING)
        yield engine, CLOSE[dtype]


# vLLM's adapter kernels on CUDA take no float32 (config/machine_rules.precision).
@pytest.fixture(scope="module", params=[ENGINES[0], *ENGINES[2:]])
def lora(request: Any, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(engine for adapters, tolerance)"""
    kind, dtype, parallel = request.param
    options = options_for(model_folder, dtype, parallel, RANK, sleep=False)
    for engine in opened(kind, options, tmp_path_factory.mktemp("lora")):
        yield engine, CLOSE[dtype]


def gap(model: Any, asked: list[Any], made: list[Any]) -> float:
    """Mean |difference| a token between the engine's log-probabilities and float32's on the CPU."""
    return float(
        np.mean(
            np.concatenate(
                [
                    np.abs(np.array(m.logprobs) - reference_logprobs(model, a.prompt_ids, m.token_ids))
                    for a, m in zip(asked, made, strict=True)
                ]
            )
        )
    )


def test_samples_repeat_by_seed_and_carry_their_logprobs(full: Any) -> None:
    engine, close = full
    engine.load_weights(chunks(small_model(0)), 1)
    asked = requests(48)
    made = engine.generate(asked, SAMPLING)
    assert gap(small_model(0), asked, made) < close
    assert {generation.finish_reason for generation in made} == {"stop", "length"}
    again = tokens(engine.generate(asked, SAMPLING))
    assert sum(a == b for a, b in zip(tokens(made), again, strict=True)) >= 46
    other = tokens(engine.generate(requests(48, seed=7), SAMPLING))
    assert sum(a != b for a, b in zip(tokens(made), other, strict=True)) > 40


def test_tempered_nucleus_samples_carry_their_logprobs(full: Any) -> None:
    """Of what was sampled from: renormalised, so above the full distribution's, by at most -log(top_p)."""
    engine, close = full
    engine.load_weights(chunks(small_model(0)), 1)
    asked = requests(32)
    for request, generation in zip(
        asked, engine.generate(asked, dataclasses.replace(SAMPLING, temperature=0.7, top_p=0.6)), strict=True
    ):
        plain = reference_logprobs(small_model(0), request.prompt_ids, generation.token_ids, 0.7)
        above = np.array(generation.logprobs) - plain
        assert above.min() > -5 * close and above.max() < -np.log(0.6) + 5 * close


def test_scores_of_given_tokens(full: Any) -> None:
    engine, close = full
    engine.load_weights(chunks(small_model(0)), 1)
    asked = requests(24)
    made = engine.generate(asked, SAMPLING)
    scores = engine.score_tokens([request.prompt_ids for request in asked], tokens(made))
    differences = [np.array(row) - np.array(m.logprobs) for row, m in zip(scores, made, strict=True)]
    assert np.abs(np.concatenate(differences)).mean() < close


def test_new_weights_are_served_and_old_ones_again(full: Any) -> None:
    """Compiled graphs and caches included."""
    engine, close = full
    asked = requests(48)
    for version, seed in enumerate([0, 1, 0], start=1):
        report = engine.load_weights(chunks(small_model(seed)), version)
        assert report.version == engine.version == version
        made = engine.generate(asked, SAMPLING)
        assert gap(small_model(seed), asked, made) < close
        assert gap(small_model(1 - seed), asked, made) > 0.5


def test_adapters_follow_each_other(lora: Any) -> None:
    engine, close = lora
    engine.mark_synced(0)
    asked = requests(32)
    assert gap(small_model(0), asked, engine.generate(asked, SAMPLING)) < close
    for version, seed in enumerate([1, 2, 3, 1], start=1):
        named, config, merged = adapter(seed)
        engine.load_adapter(named, config, version)
        made = engine.generate(asked, SAMPLING)
        assert gap(merged, asked, made) < 2 * close
        assert gap(small_model(0), asked, made) > 0.3


@gpu_needs.vllm
@pytest.mark.parametrize("lora_rank", [None, RANK])
def test_a_sleeping_engine_gives_its_memory_back_and_wakes_up_current(
    lora_rank: int | None, model_folder: Path, tmp_path: Path
) -> None:
    """Weights that were loaded before the sleep are served after it, and so are those that come to wake it."""
    options = options_for(model_folder, "bfloat16", 1, lora_rank, sleep=True)
    asked = requests(32)
    for engine in opened("vllm", options, tmp_path):
        models = []
        for version, seed in enumerate([1, 2], start=1):
            if lora_rank is None:
                engine.load_weights(chunks(small_model(seed)), version)
                models.append(small_model(seed))
            else:
                named, config, merged = adapter(seed)
                engine.load_adapter(named, config, version)
                models.append(copy.deepcopy(merged))
            assert gap(models[-1], asked, engine.generate(asked, SAMPLING)) < 2 * CLOSE["bfloat16"]
            awake, total = torch.cuda.mem_get_info(0)
            engine.sleep()
            asleep, _ = torch.cuda.mem_get_info(0)
            assert asleep - awake > 0.5 * SHARE * total
            if version == 1:  # woken by sampling; the second time by the next sync
                assert gap(models[-1], asked, engine.generate(asked, SAMPLING)) < 2 * CLOSE["bfloat16"]
                engine.sleep()
        assert gap(models[-1], asked, engine.generate(asked, SAMPLING)) < 2 * CLOSE["bfloat16"]
