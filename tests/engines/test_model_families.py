"""Tokenizers and templates in the kinds of published families: each listed hazard for each of them."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from rairl_ray.config.schema import Model
from rairl_ray.data.grading import grade_answer
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.errors import ModelError
from rairl_ray.trainer.contract import check_contract, contract
from rairl_ray.types import Prompt, Trace
from tests.engines.test_model_contract import CHATML, EXPERT, GEMMA, REASONER, byte_level, prefixed

LLAMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday is {{ strftime_now('%d %b %Y') }}\n\n"
    "{{ said }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
PHI_3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
MISTRAL = (
    f"{{{{ bos_token }}}}{STRICT}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA_STRICT = STRICT.replace("{% for", "{{ bos_token }}{% for", 1) + (
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def phi_3() -> PreTrainedTokenizerFast:
    """A sentencepiece tokenizer whose turn tokens swallow the white space behind them."""
    tokenizer = prefixed()
    turns = [
        AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("system", "user", "assistant", "end")
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    tokenizer.chat_template = PHI_3
    return tokenizer


def mistral() -> PreTrainedTokenizerFast:
    tokenizer = prefixed()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = MISTRAL
    return tokenizer


@dataclass(frozen=True)
class Family:
    make: Callable[[], PreTrainedTokenizerFast]
    end: str
    system: str
    """In whose turn the system prompt stands."""
    prefilled: str = ""
    spaced: bool = False


FAMILIES = {
    "Llama 2": Family(prefixed, "</s>", "system", spaced=True),
    "Llama 3": Family(
        lambda: byte_level(
            "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", template=LLAMA_3
        ),
        "<|eot_id|>",
        "system",
    ),
    "Qwen 2.5": Family(
        lambda: byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", "system"
    ),
    "Qwen 3": Family(
        lambda: byte_level("<|im_end|>", "<|im_start|>", "<think>", "</think>", template=QWEN_3),
        "<|im_end|>",
        "system",
    ),
    "Gemma": Family(
        lambda: byte_level("<eos>", "<start_of_turn>", "<end_of_turn>", template=GEMMA_STRICT),
        "<end_of_turn>",
        "user",
    ),
    "Gemma, lenient": Family(
        lambda: byte_level("<eos>", "<start_of_turn>", "<end_of_turn>", template=GEMMA),
        "<end_of_turn>",
        "system",
    ),
    "Phi 3": Family(phi_3, "<|end|>", "system"),
    "Mistral": Family(mistral, "</s>", "user", spaced=True),
    "R1 distilled": Family(
        lambda: byte_level("<|im_end|>", "<|im_start|>", template=REASONER.replace("OPENING", "<think>\n")),
        "<|im_end|>",
        "system",
        prefilled="<think>\n",
    ),
    "GPT-2": Family(
        lambda: byte_level("<|endoftext|>", template=CHATML.replace("<|im_end|>", "")),
        "<|endoftext|>",
        "system",
    ),
}
PROMPT = Prompt(id="q", question="How many are 9 times 2?", answer="18")


@pytest.fixture(params=FAMILIES, ids=str)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def renderer(family: Family) -> Renderer:
    return Renderer(family.make(), "Be brief.")


def expert(renderer: Renderer, text: str = EXPERT) -> tuple[tuple[int, ...], tuple[int, ...]]:
    tokens = renderer.tokenize(Trace(prompt=PROMPT, text=text), same_tokenizer=True)
    return tokens.prompt_ids, tokens.completion_ids


def test_the_round_trip_finds_what_the_family_has(family: Family, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    check_contract("model", renderer, {"vocab_size": len(tokenizer)}, ())
    facts = {fact.what: fact for fact in contract(renderer, {"vocab_size": len(tokenizer)}, ())}
    assert facts["an expert's completion"].value.endswith("read back as it is")
    assert facts["the same as the model writes it"].value == "the same tokens"
    assert (renderer.system_role, renderer.prefilled, renderer.adds_space) == (
        family.system, family.prefilled, family.spaced,
    )  # fmt: skip
    assert f"experts end in {family.end}" in facts["end tokens"].value


def test_prompts_hold_question_and_system_prompt_once(renderer: Renderer) -> None:
    text = renderer.prompt_text(PROMPT)
    assert text.count(PROMPT.question) == 1 and text.count("Be brief.") == 1
    assert renderer.tokenizer.decode(renderer.prompt_ids(PROMPT)).count("Be brief.") == 1


def test_experts_end_as_the_model_does_and_sampling_stops_there(family: Family, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    _, ids = expert(renderer)
    assert tokenizer.convert_ids_to_tokens(ids[-1]) == family.end
    assert {ids[-1], tokenizer.eos_token_id} <= set(renderer.stop_ids)
    assert not set(ids[:-1]) & set(renderer.stop_ids)


def test_completions_read_back_and_are_graded(renderer: Renderer) -> None:
    _, ids = expert(renderer)
    text = renderer.completion_text(ids)
    grade = grade_answer(text, "18", "number")
    assert text == EXPERT and grade.correct and grade.format_ok


def test_nothing_in_a_text_becomes_a_special_token(family: Family, renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    special = [token for token in tokenizer.all_special_tokens if token not in renderer.special_tags]
    said = f"Is {' or '.join(special)} a token?"
    plain = renderer.prompt_ids(Prompt(id="q", question="Is it a token?"))
    hostile = renderer.prompt_ids(Prompt(id="q", question=said))
    marks = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert [i for i in hostile if i in marks] == [i for i in plain if i in marks]
    _, ids = expert(renderer, EXPERT.replace("9*2=18", said))
    assert renderer.completion_text(ids) == EXPERT.replace("9*2=18", said)
    assert ids.count(renderer.eos_id) == 1


def test_every_id_lies_within_the_embedding(renderer: Renderer) -> None:
    prompt, ids = expert(renderer)
    assert max(*prompt, *ids, renderer.pad_id, *renderer.stop_ids) < len(renderer.tokenizer)


def test_no_prompt_depends_on_the_day(
    family: Family, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls(2031, 1, 2)

    before = renderer.prompt_ids(PROMPT)
    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    again = Renderer(family.make(), "Be brief.")
    assert again.prompt_ids(PROMPT) == before and again.fingerprint == renderer.fingerprint


def test_a_saved_copy_reads_the_same(renderer: Renderer, tmp_path: Path) -> None:
    renderer.tokenizer.save_pretrained(tmp_path)
    copy = Renderer(load_tokenizer(str(tmp_path), Model()), "Be brief.")
    assert expert(copy) == expert(renderer) and copy.stop_ids == renderer.stop_ids


def test_a_base_model_without_a_template_is_one_line(tmp_path: Path) -> None:
    tokenizer = byte_level("<|endoftext|>", template=None)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no chat template; set model\.policy\.chat_template=FILE"):
        load_tokenizer(str(tmp_path), Model())
