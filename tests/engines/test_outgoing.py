"""What leaves a learner for its engines: adapters merged into the stored base, against PEFT's own function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rairl_ray.config.schema import Lora, Model
from rairl_ray.engines.heads import LogprobModel
from rairl_ray.engines.hf_engine import HfEngine
from rairl_ray.engines.models import load_causal_lm
from rairl_ray.engines.outgoing import merge, merged, trained
from rairl_ray.engines.rollout_engine import EngineOptions, WeightSyncError
from rairl_ray.engines.weights import checksum
from rairl_ray.errors import ModelError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two blocks with biases on q, k and v, and a head that is tied."""
    folder = tmp_path_factory.mktemp("qwen2")
    config = Qwen2Config(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return str(folder)


def learner(path: str, dtype: str = "float32", **lora: Any) -> LogprobModel:
    """As a policy rank holds it, some updates on: B does not start at zero."""
    model = Model.model_validate({"dtype": dtype, "lora": {"rank": 4, **lora}})
    module = LogprobModel(load_causal_lm(path, model))
    move(module, seed=1)
    return module


def move(module: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def sent(module: Any) -> dict[str, torch.Tensor]:
    return {item.name: item.tensor("cpu") for item in merged(module)}


@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_sync_is_the_base_with_the_adapter_in_it(path: str, alpha: float | None) -> None:
    module = learner(path, alpha=alpha)
    found = sent(module)
    base = dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
    assert set(found) == {name for name in base if "_proj." in name}
    expected = dict(module.wrapped.merge_and_unload().named_parameters())
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=1e-6)
        assert torch.equal(tensor, base[name]) == name.endswith("bias")
    shapes = [(item.name, item.dtype, item.shape) for item in merged(learner(path))]
    assert shapes == [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]


def test_bfloat16_is_rounded_once(path: str) -> None:
    """Of the sum: rounding the product first would lose a bit and more of it."""
    module = learner(path, dtype="bfloat16")
    layer: Any = module.wrapped.base_model.model.model.layers[0].mlp.up_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    product = 2 * (b.double() @ a.double())
    exact = layer.base_layer.weight.double() + product

    def nearest(tensor: torch.Tensor) -> bool:
        return bool(((tensor.double() - exact).abs() <= 2**-8 * exact.abs() * (1 + 1e-4)).all())

    found = sent(module)["model.layers.0.mlp.up_proj.weight"]
    assert found.dtype == torch.bfloat16 and nearest(found)
    assert not nearest(layer.base_layer.weight + product.bfloat16())


def test_the_stored_base_is_never_drifted(path: str) -> None:
    """One adapter sent 50 times, others between, is the same bits each time; so is what the learner holds."""
    module = learner(path)
    held = checksum(list(module.named_parameters()))
    first = checksum(sent(module))
    others = set()
    for number in range(50):
        move(module, seed=number + 2)
        others.add(checksum(sent(module)))
        move(module, seed=1)
        assert checksum(sent(module)) == first
    assert len(others | {first}) == 51
    assert checksum(list(module.named_parameters())) == held


def test_layers_that_an_engine_may_hold_as_one_go_together(path: str) -> None:
    """vLLM takes q, k and v as one matrix: k goes along as it is, and nothing of the other blocks does."""
    module = learner(path, target_modules=("q_proj", "v_proj"))
    found = sent(module)
    assert {name.split(".")[3] for name in found} == {"self_attn"}
    assert {name.split(".")[4] for name in found} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    changed = {name.split(".")[4] for name, tensor in found.items() if not torch.equal(tensor, base[name])}
    assert changed == {"q_proj", "v_proj"}


def test_what_cannot_be_merged_is_refused_in_one_line(path: str) -> None:
    module = learner(path, target_modules=("q_proj", "embed_tokens"))
    with pytest.raises(ModelError, match=r"embed_tokens.*target_modules.*rollout\.adapter=served") as error:
        merged(module)
    assert "\n" not in str(error.value)


def test_without_an_adapter_everything_that_is_trained_goes(path: str) -> None:
    module = LogprobModel(load_causal_lm(path, Model(lora=Lora())))
    named = {item.name: item.tensor("cpu") for item in trained(module)}
    assert checksum(named) == checksum({n.removeprefix("wrapped."): p for n, p in module.named_parameters()})
    with torch.no_grad():
        module.wrapped.model.norm.weight.add_(1)
    assert not torch.equal(named["model.norm.weight"], module.wrapped.model.norm.weight), "a copy, not a view"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_writes_nothing(dtype: torch.dtype) -> None:
    weight, down, up = (
        torch.ones(3, 5, dtype=dtype),
        torch.ones(2, 5, dtype=dtype),
        torch.ones(3, 2, dtype=dtype),
    )
    assert torch.equal(merge(weight, down, up, 0.5), torch.full((3, 5), 2.0, dtype=dtype))
    assert weight.eq(1).all() and down.eq(1).all() and up.eq(1).all()


def test_the_transformers_engine_serves_it_and_keeps_what_was_not_sent(path: str) -> None:
    options = EngineOptions(
        model_path=path, eos_id=1, max_prompt_tokens=8, max_completion_tokens=8, partial_syncs=True
    )
    engine = HfEngine(options, lambda ids: "")
    prompt, completion = (3, 4, 5), (6, 7, 8, 9)
    rows = torch.tensor([[*prompt, *completion]])
    before = None
    for seed in (1, 2, 1):
        module = learner(path)
        move(module, seed)
        items = merged(module)
        parts = [{item.name: item.tensor("cpu") for item in part} for part in (items[:3], items[3:])]
        report = engine.load_weights(parts, seed)
        assert report.checksum == checksum({**parts[0], **parts[1]})
        with torch.no_grad():
            logits = module.wrapped(input_ids=rows).logits[0, 2:-1]
        expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None])[:, 0]
        scores = engine.score_tokens([prompt], [completion])[0]
        torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-5)
        assert scores != before
        before = scores
    with pytest.raises(WeightSyncError, match="unknown"):
        engine.load_weights([{"model.layers.9.mlp.up_proj.weight": torch.zeros(3)}], 4)
    assert engine.version is None
