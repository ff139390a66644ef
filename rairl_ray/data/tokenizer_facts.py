"""What a tokenizer is made of: special tokens, how its pieces spell bytes, its fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Literal

from transformers import PreTrainedTokenizerBase


def common_prefix(first: str, second: str) -> int:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return index
    return min(len(first), len(second))


def ends_by_offsets(offsets: Iterable[tuple[int, int]], length: int) -> list[int]:
    """Ends in the original text. Tokens that share one character show its whole span: only the last ends it."""
    spans = list(offsets)
    ends, end = [], 0
    for index, (start, stop) in enumerate(spans):
        shared = index + 1 < len(spans) and spans[index + 1][0] < stop
        end = max(end, start if shared else stop)
        ends.append(end)
    if ends:
        ends[-1] = length
    return ends


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    added = {token for token, content in tokenizer.added_tokens_decoder.items() if content.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def decoder_kind(tokenizer: PreTrainedTokenizerBase) -> Literal["bytes", "sentencepiece", "plain"]:
    """Which reading of vocabulary strings to try first; a wrong guess is noticed and costs time only."""
    decoder = json.dumps(_backend(tokenizer).get("decoder"))
    if "ByteLevel" in decoder:
        return "bytes"
    return "sentencepiece" if "▁" in decoder or "\\u2581" in decoder or "ByteFallback" in decoder else "plain"


def _backend(tokenizer: PreTrainedTokenizerBase) -> dict[str, object]:
    return json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Equal for tokenizers that give the same ids and prompts: algorithm, vocabulary, special tokens, template.

    Padding and truncation are left out: they are settings of a call, remembered by the object.
    """
    backend = {k: v for k, v in _backend(tokenizer).items() if k not in ("padding", "truncation")}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [backend or tokenizer.get_vocab(), special, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes every byte as one visible character: itself where it is printable Latin-1 and no
    space, else the next free character from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(visible)]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF = _byte_of_character()
