"""Final artifacts: they load in transformers and peft, and the reward model reproduces its training scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from rairl_ray.algorithms.discriminator_losses import segment_sums
from rairl_ray.config.schema import Build, Lora, Model, RunConfig
from rairl_ray.data.batching import DiscriminatorTensors, discriminator_tensors
from rairl_ray.engines.artifacts import save_policy, save_reward_model
from rairl_ray.engines.heads import ImplicitModel, LogprobModel, ScalarModel
from rairl_ray.engines.models import load_causal_lm, load_token_classifier, resolve_model
from rairl_ray.engines.reward_heads import RewardModel
from rairl_ray.errors import ModelError
from tests.deepspeed_rank import make_samples
from tests.finished import trained_a_little

BUILD = Build(hidden_size=64, layers=2, heads=2, intermediate_size=96, max_length=64)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_model(Model(build=BUILD), role="policy", cache_dir=tmp_path_factory.mktemp("models"), seed=1)


def arguments(batch: DiscriminatorTensors) -> tuple[torch.Tensor, ...]:
    return batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids


@pytest.fixture(scope="module")
def batch() -> DiscriminatorTensors:
    return discriminator_tensors(make_samples(0), pad_id=0)


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("merged", [False, True])
def test_policy_loads_elsewhere(
    rank: int | None, merged: bool, path: str, batch: DiscriminatorTensors, tmp_path: Path
) -> None:
    model = Model(lora=Lora(rank=rank, dropout=0.1))
    module = LogprobModel(load_causal_lm(path, model))
    state = trained_a_little(module)
    folder = tmp_path / "final" / "policy"
    save_policy(
        folder, module, state, path, model.model_copy(update={"export": "merged" if merged else "adapter"})
    )
    ids, mask = batch.input_ids, batch.attention_mask
    with torch.no_grad():
        expected = module.eval().wrapped(input_ids=ids, attention_mask=mask).logits
        if rank is not None and not merged:
            base = AutoModelForCausalLM.from_pretrained(path)
            loaded: Any = PeftModel.from_pretrained(base, str(folder)).eval()
            config = json.loads((folder / "adapter_config.json").read_text())
            assert (config["r"], config["base_model_name_or_path"], config["task_type"]) == (
                4,
                path,
                "CAUSAL_LM",
            )
            assert not (folder / "model.safetensors").exists()
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        found = loaded(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (
        tokenizer.chat_template
        and tokenizer("1+2").input_ids == AutoTokenizer.from_pretrained(path)("1+2").input_ids
    )


def test_what_was_trained_on_a_4_bit_base_is_merged_into_the_published_one(
    path: str, batch: DiscriminatorTensors, tmp_path: Path
) -> None:
    """And without the GPU or the packages that training asked for."""
    plain = Model(lora=Lora(rank=4), dtype="bfloat16", export="merged")
    asked = plain.model_copy(update={"quantization": "nf4", "attention": "flash_attention_2"})
    module = LogprobModel(load_causal_lm(path, plain))
    state = trained_a_little(module)
    for name, model in {"plain": plain, "asked": asked}.items():
        save_policy(tmp_path / name, module, state, path, model)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("plain", "asked")]
    assert all(torch.equal(weights[0][name], tensor) for name, tensor in weights[1].items())
    implicit = ImplicitModel(load_causal_lm(path, plain), beta=0.3)
    config = reward_config("implicit", 4)
    models = config.model.model_copy(update={"discriminator": asked})
    save_reward_model(
        tmp_path / "reward",
        implicit,
        trained_a_little(implicit),
        path,
        config.model_copy(update={"model": models}),
        1,
    )
    scores = RewardModel.load(tmp_path / "reward").score(batch)
    assert torch.isfinite(scores).all() and scores.abs().max() > 0


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_weights_load(
    tied: bool, path: str, batch: DiscriminatorTensors, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(path, tie_word_embeddings=tied)
    if not tied:
        base.lm_head.weight = torch.nn.Parameter(base.lm_head.weight.detach() * 1.5)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "base")
    module = LogprobModel(load_causal_lm(str(tmp_path / "base"), Model()))
    state = trained_a_little(module)
    assert ("lm_head.weight" in state) is not tied
    save_policy(tmp_path / "policy", module, state, str(tmp_path / "base"), Model())
    loaded = LogprobModel(load_causal_lm(str(tmp_path / "policy"), Model()))
    torch.testing.assert_close(loaded(*arguments(batch)), module(*arguments(batch)), rtol=0, atol=1e-5)


def reward_config(head: str, rank: int | None, loss: str = "bce") -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"discriminator": {"lora": {"rank": rank}}},
            "discriminator": {"head": head, "beta": 0.3, "loss": {"type": loss}},
            "reward": {"density": {"type": "interval", "every": 4}, "temperature": 2.0, "clip": (-5.0, 5.0)},
        }
    )


def make_reward_module(config: RunConfig, path: str) -> Any:
    model = config.model.discriminator
    if config.discriminator.head == "implicit":
        return ImplicitModel(load_causal_lm(path, model), config.discriminator.beta)
    outputs = 2 if config.discriminator.loss.type == "airl" else 1
    return ScalarModel(load_token_classifier(path, model, outputs=outputs, seed=1))


@torch.no_grad()
def training_scores(module: Any, batch: DiscriminatorTensors) -> torch.Tensor:
    if isinstance(module, ImplicitModel):
        ratios = module(*arguments(batch))
        return segment_sums(ratios, batch.unit_start_index, batch.unit_end_index, batch.unit_mask)
    return module(batch.input_ids, batch.attention_mask, batch.unit_positions)[0]


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize(("head", "loss"), [("scalar", "bce"), ("scalar", "airl"), ("implicit", "bce")])
def test_reward_model_reproduces_training_scores(
    head: str, loss: str, rank: int | None, path: str, batch: DiscriminatorTensors, tmp_path: Path
) -> None:
    config = reward_config(head, rank, loss)
    module = make_reward_module(config, path)
    state = trained_a_little(module)
    folder = tmp_path / "reward_model"
    save_reward_model(folder, module, state, path, config, 7)
    moved = tmp_path / "elsewhere"
    folder.rename(moved)  # nothing in it may depend on where it lies
    reward = RewardModel.load(moved)
    expected, mask = training_scores(module, batch), batch.unit_mask
    assert expected[mask].abs().max() > 1e-2
    torch.testing.assert_close(reward.score(batch)[mask], expected[mask], rtol=0, atol=1e-5)
    assert (reward.settings.head, reward.settings.loss) == (head, loss)
    assert (reward.settings.temperature, reward.settings.clip) == (2.0, (-5.0, 5.0))
    assert reward.settings.density == {"type": "interval", "every": 4}
    assert reward.settings.discriminator_version == 7
    assert AutoTokenizer.from_pretrained(moved).chat_template
    if head == "scalar":
        plain = AutoModelForTokenClassification.from_pretrained(moved).eval()
        assert plain.config.num_labels == 1
        with torch.no_grad():
            logits = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[..., 0]
        torch.testing.assert_close(
            logits.gather(1, batch.unit_positions)[mask], expected[mask], rtol=0, atol=1e-5
        )
    else:
        plain = AutoModelForCausalLM.from_pretrained(moved)
        reference = AutoModelForCausalLM.from_pretrained(moved / reward.settings.reference)
        ratios = LogprobModel(plain)(*arguments(batch)) - LogprobModel(reference)(*arguments(batch))
        sums = segment_sums(0.3 * ratios.detach(), batch.unit_start_index, batch.unit_end_index, mask)
        torch.testing.assert_close(sums[mask], expected[mask], rtol=0, atol=1e-5)


def test_saving_twice_gives_the_same_scores(path: str, batch: DiscriminatorTensors, tmp_path: Path) -> None:
    """A reward model that becomes the start of another run keeps its head."""
    config = reward_config("scalar", None)
    module = make_reward_module(config, path)
    save_reward_model(tmp_path / "first", module, trained_a_little(module), path, config, 1)
    again = make_reward_module(config, str(tmp_path / "first"))
    torch.testing.assert_close(training_scores(again, batch), training_scores(module, batch))


def test_bfloat16_reward_model_names_its_dtype(path: str, batch: DiscriminatorTensors, tmp_path: Path) -> None:
    config = reward_config("implicit", 4)
    model = config.model.discriminator.model_copy(update={"dtype": "bfloat16"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"discriminator": model})})
    module = make_reward_module(config, path)
    save_reward_model(tmp_path / "reward", module, trained_a_little(module), path, config, 1)
    reward = RewardModel.load(tmp_path / "reward")
    assert reward.settings.dtype == "bfloat16"
    found, expected = reward.score(batch)[batch.unit_mask], training_scores(module, batch)[batch.unit_mask]
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.9


def test_a_changed_reference_is_refused(path: str, tmp_path: Path) -> None:
    config = reward_config("implicit", 4)
    module = make_reward_module(config, path)
    save_reward_model(tmp_path / "reward", module, trained_a_little(module), path, config, 1)
    file = tmp_path / "reward" / "reference" / "model.safetensors"
    weights = {name: tensor + 1e-3 for name, tensor in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(ModelError, match="other weights than in training"):
        RewardModel.load(tmp_path / "reward")


def test_a_plain_model_folder_is_no_reward_model(path: str) -> None:
    with pytest.raises(ModelError, match=r"reward\.json is missing"):
        RewardModel.load(Path(path))


def test_a_state_of_another_model_is_an_error(path: str, tmp_path: Path) -> None:
    module = LogprobModel(load_causal_lm(path, Model()))
    state = trained_a_little(module)
    state.pop("model.norm.weight")
    with pytest.raises(RuntimeError, match="do not fit"):
        save_policy(tmp_path / "policy", module, state, path, Model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_adapter_serves_in_vllm(path: str, batch: DiscriminatorTensors, tmp_path: Path) -> None:
    """The saved adapter folder, through vLLM's own LoRA loading, gives the module's log-probabilities."""
    import subprocess
    import sys

    model = Model(lora=Lora(rank=8))
    module = LogprobModel(load_causal_lm(path, model))
    save_policy(tmp_path / "policy", module, trained_a_little(module), path, model)
    code = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, enable_lora=True, max_lora_rank=8, max_model_len=64)
ids = json.loads(sys.argv[3])
out = llm.generate([{"prompt_token_ids": ids}], SamplingParams(max_tokens=6, temperature=0, logprobs=0),
                   use_tqdm=False, lora_request=LoRARequest("policy", 1, sys.argv[2]))[0].outputs[0]
print("RESULT" + json.dumps([list(out.token_ids), [l[t].logprob for l, t in zip(out.logprobs, out.token_ids)]]))
"""
    import os

    prompt = batch.input_ids[0, :6].tolist()
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", code, path, str(tmp_path / "policy"), json.dumps(prompt)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    lines = [line for line in done.stdout.splitlines() if "RESULT" in line]
    assert lines, done.stderr[-3000:]
    tokens, logprobs = json.loads(lines[0].split("RESULT")[1])
    ids = torch.tensor([prompt + tokens])
    positions = torch.arange(6, 6 + len(tokens))[None]
    expected = module.eval()(ids, torch.ones_like(ids), positions, torch.tensor([tokens]))[0]
    assert logprobs == pytest.approx(expected.tolist(), abs=2e-2)
