"""`doctor MODEL` and the round trip that a run makes first: each contract that a model breaks is one line."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rairl_ray.config.load import load_config
from rairl_ray.config.schema import Model
from rairl_ray.config.windows import window_of
from rairl_ray.data.completion_format import TAGS
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import make_task, task_rules
from rairl_ray.doctor import diagnose_model
from rairl_ray.errors import ConfigError, DataError, UserError
from rairl_ray.rewards.reading import TraceReader
from rairl_ray.trainer.prepare import check_discriminator_window, check_window, open_policy
from tests.engines.test_model_contract import CHATML, GEMMA, REASONER, byte_level, prefixed


def saved(folder: Path, tokenizer: PreTrainedTokenizerFast, **config: Any) -> Path:
    """A folder as `resolve_model` takes it; nobody opens its weights here."""
    tokenizer.save_pretrained(folder)
    rows = {"model_type": "llama", "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(rows | config))
    (folder / "model.safetensors").touch()
    return folder


def said(folder: Path, *overrides: str) -> tuple[int, str]:
    console = Console(file=StringIO(), width=300)
    code = diagnose_model(console, str(folder), [f"output_dir={folder.parent / 'runs'}", *overrides])
    return code, console.file.getvalue()


def row(text: str, what: str) -> str:
    (found,) = (line for line in text.splitlines() if f"│ {what} " in line)
    return found


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (
            byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            {
                "end tokens": "experts end in <|im_end|>",
                "prefilled": "nothing",
                "system prompt": "system's turn",
            },
        ),
        (
            byte_level("<eos>", "<start_of_turn>", "<end_of_turn>", template=GEMMA),
            {"end tokens": "<eos> <end_of_turn>; experts end in <end_of_turn>"},
        ),
        (
            byte_level("<|im_end|>", "<|im_start|>", *TAGS, template=REASONER.replace("OPENING", "<think>\n")),
            {
                "prefilled": r"'<think>\n'",
                "tags that are special tokens": "<think> </think> <answer> </answer>",
            },
        ),
        (
            byte_level("<|im_end|>", "<|im_start|>", template=REASONER.replace("OPENING", "<think></think>")),
            {"prefilled": "closes the reasoning before a completion begins"},
        ),
        (
            prefixed(),
            {"space before a text": "kept off completions", "the same as the model": "the same tokens"},
        ),
        (
            byte_level("<|im_end|>", template=CHATML),
            {"special tokens in a question": "stay text", "an expert's completion": "read back as it is"},
        ),
    ],
    ids=["ChatML", "Gemma", "R1", "no thinking", "Llama 2", "base"],
)
def test_what_a_model_needs_is_listed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, expected: dict[str, str]
) -> None:
    code, text = said(saved(tmp_path / "m", tokenizer), "data.task=gsm8k")
    assert code == 0 and "everything can be handled" in text
    for what, value in expected.items():
        assert value in next(line for line in text.splitlines() if f"│ {what}" in line)
    assert "512 (max_position_embeddings)" in row(text, "window")


def test_a_padding_token_outside_of_the_embedding_is_noted_and_not_used(tmp_path: Path) -> None:
    tokenizer = byte_level("<|im_end|>", "<|im_start|>")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    code, text = said(saved(tmp_path / "m", tokenizer, vocab_size=rows))
    assert code == 0 and f"{rows}, lies outside of the embedding" in row(text, "padding")


def broken(kind: str) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    if kind == "embedding":
        tokenizer = byte_level("<|im_end|>", "<|im_start|>")
        tokenizer.add_special_tokens({"eos_token": "<|late|>"})
        tokenizer.chat_template = CHATML.replace("<|im_end|>", "<|late|>")
        return tokenizer, {"vocab_size": len(tokenizer) - 1}
    if kind == "unknown letters":
        return byte_level_without("k"), {}
    return byte_level("<|im_end|>", "<|im_start|>", template=CHATML.replace("{{ m['content'] }}", "")), {}


def byte_level_without(letter: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_level("<|im_end|>", "<|im_start|>")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Replace", "pattern": {"String": letter}, "content": ""}
    return PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(backend)),
        eos_token="<|im_end|>", chat_template=CHATML,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("embedding", "its embedding has 258 rows and none for <|late|>; take the model's own tokenizer"),
        ("unknown letters", "reads an expert's completion back as '<thin>"),
        ("template", "its chat template drops or alters the question; set model.policy.chat_template"),
    ],
)
def test_what_cannot_be_handled_is_one_line_in_doctor_and_before_a_run(
    tmp_path: Path, kind: str, line: str
) -> None:
    tokenizer, config = broken(kind)
    folder = saved(tmp_path / "m", tokenizer, **config)
    code, text = said(folder)
    (told,) = (found for found in text.splitlines() if found.startswith("cannot be handled: "))
    assert code == 1 and line in told and "everything can be handled" not in text
    run = load_config(None, [f"model.policy.path={folder}", f"output_dir={tmp_path}"])
    with pytest.raises(UserError) as refused:
        open_policy(run, task_rules(run.data))
    assert line in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "key", ["n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_position_embeddings"]
)
def test_a_window_is_found_under_any_name(tmp_path: Path, key: str) -> None:
    folder = saved(tmp_path / "m", byte_level("<|im_end|>", "<|im_start|>"))
    file = folder / "config.json"
    values = json.loads(file.read_text()) | {"max_length": 20}
    del values["max_position_embeddings"]
    values[key] = 96
    file.write_text(json.dumps(values))
    assert window_of(values) == window_of({"vocab_size": 9, "text_config": values}) == (key, 96)
    lengths = ["data.max_prompt_tokens=50", "rollout.max_completion_tokens=47"]
    code, text = said(folder, *lengths)
    assert code == 1 and f"96 ({key})" in row(text, "window")
    assert "window of 96 tokens" in text and "= 97; lower one of the two" in text
    assert said(folder, lengths[0], "rollout.max_completion_tokens=46")[0] == 0
    run = load_config(None, lengths)
    with pytest.raises(UserError, match=rf"window of 96 tokens \({key}\)"):
        check_window(run, str(folder), Model(), "model.policy")


def test_the_discriminators_own_window_holds_samples_and_experts_as_it_reads_them(tmp_path: Path) -> None:
    """Its positions may be fewer than the policy's, and its tokens more."""
    folder = saved(tmp_path / "m", byte_level("<|im_end|>", "<|im_start|>"))
    file = folder / "config.json"
    values = json.loads(file.read_text())
    del values["max_position_embeddings"]
    config = load_config(
        None,
        [f"model.discriminator.path={folder}", "data.max_prompt_tokens=50", "rollout.max_completion_tokens=40"],
    )
    task = make_task(config.data)
    renderer = Renderer(load_tokenizer(str(folder), Model()), "Think aloud. " * 8)
    reader = TraceReader(renderer, config.reward.density, "another tokenizer's")
    for positions, error in ((80, ConfigError), (100, DataError), (1000, None)):
        file.write_text(json.dumps(values | {"n_positions": positions}))
        if error is None:
            check_discriminator_window(config, task, str(folder), reader, None)
            continue
        with pytest.raises(
            error, match=rf"model\.discriminator has a window of {positions} tokens \(n_positions\)"
        ):
            check_discriminator_window(config, task, str(folder), reader, None)


def test_a_configuration_that_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", byte_level("<|im_end|>", "<|im_start|>"), max_position_embeddings="many")
    code, text = said(folder)
    (told,) = (line for line in text.splitlines() if line.startswith("cannot be handled: "))
    assert code == 1 and "no tokenizer could be loaded" in told and "max_position_embeddings" in told


def test_a_model_without_a_window_has_none() -> None:
    assert window_of({"model_type": "mamba", "max_length": 20, "seq_length": None, "n_ctx": True}) is None


def test_an_experiments_own_discriminator_is_looked_at_too(tmp_path: Path) -> None:
    good = saved(tmp_path / "good", byte_level("<|im_end|>", "<|im_start|>"))
    bad = saved(tmp_path / "bad", byte_level_without("k"))
    file = tmp_path / "e.yaml"
    file.write_text(
        f"model: {{policy: {{path: {good}}}, discriminator: {{path: {bad}}}}}\n"
        "data: {max_prompt_tokens: 100}\nrollout: {max_completion_tokens: 100}\nplacement: {device: cpu}\n"
    )
    code, text = said(file)
    assert code == 1 and f"policy: {good}" in text and f"discriminator: {bad}" in text
    assert text.count("cannot be handled: ") == 1 and f"cannot be handled: {bad}: " in text
