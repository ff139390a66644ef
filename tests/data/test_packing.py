"""Packed rows against padded ones: the same losses, values and gradients, each prompt read once."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rairl_ray.actors.learner import shard
from rairl_ray.data import packing as packing_module
from rairl_ray.data.batching import KEYS_PER_TOKEN, DiscriminatorTensors, discriminator_tensors, shares
from rairl_ray.data.packing import pack
from rairl_ray.engines.heads import ImplicitModel, LogprobModel, ScalarModel
from rairl_ray.types import DiscriminatorSample

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "attn_implementation": "sdpa",
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral in a window": MistralConfig(**SIZES, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2 half in a window": Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}
HEADS = ("policy", "implicit", "scalar")


def exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    """What a model's own norm computes in float32 whatever the model's type."""
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def module_of(kind: str, head: str, *, lora: bool = False, checkpointing: bool = False) -> Any:
    """A head over a model with weights so large that every token matters; float64."""
    torch.manual_seed(1)
    config = type(CONFIGS[kind])(**CONFIGS[kind].to_dict(), attn_implementation="sdpa")
    if head == "scalar":
        config.num_labels, config.classifier_dropout = 2, 0.0
        model = AutoModelForTokenClassification.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for norm in (part for part in model.modules() if type(part).__name__.endswith("RMSNorm")):
        norm.forward = partial(exact_norm, norm)
    model.train().double()
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"]))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.normal_(parameter.data, std=0.3)
        model.double()
    if head == "scalar":
        return ScalarModel(model)
    if head == "policy":
        return LogprobModel(model)
    module = ImplicitModel(model, 0.5)
    if not lora:  # else a log-ratio of a model to itself
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return module


def outputs(module: Any, batch: DiscriminatorTensors) -> Tensor:
    """All that a head answers, with padding at 0."""
    if isinstance(module, ScalarModel):
        before = batch.prompt_lengths[:, None] + batch.unit_start_index - 1
        values, shaping, _ = module(
            batch.input_ids, batch.attention_mask, batch.unit_positions, before, packing=batch.packing
        )
        assert shaping is not None
        return torch.stack([values, shaping]) * batch.unit_mask
    rows = (batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids)
    return module(*rows, packing=batch.packing) * batch.completion_mask


def both(module: Any, samples: list[DiscriminatorSample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Outputs and gradients of one loss over padded rows, then over packed ones."""
    found, gradients = [], []
    for packed in (False, True):
        module.zero_grad()
        answer = outputs(module, discriminator_tensors(samples, 0, packed=packed))
        (answer.double() * torch.linspace(-1, 1, answer.numel()).view(answer.shape)).sin().sum().backward()
        found.append(answer.detach())
        gradients.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    return found, gradients


@st.composite
def groups(draw: st.DrawFn) -> list[DiscriminatorSample]:
    """Traces of few prompts in any order: groups of any size, prompts that begin alike, empty completions."""
    token = st.integers(1, 39)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=9).map(tuple), min_size=1, max_size=4))
    prompts += [prompts[0] + (3,)]
    chosen = draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=9))
    return [sample(p, draw(st.lists(token, min_size=1, max_size=12).map(tuple))) for p in chosen]


def sample(prompt: tuple[int, ...], completion: tuple[int, ...]) -> DiscriminatorSample:
    ends = np.unique(np.array([len(completion) // 2, len(completion) - 1]))
    starts = np.concatenate([[0], ends[:-1] + 1])
    return DiscriminatorSample(
        prompt_ids=prompt, completion_ids=completion, unit_tokens=ends, unit_starts=starts, positive=True,
        pair_id=0,
    )  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
def test_values_and_gradients_equal_padded_rows(kind: str, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(kind, head)
    assert module.padded_because is None
    monkeypatch.setattr(packing_module, "SHORTEST", 2)

    @settings(max_examples=12, deadline=None)
    @given(groups())
    def check(samples: list[DiscriminatorSample]) -> None:
        found, gradients = both(module, samples)
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
        assert gradients[0].keys() == gradients[1].keys() and gradients[0]
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)

    check()


@pytest.mark.parametrize("head", HEADS)
def test_adapters_and_recomputed_layers_too(head: str) -> None:
    module = module_of("mistral in a window", head, lora=True, checkpointing=True)
    token = iter(range(1, 1000))
    prompts = [tuple(next(token) % 39 + 1 for _ in range(12)) for _ in range(2)]
    samples = [sample(prompts[i % 2], tuple(next(token) % 39 + 1 for _ in range(3 + i))) for i in range(6)]
    found, gradients = both(module, samples)
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
    assert any("lora_A" in name for name in gradients[0]) and found[0].abs().max() > 0.01
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_float32_differs_by_rounding(kind: str) -> None:
    module = module_of(kind, "policy").float()
    samples = [sample(tuple(range(5, 15)), tuple(range(i + 1, i + 9))) for i in range(5)]
    found, gradients = both(module, samples)
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        assert float((gradients[1][name] - gradient).abs().max()) < 1e-4 * largest


# --- which tokens are there, and what each sees -----------------------------------------------------


@pytest.mark.parametrize("head", ["policy", "scalar"])
def test_several_threads_add_gradients_up_in_one_order(head: str) -> None:
    """Many traces read the prompt's last position; an exact resume needs the same bits each time."""
    random = np.random.default_rng(0)
    prompt = tuple(int(i) for i in random.integers(1, 20, 6))
    samples = [sample(prompt, tuple(int(i) for i in random.integers(1, 20, 12))) for _ in range(500)]
    module = module_of("llama", head).float()
    batch = discriminator_tensors(samples, 0, packed=True)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = []
        for _ in range(12):
            module.zero_grad()
            outputs(module, batch).sin().sum().backward()
            found.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    finally:
        torch.set_num_threads(before)
    for gradients in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], gradients, strict=True))


@given(groups(), st.integers(1, 9))
def test_a_token_sees_its_own_trace_so_far_and_what_is_shared_is_there_once(
    samples: list[DiscriminatorSample], shortest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing_module, "SHORTEST", shortest)
        packing = pack([s.prompt_ids + s.completion_ids for s in samples])
    expected = len(packing.source)
    traces = [s.prompt_ids + s.completion_ids for s in samples]
    beginnings = len({trace[:end] for trace in traces for end in range(1, len(trace) + 1)})
    assert expected == beginnings if shortest == 1 else beginnings <= expected <= sum(map(len, traces))
    assert len(packing.position_ids) == len(packing.order) == expected
    answering = torch.cat([stretches.queries.flatten() for stretches in packing.stretches])
    assert answering[packing.order].tolist() == list(range(expected))
    visible = []
    for stretches in packing.stretches:
        mask = stretches.mask(None, torch.float32)
        if mask is None:  # plain causal attention over the stretch itself
            assert torch.equal(stretches.queries, stretches.keys)
            mask = torch.full((1, 1, *[stretches.queries.shape[1]] * 2), float("-inf")).triu(1)
        for keys, rows in zip(stretches.keys, mask.expand(len(stretches.keys), -1, -1, -1)[:, 0], strict=True):
            visible += [set(keys[row == 0].tolist()) for row in rows]
    sees = [visible[place] for place in packing.order]
    ids = discriminator_tensors(samples, 0).input_ids
    for row, each in enumerate(samples):
        places = packing.place[row].tolist()
        for position in range(len(each.prompt_ids) + len(each.completion_ids)):
            place = places[position]
            assert ids.flatten()[packing.source[place]] == ids[row, position]
            assert int(packing.position_ids[place]) == position
            assert sees[place] == set(places[: position + 1])


def test_a_window_counts_positions_not_places() -> None:
    """The second completion stands far from its prompt in the packed row, and sees it all the same."""
    prompt = tuple(range(1, 11))
    packing = pack([(*prompt, 20, 20, 20, 20), (*prompt, 21, 21)])
    leaf = next(s for s in packing.stretches if s.queries[0, 0] == 14)
    allowed = leaf.mask(3, torch.float32)
    assert allowed is not None
    seen = [set(leaf.keys[0, row == 0].tolist()) for row in allowed[0, 0]]
    assert seen == [{8, 9, 14}, {9, 14, 15}]


def test_system_prompts_and_experts_up_to_an_edit_are_there_once() -> None:
    system, one, two = tuple(range(100, 130)), (*range(1, 20), 5), (*range(1, 20), 6)
    expert, copy = tuple(range(40, 60)), (*range(40, 55), 1, 2, 3)
    traces = [system + question + answer for question in (one, two) for answer in (expert, copy, (7, 8, 9))]
    # the one token by which a question ends otherwise is no branch of its own
    assert len(pack(traces).source) == 30 + 19 + 2 * ((1 + 15 + 5 + 3) + (1 + 3))


# --- which traces go together -----------------------------------------------------------------------


def cost(samples: list[DiscriminatorSample], rows: list[int]) -> float:
    prompts = {samples[row].prompt_ids for row in rows}
    completions = sum(len(samples[row].completion_ids) for row in rows)
    keys = completions + sum(len(samples[row].prompt_ids) for row in rows)
    return max(sum(map(len, prompts)) + completions, keys / KEYS_PER_TOKEN)


@given(groups(), st.integers(1, 4), st.integers(1, 60))
def test_passes_hold_every_trace_once_and_no_more_than_the_budget(
    samples: list[DiscriminatorSample], ranks: int, tokens: int
) -> None:
    plan = shares(samples, ranks, tokens, packed=True)
    assert plan == shares(samples, ranks, tokens, packed=True) and len(plan) == ranks
    assert sorted(row for share in plan for rows in share for row in rows) == list(range(len(samples)))
    assert all(len(rows) == 1 or cost(samples, rows) <= tokens for share in plan for rows in share)
    whole = shares(samples, ranks, tokens, packed=True, groups=[hash(s.prompt_ids) for s in samples])
    homes = {s.prompt_ids: set() for s in samples}
    for rank, share in enumerate(whole):
        for number, rows in enumerate(share):
            for row in rows:
                homes[samples[row].prompt_ids].add((rank, number))
    assert all(len(home) == 1 for home in homes.values())
    passes = shard(samples, ranks, tokens, packed=True)
    assert len({len(share) for share in passes}) == 1 and passes[0]


def test_a_prompt_is_read_once_unless_ranks_would_wait() -> None:
    def traces(prompts: int, each: int) -> list[DiscriminatorSample]:
        return [sample((p + 1,) * 250, (1,) * 62) for p in range(prompts) for _ in range(each)]

    assert shares(traces(4, 4), 1, 10_000, packed=True) == [[list(range(16))]]
    assert shares(traces(4, 4), 2, 10_000, packed=True) == [[list(range(4)) + list(range(8, 12))],
                                                      [list(range(4, 8)) + list(range(12, 16))]]  # fmt: skip
    assert [len(share[0]) for share in shares(traces(1, 16), 4, 10_000, packed=True)] == [4, 4, 4, 4]
    over = shares(traces(1, 16), 1, 700, packed=True)[0]
    assert [cost(traces(1, 16), rows) for rows in over] == [622, 560, 560]


# --- what cannot be served ---------------------------------------------------------------------------


def test_other_models_and_attentions_say_why_they_read_padded_rows() -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "attn_implementation"}
    eager = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="eager")
    assert "attention eager reads padded rows" in (LogprobModel(eager).padded_because or "")
    assert eager.config._attn_implementation == "eager"
    gemma = AutoModelForTokenClassification.from_config(Gemma2Config(**sizes, head_dim=4))
    assert "models of type gemma2 read padded rows" in (ScalarModel(gemma).padded_because or "")
    stretched = LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    module = LogprobModel(AutoModelForCausalLM.from_config(stretched))
    assert "dynamic positions depend on a row's length" in (module.padded_because or "")


def test_a_penalty_on_embeddings_needs_padded_rows() -> None:
    module = module_of("llama", "scalar")
    batch = discriminator_tensors([sample((1, 2), (3, 4))] * 2, 0, packed=True)
    with pytest.raises(ValueError, match="padded rows"):
        module(
            batch.input_ids, batch.attention_mask, batch.unit_positions,
            penalty=lambda values, embeddings: values.sum(), packing=batch.packing,
        )  # fmt: skip


def test_a_saved_model_does_not_name_our_attention(tmp_path: Path) -> None:
    module = module_of("llama", "policy")
    module.wrapped.save_pretrained(tmp_path)
    assert "rairl" not in (tmp_path / "config.json").read_text()
