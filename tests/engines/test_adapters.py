"""Adapter folders as other trainers leave them, and everything that a merged model depends on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PromptTuningConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rairl_ray.config.schema import Lora, Model, RunConfig
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.rendering import Renderer
from rairl_ray.engines.artifacts import read_settings, save_policy, save_reward_model
from rairl_ray.engines.heads import ImplicitModel, LogprobModel
from rairl_ray.engines.models import load_causal_lm, resolve_model
from rairl_ray.engines.origin import Origin, content_id
from rairl_ray.engines.reward_heads import RewardModel
from rairl_ray.errors import ModelError

ATTENTION = "model.layers.0.self_attn.q_proj.weight"


def make_base(folder: Path, seed: int = 0) -> Path:
    tokenizer = character_tokenizer(64)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, *, added: int = 0, tokenizer: bool = True, **config: object) -> Path:
    """What `get_peft_model(...).save_pretrained` writes, moved away from zero."""
    model, own = AutoModelForCausalLM.from_pretrained(base), character_tokenizer(64)
    if added:
        own.add_tokens([f"<t{index}>" for index in range(added)])
        model.resize_token_embeddings(len(own))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **config))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(folder)
    if tokenizer:
        own.save_pretrained(folder)
    return folder


def merged(adapter: Path | str, cache: Path) -> str:
    return resolve_model(Model(path=str(adapter)), role="policy", cache_dir=cache, seed=0)


def weights(adapter: Path, cache: Path) -> torch.Tensor:
    return load_causal_lm(merged(adapter, cache), Model()).state_dict()[ATTENTION].clone()


def edit(adapter: Path, **fields: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def test_the_merged_model_follows_everything_that_it_depends_on(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", lora_alpha=8)
    first, cache = weights(adapter, tmp_path / "c"), tmp_path / "c"
    assert torch.equal(first, weights(adapter, cache)) and len(list(cache.glob("merged-*"))) == 1
    edit(adapter, lora_alpha=400)
    second = weights(adapter, cache)
    assert not torch.equal(second, first)
    make_base(base, seed=7)
    assert not torch.equal(weights(adapter, cache), second)
    before = merged(adapter, cache)
    (base / "added.jinja").write_text("a template")
    assert merged(adapter, cache) != before
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template += " "
    tokenizer.save_pretrained(adapter)
    assert AutoTokenizer.from_pretrained(merged(adapter, cache)).chat_template == tokenizer.chat_template


def test_without_a_tokenizer_the_bases_is_taken(tmp_path: Path) -> None:
    adapter = make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter", tokenizer=False)
    assert AutoTokenizer.from_pretrained(merged(adapter, tmp_path / "c")).chat_template


def test_added_tokens_come_along(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", added=3, modules_to_save=["embed_tokens", "lm_head"])
    folder = merged(adapter, tmp_path / "c")
    model, tokenizer = load_causal_lm(folder, Model()), AutoTokenizer.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == len(character_tokenizer(64)) + 3


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"base_model_name_or_path": "/gone/base"}, "no such model folder"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"r": 5}, "cannot be loaded"),
    ],
)
def test_what_cannot_be_merged_is_one_line(tmp_path: Path, fields: dict[str, object], why: str) -> None:
    adapter = make_adapter(make_base(tmp_path / "base"), tmp_path / "adapter")
    edit(adapter, **fields)
    with pytest.raises(ModelError, match=why) as refused:
        merged(adapter, tmp_path / "c")
    assert "\n" not in str(refused.value) and "adapter" in str(refused.value)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"adapter_model.safetensors is missing"):
        merged(adapter, tmp_path / "c")


def renamed(adapter: Path, change: Callable[[str], str | None]) -> None:
    file = adapter / "adapter_model.safetensors"
    kept = {new: tensor for name, tensor in load_file(file).items() if (new := change(name))}
    save_file(kept, file, {"format": "pt"})


def test_weights_that_peft_would_pass_over_are_one_line(tmp_path: Path) -> None:
    """It warns, and merges an adapter of which a part is as it was drawn."""
    base = make_base(tmp_path / "base")
    cut, foreign = (make_adapter(base, tmp_path / name) for name in ("cut", "foreign"))
    renamed(cut, lambda name: None if "lora_B" in name else name)
    renamed(foreign, lambda name: name.replace("model.layers", "model.language_model.layers"))
    for adapter, why in ((cut, "is missing"), (foreign, "has no place in")):
        with pytest.raises(ModelError, match=rf"{why}.* weights do not fit") as refused:
            merged(adapter, tmp_path / "c")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("beside", ["config.json", "trained tokens"])
def test_folders_of_other_trainers_load(tmp_path: Path, beside: str) -> None:
    base = make_base(tmp_path / "base")
    tokens = {"trainable_token_indices": [1, 2]} if beside == "trained tokens" else {}
    adapter = make_adapter(base, tmp_path / "adapter", **tokens)
    if beside == "config.json":
        shutil.copy(base / beside, adapter / beside)
    before = load_causal_lm(str(base), Model()).state_dict()[ATTENTION]
    assert not torch.equal(weights(adapter, tmp_path / "c"), before)


def test_what_is_no_adapter_of_a_language_model_is_one_line(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "soft")
    edit(make_adapter(base, tmp_path / "other"), task_type="SEQ_CLS")
    both = make_adapter(base, tmp_path / "both")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, both / name)
    (tmp_path / "run").mkdir()
    os.rename(make_adapter(base, tmp_path / "late"), tmp_path / "run" / "checkpoint-10")
    for folder, why in (
        ("soft", "peft_type=PROMPT_TUNING cannot be merged"), ("other", "task_type=SEQ_CLS"),
        ("both", "a model and an adapter"), ("run", "it may be .*checkpoint-10"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=why) as refused:
            merged(tmp_path / folder, tmp_path / "c")
        assert "\n" not in str(refused.value)


def test_an_adapter_of_ours_names_its_base_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path / "models" / "tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = Model(path="models/tiny", lora=Lora(rank=2))
    path = resolve_model(model, role="policy", cache_dir=tmp_path / "c", seed=0)
    module = LogprobModel(load_causal_lm(path, model))
    save_policy(tmp_path / "policy", module, get_peft_model_state_dict(module.wrapped), path, model)
    saved = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(tmp_path / "models" / "tiny") and saved["revision"] is None
    origin = Origin.read(tmp_path / "policy")
    assert origin is not None and origin.base == str(tmp_path / "models" / "tiny") and origin.revision is None
    assert origin.content == content_id(path) and origin.trust_remote_code is False
    assert origin.tokenizer == Renderer(AutoTokenizer.from_pretrained(path), "").fingerprint
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "merged-" in merged(tmp_path / "policy", tmp_path / "c")
    make_base(tmp_path / "models" / "tiny", seed=9)  # other weights at the same place
    with pytest.raises(ModelError, match="give back that base model") as refused:
        merged(tmp_path / "policy", tmp_path / "c")
    assert origin.content in str(refused.value) and "\n" not in str(refused.value)


def test_code_of_the_base_is_run_only_where_the_user_says_so(tmp_path: Path) -> None:
    """That it was once trusted is asked for again, not believed."""
    base = make_base(tmp_path / "base")
    trusting = Model(path=str(base), lora=Lora(rank=2), trust_remote_code=True)
    module = LogprobModel(load_causal_lm(str(base), trusting))
    save_policy(tmp_path / "policy", module, get_peft_model_state_dict(module.wrapped), str(base), trusting)
    with pytest.raises(ModelError, match=r"model\.policy\.trust_remote_code=true"):
        merged(tmp_path / "policy", tmp_path / "c")
    model = Model(path=str(tmp_path / "policy"), trust_remote_code=True)
    assert "merged-" in resolve_model(model, role="policy", cache_dir=tmp_path / "c", seed=0)


def test_a_relative_base_is_found_beside_the_adapter(tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "out" / "adapter")
    edit(adapter, base_model_name_or_path="../base")
    os.rename(tmp_path / "base", tmp_path / "out" / "base")
    assert "merged-" in merged(adapter, tmp_path / "c")


def test_the_revision_of_a_hub_base_travels_with_what_is_made_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub cache with two commits of one model; the adapter is trained on the one that main is not, or on
    main, which moves on later. A discriminator that shares the policy's path shares its revision."""
    main, pinned = "a" * 40, "b" * 40
    root = tmp_path / "hub" / "models--acme--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(main)
    make_base(root / "snapshots" / main, seed=1)
    make_base(root / "snapshots" / pinned, seed=2)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = Model(path="acme/tiny", revision=pinned, lora=Lora(rank=2))
    module = LogprobModel(load_causal_lm("acme/tiny", model))
    save_policy(tmp_path / "policy", module, get_peft_model_state_dict(module.wrapped), "acme/tiny", model)
    saved = json.loads((tmp_path / "policy" / "adapter_config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["revision"]) == ("acme/tiny", pinned)
    trained = load_causal_lm(str(root / "snapshots" / pinned), Model()).state_dict()[ATTENTION]
    assert torch.equal(weights(tmp_path / "policy", tmp_path / "c"), trained)
    newest = Model(path="acme/tiny", lora=Lora(rank=2))
    module = LogprobModel(load_causal_lm("acme/tiny", newest))
    (root / "refs" / "main").write_text(pinned)  # while it trains
    save_policy(tmp_path / "newest", module, get_peft_model_state_dict(module.wrapped), "acme/tiny", newest)
    first = load_causal_lm(str(root / "snapshots" / main), Model()).state_dict()[ATTENTION]
    assert torch.equal(weights(tmp_path / "newest", tmp_path / "c"), first)
    (root / "refs" / "main").write_text(main)
    config = RunConfig.model_validate(
        {
            "model": {"policy": {"path": "acme/tiny", "revision": pinned}},
            "discriminator": {"head": "implicit"},
        }
    )
    reward = ImplicitModel(load_causal_lm("acme/tiny", config.model.read_discriminator), 0.5)
    assert torch.equal(reward.wrapped.state_dict()[ATTENTION], trained)
    save_reward_model(tmp_path / "reward", reward, reward.wrapped.state_dict(), "acme/tiny", config, 1)
    settings, origin = read_settings(tmp_path / "reward"), Origin.read(tmp_path / "reward")
    assert settings is not None and origin is not None
    assert (settings.reference, settings.reference_revision) == ("acme/tiny", pinned)
    assert (origin.base, origin.revision, origin.content) == ("acme/tiny", pinned, f"acme/tiny@{pinned}")
    RewardModel.load(tmp_path / "reward")


@pytest.mark.parametrize("rank", [None, 2])
def test_generation_settings_that_transformers_will_not_write_do_not_fail_the_end_of_a_run(
    tmp_path: Path, rank: int | None
) -> None:
    base = make_base(tmp_path / "base")
    contradictory = {
        "do_sample": False,
        "temperature": 0.9,
        "top_p": 0.6,
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
    }
    (base / "generation_config.json").write_text(json.dumps(contradictory))
    model = Model(path=str(base), lora=Lora(rank=rank))
    module = LogprobModel(load_causal_lm(str(base), model))
    state = module.wrapped.state_dict() if rank is None else get_peft_model_state_dict(module.wrapped)
    save_policy(tmp_path / "policy", module, state, str(base), model)
    kept = Path(merged(tmp_path / "policy", tmp_path / "c")) / "generation_config.json"
    assert json.loads(kept.read_text())["eos_token_id"] == [1, 2]
