"""The contract of rollout engines, run against both: real vLLM (in its own process) and real transformers."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from rairl_ray.engines.hf_engine import HfEngine
from rairl_ray.engines.rollout_engine import (
    EngineOptions,
    GenerationRequest,
    SamplingSettings,
    StaleEngineError,
    WeightSyncError,
)
from rairl_ray.engines.weights import checksum
from rairl_ray.errors import DataError, ModelError
from tests.rollout_harness import (
    COMPLETION,
    EOS,
    PROMPT,
    RANK,
    SAMPLING,
    TOLERANCE,
    VOCABULARY,
    EngineProcess,
    adapter,
    assert_reference,
    chunks,
    decode,
    reference_logits,
    reference_logprobs,
    requests,
    small_model,
    tokens,
)

ENGINES = ["hf", "vllm"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    small_model(0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def options(model_folder: Path) -> EngineOptions:
    return EngineOptions(
        model_path=str(model_folder),
        eos_id=EOS,
        max_prompt_tokens=PROMPT,
        max_completion_tokens=COMPLETION,
        max_sequences=64,
        cpu_cache_gib=0.25,
    )


@pytest.fixture(scope="module")
def vllm_processes(
    options: EngineOptions, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """Both vLLM engines, started at the same time: one for full weights, one for adapters."""
    if importlib.util.find_spec("vllm") is None:
        yield {}
        return
    ranks = {"full": None, "lora": RANK}
    processes = {
        name: EngineProcess(dataclasses.replace(options, lora_rank=rank), tmp_path_factory.mktemp(name))
        for name, rank in ranks.items()
    }
    try:
        for process in processes.values():
            process.wait_started()
        yield processes
        for process in processes.values():
            process.assert_closes_cleanly()
    finally:
        for process in processes.values():
            process.process.kill()


def _opened(kind: str, name: str, options: EngineOptions, processes: dict[str, Any]) -> Any:
    if kind == "vllm" and not processes:
        pytest.skip("vLLM is not installed")
    rank = RANK if name == "lora" else None
    engine = (
        processes[name] if kind == "vllm" else HfEngine(dataclasses.replace(options, lora_rank=rank), decode)
    )
    assert engine.version is None and engine.checksum is None
    with pytest.raises(StaleEngineError, match="sync"):
        engine.generate(requests(1), SAMPLING)
    with pytest.raises(StaleEngineError):
        engine.score_tokens([[2]], [[3]])
    return engine


@pytest.fixture(scope="module", params=ENGINES)
def full_engine(request: Any, options: EngineOptions, vllm_processes: dict[str, Any]) -> Any:
    return _opened(request.param, "full", options, vllm_processes)


@pytest.fixture(scope="module", params=ENGINES)
def lora_engine(request: Any, options: EngineOptions, vllm_processes: dict[str, Any]) -> Any:
    return _opened(request.param, "lora", options, vllm_processes)


@pytest.fixture
def engine(full_engine: Any) -> Any:
    """The full-weight engine, serving the weights on disk as version 1."""
    full_engine.load_weights(chunks(small_model(0)), 1)
    return full_engine


def test_equal_seeds_repeat_and_other_seeds_differ(engine: Any) -> None:
    asked = requests(32)
    first = engine.generate(asked, SAMPLING)
    assert tokens(engine.generate(asked, SAMPLING)) == tokens(first)
    other = engine.generate(requests(32, seed=7), SAMPLING)
    assert sum(a != b for a, b in zip(tokens(first), tokens(other), strict=True)) > 28


def test_a_request_does_not_depend_on_its_companions(engine: Any) -> None:
    asked = requests(40)
    together = tokens(engine.generate(asked, SAMPLING))
    alone = [engine.generate([request], SAMPLING)[0].token_ids for request in asked[::8]]
    assert alone == together[::8]
    assert tokens(engine.generate(asked[::-1], SAMPLING)) == together[::-1]


def test_order_is_kept(engine: Any) -> None:
    """Each answer's log-probabilities belong to its own prompt, over more requests than run at once."""
    asked = requests(100)
    assert_reference(small_model(0), asked, engine.generate(asked, SAMPLING))


def test_end_of_sequence_and_length(engine: Any) -> None:
    made = engine.generate(requests(100), SAMPLING)
    reasons = {generation.finish_reason for generation in made}
    assert reasons == {"stop", "length"}, "the test's model must show both"
    for generation in made:
        stopped = generation.finish_reason == "stop"
        assert generation.token_ids.count(EOS) == int(stopped)
        assert (generation.token_ids[-1] == EOS) == stopped
        assert stopped or len(generation.token_ids) == COMPLETION
        assert len(generation.logprobs) == len(generation.token_ids)
        assert generation.text == decode(generation.token_ids)


def test_first_tokens_follow_the_distribution(engine: Any) -> None:
    prompt = requests(1)[0].prompt_ids
    asked = [GenerationRequest(prompt_ids=prompt, seed=seed) for seed in range(2000)]
    made = engine.generate(asked, SamplingSettings(max_tokens=1, temperature=0.7))
    counts = np.bincount([generation.token_ids[0] for generation in made], minlength=VOCABULARY)
    expected = torch.softmax(reference_logits(small_model(0), prompt, (2,))[0] / 0.7, -1).double().numpy()
    common = expected > 5 / len(asked)
    observed = [*counts[common], counts[~common].sum()]
    wanted = np.array([*expected[common], expected[~common].sum()])
    assert chisquare(observed, wanted / wanted.sum() * len(asked)).pvalue > 1e-3


@pytest.mark.parametrize("temperature", [0.5, 1.7])
def test_logprobs_are_those_of_the_tempered_distribution(engine: Any, temperature: float) -> None:
    asked = requests(16)
    settings = SamplingSettings(max_tokens=COMPLETION, temperature=temperature)
    assert_reference(small_model(0), asked, engine.generate(asked, settings), temperature)


def test_greedy(engine: Any) -> None:
    asked = requests(16)
    made = engine.generate(asked, SamplingSettings(max_tokens=COMPLETION, temperature=0.0))
    for request, generation in zip(asked, made, strict=True):
        logits = reference_logits(small_model(0), request.prompt_ids, generation.token_ids)
        chosen = logits.gather(-1, torch.tensor(generation.token_ids)[:, None])[:, 0]
        assert (logits.max(-1).values - chosen).max() < TOLERANCE
    assert_reference(small_model(0), asked, made)


def test_top_p_draws_from_the_renormalised_nucleus(engine: Any) -> None:
    asked, top_p = requests(32), 0.6
    made = engine.generate(asked, SamplingSettings(max_tokens=COMPLETION, top_p=top_p))
    kept_ranks = set()
    for request, generation in zip(asked, made, strict=True):
        probabilities = torch.softmax(
            reference_logits(small_model(0), request.prompt_ids, generation.token_ids), -1
        )
        for row, token, logprob in zip(probabilities, generation.token_ids, generation.logprobs, strict=True):
            order = row.argsort(descending=True)
            size = int((row[order].cumsum(0) < top_p).sum()) + 1
            rank = int((order == token).nonzero()[0, 0])
            assert rank < size
            assert logprob == pytest.approx(float((row[token] / row[order[:size]].sum()).log()), abs=TOLERANCE)
            kept_ranks.add(rank)
    assert len(kept_ranks) > 3


def test_too_long_a_request_is_refused(engine: Any) -> None:
    long = GenerationRequest(prompt_ids=tuple(range(2, 2 + PROMPT + 1)), seed=0)
    with pytest.raises(DataError, match="max_prompt_tokens"):
        engine.generate([long], SAMPLING)
    with pytest.raises(DataError, match="no tokens"):
        engine.generate([GenerationRequest(prompt_ids=(), seed=0)], SAMPLING)
    assert engine.generate([], SAMPLING) == []


# --- scoring given completions -------------------------------------------------------------------


def test_scores_of_given_tokens(engine: Any) -> None:
    generator = np.random.default_rng(0)
    prompts = [tuple(generator.integers(2, VOCABULARY, size=n).tolist()) for n in (1, 7, PROMPT, 3, 20)]
    completions = [
        tuple(generator.integers(1, VOCABULARY, size=n).tolist()) for n in (COMPLETION, 1, COMPLETION, 0, 9)
    ]
    scores = engine.score_tokens(prompts, completions)
    assert [len(row) for row in scores] == [len(row) for row in completions]
    for prompt, completion, row in zip(prompts, completions, scores, strict=True):
        if completion:
            np.testing.assert_allclose(
                row, reference_logprobs(small_model(0), prompt, completion), atol=TOLERANCE
            )
    assert engine.score_tokens([], []) == []
    with pytest.raises(DataError, match="max_completion_tokens"):
        engine.score_tokens([prompts[2]], [(2,) * (COMPLETION + 1)])


def test_scores_of_samples_are_their_sampling_logprobs(engine: Any) -> None:
    asked = requests(40)
    made = engine.generate(asked, SAMPLING)
    scores = engine.score_tokens([request.prompt_ids for request in asked], tokens(made))
    for row, generation in zip(scores, made, strict=True):
        np.testing.assert_allclose(row, generation.logprobs, atol=TOLERANCE)


# --- full weights --------------------------------------------------------------------------------


def test_new_weights_change_outputs_and_old_ones_restore_them(engine: Any) -> None:
    """After outputs were cached, so that a stale prefix cache or a stale tied head would show."""
    asked = requests(64)
    first = engine.generate(asked, SAMPLING)
    engine.load_weights(chunks(small_model(1)), 2)
    second = engine.generate(asked, SAMPLING)
    assert tokens(second) != tokens(first)
    assert_reference(small_model(1), asked, second)
    engine.load_weights(chunks(small_model(0)), 3)
    assert tokens(engine.generate(asked, SAMPLING)) == tokens(first)


def test_report_version_and_checksum(engine: Any) -> None:
    model = small_model(2)
    for size in (1, 5, 100):
        report = engine.load_weights(chunks(model, size), 17)
        assert (report.version, engine.version) == (17, 17)
        assert report.checksum == engine.checksum == checksum(dict(model.named_parameters()))
    assert report.seconds > 0
    engine.mark_synced(18)
    assert (engine.version, engine.checksum) == (18, None)


def test_tensors_are_taken_as_well_as_chunks(engine: Any) -> None:
    """And a tied head that is sent along, and another dtype than the engine's."""
    state = {name: tensor.to(torch.bfloat16) for name, tensor in small_model(1).state_dict().items()}
    assert "lm_head.weight" in state
    engine.load_weights([state], 2)
    rounded = small_model(1)
    rounded.load_state_dict(state)
    asked = requests(16)
    assert_reference(rounded, asked, engine.generate(asked, SAMPLING))


@pytest.mark.parametrize("fault", ["missing", "unknown", "shape", "twice"])
def test_weights_that_do_not_fit_leave_the_engine_stale(engine: Any, fault: str) -> None:
    asked = requests(8)
    before = tokens(engine.generate(asked, SAMPLING))
    named = chunks(small_model(1))
    bad = {
        "missing": named[:-1],
        # in the middle, where some layers are whole, one is begun and the others are untouched
        "unknown": [*named[:2], {"model.unheard.weight": torch.zeros(3)}, *named[2:]],
        "shape": [*named[:2], {name: tensor[:1] for name, tensor in named[2].items()}, *named[3:]],
        "twice": [*named[:2], *named],
    }[fault]
    with pytest.raises(WeightSyncError, match="policy version 2"):
        engine.load_weights(bad, 2)
    assert engine.version is None and engine.checksum is None
    with pytest.raises(StaleEngineError):
        engine.generate(asked, SAMPLING)
    engine.load_weights(chunks(small_model(0)), 3)
    assert tokens(engine.generate(asked, SAMPLING)) == before


def test_sleep_and_wake_do_nothing_on_a_cpu(engine: Any) -> None:
    asked = requests(4)
    before = engine.generate(asked, SAMPLING)
    engine.sleep()
    engine.wake()
    assert engine.generate(asked, SAMPLING) == before


def test_an_adapter_equals_its_merged_weights(lora_engine: Any) -> None:
    lora_engine.mark_synced(0)
    asked = requests(32)
    base = lora_engine.generate(asked, SAMPLING)
    tensors, config, merged = adapter(1)
    report = lora_engine.load_adapter(tensors, config, 1)
    assert report.checksum == lora_engine.checksum == checksum(tensors)
    assert report.version == lora_engine.version == 1
    made = lora_engine.generate(asked, SAMPLING)
    assert tokens(made) != tokens(base)
    assert_reference(merged, asked, made)
    scores = lora_engine.score_tokens([request.prompt_ids for request in asked], tokens(made))
    for row, request, generation in zip(scores, asked, made, strict=True):
        expected = reference_logprobs(merged, request.prompt_ids, generation.token_ids)
        np.testing.assert_allclose(row, expected, atol=TOLERANCE)


def test_adapter_versions_follow_each_other(lora_engine: Any) -> None:
    """Five syncs, the old adapter again at the end: no version answers with another's weights or cache."""
    asked, made = requests(16), {}
    for version, seed in enumerate([1, 2, 3, 4, 1]):
        tensors, config, merged = adapter(seed)
        lora_engine.load_adapter(tensors, config, version)
        made[version] = lora_engine.generate(asked, SAMPLING)
        assert_reference(merged, asked, made[version])
    assert tokens(made[4]) == tokens(made[0])
    if isinstance(lora_engine, EngineProcess):
        assert not lora_engine.adapter_folders(), "a folder is there while vLLM reads it, and no longer"


def test_a_smaller_rank_and_another_dtype_are_served(lora_engine: Any) -> None:
    tensors, config, merged = adapter(5, rank=RANK // 2)
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    lora_engine.load_adapter(halves, config, 1)
    asked = requests(8)
    made = lora_engine.generate(asked, SAMPLING)
    for request, generation in zip(asked, made, strict=True):
        expected = reference_logprobs(merged, request.prompt_ids, generation.token_ids)
        assert (
            np.abs(np.array(generation.logprobs) - expected).max() < 0.5
        )  # rounded to 8 bits, not other weights
    lora_engine.load_adapter(tensors, config, 2)
    assert_reference(merged, asked, lora_engine.generate(asked, SAMPLING))


def test_an_unfit_rank_is_refused_and_the_engine_goes_on(lora_engine: Any) -> None:
    tensors, config, merged = adapter(1)
    lora_engine.load_adapter(tensors, config, 1)
    large, large_config, _ = adapter(1, rank=2 * RANK)
    with pytest.raises(ModelError, match=f"model.policy.lora.rank={2 * RANK}"):
        lora_engine.load_adapter(large, large_config, 2)
    assert lora_engine.version == 1
    assert_reference(merged, requests(8), lora_engine.generate(requests(8), SAMPLING))


def test_an_adapter_of_other_modules_is_refused(lora_engine: Any) -> None:
    tensors, config, _ = adapter(1)
    strange = {name.replace("q_proj", "strange_proj"): tensor for name, tensor in tensors.items()}
    with pytest.raises(WeightSyncError, match="policy version 6"):
        lora_engine.load_adapter(strange, config, 6)
    assert lora_engine.version is None


def test_full_weights_replace_an_adapter(lora_engine: Any) -> None:
    tensors, config, _ = adapter(1)
    lora_engine.load_adapter(tensors, config, 1)
    asked = requests(16)
    lora_engine.load_weights(chunks(small_model(1)), 2)
    assert_reference(small_model(1), asked, lora_engine.generate(asked, SAMPLING))
    lora_engine.load_weights(chunks(small_model(0)), 3)
    lora_engine.load_adapter(tensors, config, 4)
    assert_reference(adapter(1)[2], asked, lora_engine.generate(asked, SAMPLING))


def test_a_full_weight_engine_takes_no_adapter(engine: Any) -> None:
    tensors, config, _ = adapter(1)
    with pytest.raises(ModelError, match=f"set model.policy.lora.rank={RANK}"):
        engine.load_adapter(tensors, config, 1)
    assert engine.version == 1


def test_a_closed_engine_serves_nothing(options: EngineOptions) -> None:
    """The Hugging Face engine; the fixture closes the vLLM engines and looks at their exit."""
    engine = HfEngine(options, decode)
    engine.mark_synced(1)
    engine.close()
    engine.close()
    with pytest.raises(StaleEngineError):
        engine.generate(requests(1), SAMPLING)
