"""Text to tokens and back: the sole owner of tokenisation, chat templates and character offsets.

A sequence is `prompt_ids + completion_ids`. The prompt is the rendered chat template WITH its generation
prompt, tokenised alone; the completion is tokenised alone and appended. So no token of an assistant header
is ever a completion token, whatever the template ends in (docs/method.md 8, defects 7 and 11). The end-of-
sequence token is added to finished traces and only to those, experts and samples alike (defect 13).

Where a generation prompt itself opens the reasoning (`<think>`), the prompt's tokens hold that, and the text of
a completion begins with it all the same (`Renderer.prefilled`): one format for graders, perturbations and a
discriminator with another template, whoever wrote the opening.

Two different tokenizers are mapped by characters: `char_ends[t]` is the number of characters of the trace's
text that are complete once token t is read.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError

from rairl_ray.config.schema import Model
from rairl_ray.data.completion_format import TAGS, THINK_OPEN
from rairl_ray.data.tokenizer_facts import (
    BYTE_OF,
    common_prefix,
    decoder_kind,
    ends_by_offsets,
    fingerprint,
    special_ids,
)
from rairl_ray.errors import ModelError
from rairl_ray.imports import NOT_FOR_TEXT, without
from rairl_ray.types import Prompt, TokenizedTrace, Trace

with without(*NOT_FOR_TEXT):
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_PROBE = "system-role-probe"
_OTHER_TEMPLATE = "set model.policy.chat_template (or model.discriminator's) to a file with another one"

PROMPT_DAY = datetime(2024, 7, 26)
"""Today, in templates that write a date: no prompt may differ from day to day, or from run to resume."""


def load_tokenizer(path: str, model: Model, *, role: str = "policy") -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a chat template; `role` only names the config key in errors.

    Raises ModelError where there is no tokenizer, no end-of-sequence token or no chat template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"model.{role}.path={path}: no tokenizer could be loaded ({reason}); "
            f"give a folder or hub id with tokenizer.json and tokenizer_config.json"
        ) from error
    if model.chat_template is not None:
        file = Path(model.chat_template)
        if not file.is_file():
            raise ModelError(f"model.{role}.chat_template={file}: no such file; give a Jinja chat template")
        tokenizer.chat_template = file.read_text(encoding="utf-8-sig")
    if not tokenizer.chat_template:
        raise ModelError(
            f"model.{role}.path={path}: the tokenizer has no chat template; "
            f"set model.{role}.chat_template=FILE with a Jinja template"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.{role}.path={path}: the tokenizer has no end-of-sequence token; set eos_token in it"
        )
    return tokenizer


class Renderer:
    """One model's view of prompts and traces.

    `system_role` auto asks the chat template; where it knows no system role (it refuses or drops the message)
    the system prompt opens the user's turn. An empty `system_prompt` adds no message at all.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str,
        system_role: Literal["auto", "system", "user"] = "auto",
    ) -> None:
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self._wants_parts = False
        self._check_template()
        self.system_role = self._detected_role() if system_role == "auto" else system_role
        self.eos_id: int = self._turn_end()
        """What ends an expert's turn: the token that the template itself writes there."""
        self.stop_ids: tuple[int, ...] = tuple(sorted({self.eos_id, tokenizer.eos_token_id}))
        """What ends a sample; the model's generation config may know more."""
        self.pad_id: int = self.eos_id
        """Padding is masked everywhere; a tokenizer's own pad token may lie outside of the embedding."""
        self.fingerprint = fingerprint(tokenizer)
        self._special = special_ids(tokenizer)
        self._special_texts = tuple(filter(None, tokenizer.convert_ids_to_tokens(sorted(self._special))))
        added = tokenizer.get_added_vocab()
        self._tags = {tag: added[tag] for tag in TAGS if added.get(tag) in self._special}
        """Format tags that are special tokens: they are text here."""
        self._special -= frozenset(self._tags.values())
        self._lead = self._lead_ids()
        self._pieces: dict[int, bytes] = {}
        self._decoder = decoder_kind(tokenizer)
        self.prefilled: str = self._prefilled()
        """The reasoning tag and what follows it at the end of every prompt; empty where the model writes it."""

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered chat with its generation prompt."""
        question = prompt.question
        messages = []
        if self.system_prompt and self.system_role == "system":
            messages.append({"role": "system", "content": self.system_prompt})
        elif self.system_prompt:
            question = f"{self.system_prompt}\n\n{question}"
        return self._rendered([*messages, {"role": "user", "content": question}])

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of `prompt_text`; the template writes its own special tokens, so none are added.

        What looks like a special token in a question is ordinary characters, as in a completion.
        """
        text, question = self.prompt_text(prompt), prompt.question.strip()
        if not any(token in question for token in self._special_texts):
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        before, found, after = text.rpartition(question)
        if not found:
            raise ModelError(
                f"{self._name}: its chat template alters the question of {prompt.id}: {_OTHER_TEMPLATE}"
            )
        ids = [*self.tokenizer(before, add_special_tokens=False)["input_ids"], *self._behind(question, True)[0]]
        return (*ids, *self._behind(after, False)[0])

    def tokenize(self, trace: Trace, *, same_tokenizer: bool) -> TokenizedTrace:
        """A trace in this tokenizer: the sampled ids themselves if the tokenizers are the same, else its text.

        What the template has prefilled is in the prompt's tokens and not in the completion's. Special-token
        strings inside a text are ordinary characters, so a text can never end its own turn.
        """
        length, opened = len(trace.text), self.opening(trace.text)
        if same_tokenizer and trace.token_ids is not None:
            ids = list(trace.token_ids)
            ends = [min(opened + end, length) for end in self.char_ends(ids)]
        else:
            ids, ends = self._encoded(trace.text[opened:])
            ends = [opened + end for end in ends]
            if trace.finished:
                ids, ends = [*ids, self.eos_id], [*ends, length]
        if trace.finished and ends:
            ends[-1] = length + 1
        return TokenizedTrace(
            prompt_ids=self.prompt_ids(trace.prompt), completion_ids=tuple(ids), char_ends=tuple(ends)
        )

    def completion_text(self, ids: Sequence[int]) -> str:
        """The text of sampled tokens: what the template has prefilled, then what they spell."""
        return self.prefilled + self.decode(ids)

    def completed(self, text: str) -> str:
        """A completion from elsewhere, with what the template prefills in front unless it begins with that."""
        return text if self.opening(text) else self.prefilled + text

    def opening(self, text: str) -> int:
        """How many characters of a completion's text are in the prompt already."""
        shared = common_prefix(self.prefilled, text)
        return shared if shared >= len(THINK_OPEN) else 0

    @property
    def special_tags(self) -> tuple[str, ...]:
        """Format tags that are special tokens of this tokenizer."""
        return tuple(self._tags)

    @property
    def adds_space(self) -> bool:
        """Whether the tokenizer begins every text with a space of its own, which completions go without."""
        return bool(self._lead)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of completion tokens, special tokens skipped, but for format tags."""
        kept = [token for token in ids if token not in self._special] if self._tags else list(ids)
        return self.tokenizer.decode(
            kept, skip_special_tokens=not self._tags, clean_up_tokenization_spaces=False
        )

    def char_ends(self, ids: Sequence[int]) -> list[int]:
        """[T] complete characters of `decode(ids)` after each token; a closing end of sequence has one more.

        A token that ends inside a UTF-8 character counts up to the last complete one.
        """
        text = self.decode(ids)
        ends = self._ends_by_pieces(ids, text) or self._ends_by_prefixes(ids, text)
        if len(ids) and ids[-1] in self.stop_ids:
            ends[-1] = len(text) + 1
        return ends

    def _detected_role(self) -> Literal["system", "user"]:
        try:
            text = self._rendered([{"role": "system", "content": _PROBE}, {"role": "user", "content": "?"}])
        except ModelError:
            return "user"
        return "system" if _PROBE in text else "user"

    def _check_template(self) -> None:
        """Find out whether the template takes a message as text or as a list of parts.

        Raises:
            ModelError: either way the question is not in the prompt.
        """
        question = [{"role": "user", "content": _PROBE}]
        try:
            if _PROBE in self._rendered(question):
                return
        except ModelError:
            return  # it may want a system message too; `prompt_text` tells
        self._wants_parts = True
        if _PROBE not in self._rendered(question):
            raise ModelError(f"{self._name}: its chat template drops or alters the question; {_OTHER_TEMPLATE}")

    def _turn_end(self) -> int:
        """The special token that the template writes behind an assistant's text, or else the tokenizer's."""
        own: int = self.tokenizer.eos_token_id
        try:
            turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
            _, _, tail = self._rendered(turn, generation=False).rpartition(_PROBE)
        except ModelError:
            return own
        ids = self.tokenizer(tail.lstrip(), add_special_tokens=False)["input_ids"] if tail.strip() else []
        return ids[0] if ids and ids[0] in special_ids(self.tokenizer) else own

    def _prefilled(self) -> str:
        """The unclosed `<think>` at the end of a generation prompt, with the white space behind it."""
        _, tag, after = self._probe_prompt().rpartition(_PROBE)[2].rpartition(THINK_OPEN)
        return tag + after if tag and not after.strip() else ""

    def _probe_prompt(self) -> str:
        """Some prompt, as rendered; empty where no roles will do."""
        for roles in (("user",), ("system", "user")):
            try:
                return self._rendered([{"role": role, "content": _PROBE} for role in roles])
            except ModelError:
                continue  # it may want a system message too
        return ""

    def _lead_ids(self) -> tuple[int, ...]:
        """Ids of a line end where the tokenizer begins every text with a space of its own; else none.

        A completion goes on after a prompt. Encoded behind a line end it begins as the policy's samples do, but
        where prompts end in a special token that swallows white space: there, samples begin with the space too.
        """
        alone, lead, behind = (self._ids(text) for text in ("x", "\n", "\nx"))
        spaced = bool(alone) and str(self.tokenizer.convert_ids_to_tokens(alone[0])).startswith("▁")
        if spaced and (prompt := self._probe_prompt()):
            start, whole = (
                self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f"{prompt}x")
            )
            spaced = list(whole) != [*start, *alone]
        return tuple(lead) if spaced and behind[: len(lead)] == lead and len(behind) > len(lead) else ()

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    @property
    def _name(self) -> str:
        return self.tokenizer.name_or_path or "the tokenizer"

    def _rendered(self, messages: list[dict[str, str]], generation: bool = True) -> str:
        chat: list[dict[str, Any]] = list(messages)
        if self._wants_parts:
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generation, strftime_now=PROMPT_DAY.strftime
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ModelError(
                f"{self._name}: its chat template cannot render {[m['role'] for m in messages]} "
                f"({' '.join(str(error).split())[:200]}); set data.system_role=user or another chat_template"
            ) from error

    def _encoded(self, text: str) -> tuple[list[int], list[int]]:
        if not self._tags:
            return self._encoded_piece(text)
        ids: list[int] = []
        ends: list[int] = []
        at = 0
        for piece in re.split(f"({'|'.join(map(re.escape, self._tags))})", text):
            if piece in self._tags:
                ids, ends = [*ids, self._tags[piece]], [*ends, at + len(piece)]
            elif piece:
                own, own_ends = self._encoded_piece(piece)
                ids, ends = ids + own, ends + [at + end for end in own_ends]
            at += len(piece)
        return ids, ends

    def _encoded_piece(self, text: str) -> tuple[list[int], list[int]]:
        ids, spans = self._behind(text, True)
        if self.tokenizer.is_fast and self.decode(ids) != text:  # it normalises: decoded offsets would drift
            return ids, ends_by_offsets(spans, len(text))
        return ids, [min(end, len(text)) for end in self.char_ends(ids)]

    def _behind(self, text: str, as_characters: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text that goes on after another one, and each one's span of characters (fast tokenizers).

        `as_characters`: what looks like a special token is ordinary characters.
        """
        lead = len(self._lead)
        encoding = self.tokenizer(
            ("\n" if lead else "") + text,
            add_special_tokens=False,
            split_special_tokens=as_characters,
            return_offsets_mapping=self.tokenizer.is_fast,
        )
        spans = encoding.get("offset_mapping", [])[lead:]
        moved = [(max(0, start - (lead > 0)), max(0, stop - (lead > 0))) for start, stop in spans]
        return list(encoding["input_ids"])[lead:], moved

    def _ends_by_pieces(self, ids: Sequence[int], text: str) -> list[int] | None:
        """The fast way: bytes of every token, decoded as they come; None where that does not give `text`."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        parts = [decoder.decode(self._piece(token)) for token in ids]
        tail = decoder.decode(b"", final=True)
        joined = "".join(parts) + tail
        shift = 0
        if joined != text:  # sentencepiece decoders strip the space before the first word
            if joined != f" {text}":
                return None
            shift = 1
        ends, total = [], -shift
        for part in parts:
            total += len(part)
            ends.append(max(0, total))
        if ends and tail:  # the text ends inside a character, which decodes to a replacement character
            ends[-1] = len(text)
        return ends

    def _ends_by_prefixes(self, ids: Sequence[int], text: str) -> list[int]:
        """The exact way for any tokenizer: decode every prefix. Quadratic, so it is the last resort."""
        ends, end = [], 0
        for count in range(1, len(ids) + 1):
            end = max(end, common_prefix(self.decode(ids[:count]), text))
            ends.append(end)
        return ends

    def _piece(self, token_id: int) -> bytes:
        if token_id not in self._pieces:
            self._pieces[token_id] = self._piece_bytes(token_id)
        return self._pieces[token_id]

    def _piece_bytes(self, token_id: int) -> bytes:
        token = None if token_id in self._special else self.tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return b""
        if self._decoder == "bytes" and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        if self._decoder == "sentencepiece":
            byte = _BYTE_TOKEN.fullmatch(token)
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return token.encode()
