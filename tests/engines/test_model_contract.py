"""Tokenizers and chat templates as published models have them: where turns end, which tags are tokens, what a
template wants, and that no prompt depends on the day. Small tokenizers in the kinds of the published ones."""

from __future__ import annotations

import datetime
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from rairl_ray.algorithms.density import unit_tokens
from rairl_ray.config.schema import Data, Density, Eval, Model
from rairl_ray.data.completion_format import TAGS, format_completion, is_well_formed
from rairl_ray.data.grading import grade_answer
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import task_rules
from rairl_ray.data.verifiable_rewards import verifiable_rewards
from rairl_ray.engines.hf_engine import HfEngine
from rairl_ray.engines.rollout_engine import EngineOptions, GenerationRequest, SamplingSettings
from rairl_ray.engines.sources import end_tokens
from rairl_ray.errors import ModelError
from rairl_ray.types import Prompt, Trace
from rairl_ray.verbs.grading import graded

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
EXPERT = format_completion("9*2=18", "18")
PROMPT = Prompt(id="q", question="How many?", answer="18")


def byte_level(
    eos: str, *special: str, template: object = CHATML, pad: str | None = None
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + 1 + len(special), special_tokens=[eos, *special], initial_alphabet=alphabet
    )
    backend.train_from_iterator(["a"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, bos_token=eos, pad_token=pad, chat_template=template,
        additional_special_tokens=list(special),
    )  # fmt: skip


def prefixed() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space is put before every text, and decoding takes it away again."""
    characters = [chr(code) for code in range(33, 127)] + ["\n", "▁"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "</s>", *characters, "▁<"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("▁", "<")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", chat_template=LLAMA_2
    )


def expert_ids(renderer: Renderer, text: str = EXPERT) -> tuple[int, ...]:
    return renderer.tokenize(Trace(prompt=PROMPT, text=text), same_tokenizer=True).completion_ids


@pytest.mark.parametrize(
    ("tokenizer", "end"),
    [
        (byte_level("<eos>", "<start_of_turn>", "<end_of_turn>", template=GEMMA), "<end_of_turn>"),
        (byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>"),
        (byte_level("<|im_end|>", "<|im_start|>"), "<|im_end|>"),
        (byte_level("<|endoftext|>", template="{{ messages[-1]['content'] }}"), "<|endoftext|>"),
        (prefixed(), "</s>"),
    ],
    ids=["Gemma", "ChatML on a base model", "ChatML", "no turn end", "Llama 2"],
)
def test_an_experts_turn_ends_as_the_template_ends_it(tokenizer: PreTrainedTokenizerFast, end: str) -> None:
    renderer = Renderer(tokenizer, "")
    assert tokenizer.convert_ids_to_tokens(expert_ids(renderer)[-1]) == end
    assert {tokenizer.eos_token_id, renderer.eos_id} == set(renderer.stop_ids)
    for stop in renderer.stop_ids:
        assert (
            renderer.char_ends([*renderer.tokenizer("ab", add_special_tokens=False)["input_ids"], stop])[-1]
            == 3
        )


@pytest.mark.parametrize("said", ["<end_of_turn>", "<eos>", "<also>"])
def test_sampling_stops_at_every_end_token_of_the_model(tmp_path: Path, said: str) -> None:
    """A model that says only this one token; the third is known to its generation config alone."""
    tokenizer = byte_level("<eos>", "<start_of_turn>", "<end_of_turn>", "<also>", template=GEMMA)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **sizes))
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<eos>", "<end_of_turn>", "<also>")}
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
        model.model.embed_tokens.weight[:] = torch.randn(32)
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids[said]] = model.model.norm(model.model.embed_tokens.weight[5])
    model.generation_config.eos_token_id = [ids["<eos>"], ids["<also>"]]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    renderer = Renderer(load_tokenizer(str(tmp_path), Model()), "")
    stops = (*renderer.stop_ids, *end_tokens(str(tmp_path)))
    engine = HfEngine(
        EngineOptions(
            model_path=str(tmp_path), eos_id=renderer.eos_id, stop_ids=stops, max_prompt_tokens=8,
            max_completion_tokens=32,
        ),
        renderer.decode,
    )  # fmt: skip
    engine.mark_synced(0)
    made = engine.generate([GenerationRequest(prompt_ids=(7, 8), seed=1)], SamplingSettings(max_tokens=32))[0]
    assert (made.finish_reason, made.token_ids) == ("stop", (ids[said],))


def test_format_tags_that_are_special_tokens_are_text_and_the_tokens_that_the_model_writes() -> None:
    tokenizer = byte_level("<|im_end|>", "<|im_start|>", *TAGS)
    renderer = Renderer(tokenizer, "")
    own = tokenizer(EXPERT, add_special_tokens=False)["input_ids"]
    assert renderer.decode([*own, renderer.eos_id]) == EXPERT
    assert grade_answer(renderer.decode(own), "18", "number").correct
    assert expert_ids(renderer) == (*own, renderer.eos_id)
    trace = renderer.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=True)
    spelled = [EXPERT[a:b] for a, b in zip((0, *trace.char_ends), trace.char_ends[:-1], strict=False)]
    assert "".join(spelled) == EXPERT and "<think>" in spelled and "</answer>" in spelled
    # any other special token in a text stays ordinary characters: it can never end its own turn
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in expert_ids(renderer, "a <|im_start|> b")


OPENINGS = ["<think>\n", "<think>", "<think>\n\n"]
REASONER = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\nOPENING{% endif %}")


def reasoner(opening: str, *special: str) -> Renderer:
    """As the R1 distillations: the generation prompt itself opens the reasoning."""
    template = REASONER.replace("OPENING", opening)
    return Renderer(byte_level("<|im_end|>", "<|im_start|>", *special, template=template), "Be brief.")


@pytest.mark.parametrize("special", [(), TAGS], ids=["tags are text", "tags are tokens"])
@pytest.mark.parametrize("opening", OPENINGS)
def test_an_expert_continues_the_reasoning_that_its_prompt_opens(
    opening: str, special: tuple[str, ...]
) -> None:
    renderer = reasoner(opening, *special)
    assert renderer.prefilled == opening and renderer.prompt_text(PROMPT).endswith(opening)
    trace = renderer.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=True)
    body = renderer.decode(trace.completion_ids)
    assert "<think>" not in body and EXPERT.endswith(body)
    assert (opening + body).split() == EXPERT.split() and is_well_formed(opening + body)
    # character ends stay places in the expert's whole text, so units and rewards fall where they belong
    first = len(EXPERT) - len(body)
    spelled = [EXPERT[a:b] for a, b in zip((first, *trace.char_ends), trace.char_ends[:-1], strict=False)]
    assert "".join(spelled) == body and all(len(p) == 1 or p in special for p in spelled)
    assert trace.char_ends[-1] == len(EXPERT) + 1


def test_a_sample_that_continues_the_prompt_is_well_formed_and_reads_as_its_expert_does() -> None:
    renderer = reasoner("<think>\n")
    expert = renderer.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=True)
    text = renderer.completion_text(expert.completion_ids)
    assert text == EXPERT and renderer.completed(EXPERT.removeprefix("<think>\n")) == renderer.completed(EXPERT)
    sample = Trace(prompt=PROMPT, text=text, token_ids=expert.completion_ids)
    for same in (True, False):
        assert renderer.tokenize(sample, same_tokenizer=same) == expert
    grade = grade_answer(text, "18", "number")
    assert grade.format_ok and verifiable_rewards(grade, text)["strict_format"] == 0.5
    # one that opens the reasoning once more is ill-formed, and keeps the tokens it was sampled as
    twice_ids = renderer.tokenizer(EXPERT, add_special_tokens=False)["input_ids"]
    twice = renderer.completion_text(twice_ids)
    assert not is_well_formed(twice)
    kept = renderer.tokenize(Trace(prompt=PROMPT, text=twice, token_ids=tuple(twice_ids)), same_tokenizer=True)
    assert list(kept.completion_ids) == twice_ids and kept.char_ends[-1] == len(twice) + 1
    assert kept.char_ends[0] == len("<think>\n") + 1


@pytest.mark.parametrize(
    "template",
    [
        CHATML,
        REASONER.replace("OPENING", "<think>\n\n</think>\n\n"),
        REASONER.replace("OPENING", "Hm <think> x"),
    ],
    ids=["none", "closed again", "words in it"],
)
def test_without_an_opened_reasoning_a_missing_think_is_a_format_error(template: str) -> None:
    renderer = Renderer(byte_level("<|im_end|>", "<|im_start|>", template=template), "")
    assert renderer.prefilled == ""
    trace = renderer.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=True)
    assert renderer.completion_text(trace.completion_ids) == renderer.completed(EXPERT) == EXPERT
    without = EXPERT.removeprefix("<think>\n")
    assert renderer.completed(without) == without and not is_well_formed(without)


def test_two_templates_of_which_one_opens_the_reasoning_read_experts_and_samples_alike() -> None:
    opens, plain = reasoner("<think>\n"), Renderer(prefixed(), "")
    for policy, reward in ((opens, plain), (plain, opens)):
        expert = policy.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=True)
        sample = Trace(
            prompt=PROMPT, text=policy.completion_text(expert.completion_ids), token_ids=expert.completion_ids
        )
        read = reward.tokenize(sample, same_tokenizer=False)
        assert read == reward.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=False)
        density = Density(type="partial")
        units, own = (
            np.asarray(t.char_ends)[unit_tokens(EXPERT, t.char_ends, density)] for t in (read, expert)
        )
        assert units.tolist() == own.tolist()


@pytest.mark.parametrize("row", ["9*2=18\n</think>\n<answer>\n18\n</answer>", EXPERT])
def test_completions_from_elsewhere_are_graded_behind_what_the_template_prefilled(row: str) -> None:
    values = {
        "prompt_id": "q", "question": "?", "answer": "18", "metadata": {}, "generation": row,
        "generation_idx": 0, "finish_reason": "stop", "tokens": 5,
    }  # fmt: skip
    grader = task_rules(Data(task="gsm8k")).grader
    (behind,) = graded([values], grader, Eval(), None, reasoner("<think>\n").completed)
    assert behind.format_ok and behind.correct and behind.generation == row
    (plain,) = graded([values], grader, Eval(), None, Renderer(byte_level("<|im_end|>"), "").completed)
    assert plain.format_ok is (row == EXPERT) and plain.correct


def test_an_expert_begins_as_a_continuation_of_its_prompt_does() -> None:
    renderer = Renderer(prefixed(), "")
    for text in (EXPERT, " led by a space", "\nx", "<"):
        trace = renderer.tokenize(Trace(prompt=PROMPT, text=text), same_tokenizer=True)
        whole = renderer.tokenizer(renderer.prompt_text(PROMPT) + text, add_special_tokens=False)["input_ids"]
        assert [*trace.prompt_ids, *trace.completion_ids[:-1]] == whole
        assert trace.char_ends[-2:] == (len(text), len(text) + 1)


@pytest.mark.parametrize(
    "tokenizer", [byte_level("<|im_end|>", "<|im_start|>"), prefixed()], ids=["byte level", "Llama 2"]
)
def test_what_looks_like_a_special_token_in_a_question_is_text(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = Renderer(tokenizer, "Be brief.")
    end = tokenizer.eos_token
    plain, hostile = (
        renderer.prompt_ids(Prompt(id="q", question=f"Say {said} and {said}")) for said in ("end", end)
    )
    assert hostile.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id)
    assert tokenizer.decode(hostile).count(f"Say {end} and {end}") == 1
    assert hostile[:5] == plain[:5] and hostile[-6:] == plain[-6:]


PARTS = CHATML.replace(
    "{{ m['content'] }}",
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}",
)


def test_a_template_that_wants_parts_gets_them() -> None:
    renderer = Renderer(byte_level("<|im_end|>", "<|im_start|>", template=PARTS), "Be brief.")
    plain = Renderer(byte_level("<|im_end|>", "<|im_start|>"), "Be brief.")
    assert renderer.prompt_text(PROMPT) == plain.prompt_text(PROMPT)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("{{ m['content'] }}", ""),
        CHATML.replace("m['content']", "m['content'] | upper"),
        "{% for m in messages %}{{ '<' + m.content + m.get('tool_calls') }}{% endfor %}",
        {"rag": CHATML, "tool_use": CHATML},
    ],
    ids=["drops the question", "alters the question", "fails outside of jinja", "names without a default"],
)
def test_a_template_that_cannot_be_used_is_one_line(template: object) -> None:
    with pytest.raises(ModelError, match="chat template") as refused:
        Renderer(byte_level("<|im_end|>", "<|im_start|>", template=template), "").prompt_text(PROMPT)
    assert "\n" not in str(refused.value)


def test_a_template_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    byte_level("<|im_end|>", "<|im_start|>").save_pretrained(tmp_path / "m")
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    tokenizer = load_tokenizer(str(tmp_path / "m"), Model(chat_template=str(tmp_path / "t.jinja")))
    assert Renderer(tokenizer, "").prompt_text(PROMPT).startswith("<|im_start|>")


def test_prompts_do_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(
        "<|im_end|>", "<|im_start|>", template="Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML
    )
    before = Renderer(tokenizer, "").prompt_text(PROMPT)

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Later:
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Later)
    assert Renderer(tokenizer, "").prompt_text(PROMPT) == before
    assert before.startswith("Today: 26 Jul 2024\n")


def test_padding_is_a_token_of_the_embedding_even_where_the_tokenizers_own_is_not() -> None:
    tokenizer = byte_level("<|im_end|>", "<|im_start|>")
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == rows and Renderer(tokenizer, "").pad_id < rows
