"""The contract of model, tokenizer, chat template and completion format, found by a round trip before a run.

A prompt is rendered, an expert's completion encoded, and a completion read as the model would write it.
`prepare` refuses the first thing that cannot be handled; `doctor MODEL` lists everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rairl_ray.config.windows import vocabulary_of, window_of
from rairl_ray.data.completion_format import THINK_CLOSE, format_completion, is_well_formed
from rairl_ray.data.rendering import Renderer
from rairl_ray.errors import ModelError
from rairl_ray.types import Prompt, Trace

EXPERT = format_completion("9*2=18\nSo it is 18.", "18")
PROMPT = Prompt(id="doctor", question="How many are 9 times 2?", answer="18")
TEMPLATE = "set chat_template of its model section to a file with another one"
TOKENIZER = "take the model's own tokenizer"


@dataclass(frozen=True)
class Fact:
    """One line about a model. A `problem` cannot be handled: it says what is wrong and the remedy."""

    what: str
    value: str
    problem: str = ""
    note: str = ""


def check_contract(
    name: str, renderer: Renderer, config: Mapping[str, Any], more_ends: tuple[int, ...]
) -> None:
    """Refuse a model whose texts cannot make the round trip.

    Raises:
        ModelError: the first problem of `contract`, in one line.
    """
    for fact in contract(renderer, config, more_ends):
        if fact.problem:
            raise ModelError(f"{name}: {fact.problem}")


def contract(renderer: Renderer, config: Mapping[str, Any], more_ends: tuple[int, ...]) -> list[Fact]:
    """Everything that the round trip finds.

    Args:
        config: the model's `config.json`; empty where nobody has it.
        more_ends: end tokens that its generation config names.

    Raises:
        ModelError: the template cannot render a prompt at all.
    """
    tokens = renderer.tokenize(Trace(prompt=PROMPT, text=EXPERT), same_tokenizer=True)
    prompt = renderer.prompt_text(PROMPT)
    rows = vocabulary_of(config)
    beyond = sorted({i for i in (*tokens.prompt_ids, *tokens.completion_ids) if rows is not None and i >= rows})
    return [
        _end_tokens(renderer, more_ends),
        _prefilled(renderer, prompt),
        Fact("system prompt", f"in the {renderer.system_role}'s turn" if renderer.system_prompt else "none"),
        Fact("tags that are special tokens", " ".join(renderer.special_tags) or "none"),
        _question(renderer),
        _expert(renderer, tokens.completion_ids),
        _own_writing(renderer, prompt, tokens.completion_ids),
        Fact("space before a text", "kept off completions" if renderer.adds_space else "none"),
        _padding(renderer, rows),
        _embedding(renderer, rows, beyond),
        Fact("window", "not said" if (found := window_of(config)) is None else f"{found[1]} ({found[0]})"),
    ]


def _end_tokens(renderer: Renderer, more: tuple[int, ...]) -> Fact:
    ends = sorted({*renderer.stop_ids, *more})
    written = _spelled(renderer, (renderer.eos_id,))
    return Fact("end tokens", f"{_spelled(renderer, ends)}; experts end in {written}")


def _prefilled(renderer: Renderer, prompt: str) -> Fact:
    closed = prompt.rpartition(PROMPT.question)[2].rstrip().endswith(THINK_CLOSE)
    note = f"the template closes the reasoning before a completion begins; {TEMPLATE}" if closed else ""
    return Fact("prefilled", repr(renderer.prefilled) if renderer.prefilled else "nothing", note=note)


def _question(renderer: Renderer) -> Fact:
    """Whether a question that spells an end token keeps it as characters."""
    end = _spelled(renderer, (renderer.eos_id,))
    plain, hostile = (
        renderer.prompt_ids(Prompt(id="doctor", question=f"Say {said}.")) for said in ("end", end)
    )
    kept = hostile.count(renderer.eos_id) == plain.count(renderer.eos_id)
    problem = f"{end} in a question becomes the special token; {TOKENIZER} as a fast one (tokenizer.json)"
    return Fact("special tokens in a question", "stay text" if kept else "end it", "" if kept else problem)


def _expert(renderer: Renderer, ids: tuple[int, ...]) -> Fact:
    text = renderer.completion_text(ids)
    if text == EXPERT:
        return Fact("an expert's completion", f"{len(ids)} tokens, read back as it is")
    if is_well_formed(text):
        return Fact("an expert's completion", "read back well-formed", note="the tokenizer alters characters")
    problem = f"its tokenizer reads an expert's completion back as {text!r:.120}; {TOKENIZER}"
    return Fact("an expert's completion", "altered", problem)


def _own_writing(renderer: Renderer, prompt: str, expert: tuple[int, ...]) -> Fact:
    """The expert's completion as the model would write it: encoded as one text with the prompt."""
    behind = EXPERT[renderer.opening(EXPERT) :]
    whole = tuple(renderer.tokenizer(prompt + behind, add_special_tokens=False)["input_ids"])
    own = (*whole[len(renderer.prompt_ids(PROMPT)) :], renderer.eos_id)
    if own == expert:
        return Fact("the same as the model writes it", "the same tokens")
    text = renderer.completion_text(own)
    return Fact(
        "the same as the model writes it",
        "other tokens",
        note=""
        if is_well_formed(text)
        else "a token spans the end of the prompt; experts begin anew behind it",
    )


def _padding(renderer: Renderer, rows: int | None) -> Fact:
    own = renderer.tokenizer.pad_token_id
    outside = own is not None and rows is not None and own >= rows
    note = f"the tokenizer's own, {own}, lies outside of the embedding and is not used" if outside else ""
    return Fact("padding", _spelled(renderer, (renderer.pad_id,)), note=note)


def _embedding(renderer: Renderer, rows: int | None, beyond: list[int]) -> Fact:
    value = f"{len(renderer.tokenizer)} tokens, " + ("rows not said" if rows is None else f"{rows} rows")
    if rows is None or not (beyond or renderer.eos_id >= rows):
        return Fact("embedding", value)
    named = _spelled(renderer, beyond or (renderer.eos_id,))
    return Fact("embedding", value, f"its embedding has {rows} rows and none for {named}; {TOKENIZER}")


def _spelled(renderer: Renderer, ids: Any) -> str:
    return " ".join(str(renderer.tokenizer.convert_ids_to_tokens(token) or token) for token in ids)
