"""Which completion tokens are scored ("units"), and how unit values become token values (METHOD 2).

All four densities are one code path: the indexes of the tokens at which a unit ends. They depend on the
completion alone, never on the prompt, so the same function serves training, scoring, reranking,
localisation and plots.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from rairl_ray.config.schema import Density

# A step ends after a line, after a closing tag, or after the punctuation of a sentence. Punctuation counts
# only before white space, a tag or the end of the text: that keeps decimal points, versions and web
# addresses whole. Closing quotes and brackets belong to the sentence they close.
_STEP_END = re.compile(r"""\n|</think>|</answer>|[.!?;]+["'”’)\]*]*(?=\s|<|$)""")
_OPENING_TAGS = re.compile(r"(?:\s|<think>|<answer>)*")
_ENUMERATOR = re.compile(r"(?:^|\n)[ \t]*(?:[-*•][ \t]*)?(?:\d{1,3}|[A-Za-z])\.$")
_DOTTED = re.compile(r"(?:\b[A-Za-z]\.){2,}$")
_LAST_WORD = re.compile(r"([A-Za-z]+)\.$")
_ABBREVIATION = re.compile(
    r"(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|cf|etc|approx|resp|inc|ltd|al|dept|est|hr|hrs|lb|lbs|oz|ft)", re.I
)
_ABBREVIATION_BEFORE_A_NUMBER = re.compile(r"(?:no|nos|fig|figs|eq|eqs|sec|ch|vol|pp|p)", re.I)


def unit_tokens(text: str, char_ends: Sequence[int], density: Density) -> np.ndarray:
    """Indexes of the completion tokens at which a unit ends, increasing; the last token always ends one.

    text: the completion. char_ends [T]: end offset of each token in it. Returns [U] int64, U = 0 iff T = 0.
    """
    count = len(char_ends)
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    if density.type == "dense":
        return np.arange(count, dtype=np.int64)
    if density.type == "interval":
        ends = np.arange(density.every - 1, count, density.every, dtype=np.int64)
    elif density.type == "partial":
        ends = _tokens_at(np.asarray(step_ends(text), dtype=np.int64), np.asarray(char_ends, dtype=np.int64))
    else:  # sparse
        ends = np.zeros(0, dtype=np.int64)
    return np.union1d(ends, [count - 1]).astype(np.int64)


def unit_starts(unit_tokens: np.ndarray) -> np.ndarray:
    """[U] int64: first token of each unit's segment; segments partition the tokens up to the last unit."""
    starts = np.zeros(len(unit_tokens), dtype=np.int64)
    starts[1:] = unit_tokens[:-1] + 1
    return starts


def backfill(
    unit_char_ends: np.ndarray,
    unit_values: np.ndarray,
    char_ends: Sequence[int],
    unit_tokens: np.ndarray | None = None,
) -> np.ndarray:
    """Give every token the value of the next unit at or after it, in any tokenizer.

    unit_char_ends [U], unit_values [U]: units of the discriminator. char_ends [T]: ends of the tokens that
    take the values (the policy's). Tokens after the last unit take the last unit's value.
    unit_tokens [U]: pass it when both models share ONE tokenizer; the result is then exact by index, also
    where tokens share a character end and an `interval` unit ends between them. Returns [T].
    """
    if len(unit_values) == 0:
        raise ValueError("backfill: a trace without units has no reward")
    return np.asarray(unit_values)[unit_of_tokens(unit_char_ends, char_ends, unit_tokens)]


def unit_of_tokens(
    unit_char_ends: np.ndarray, char_ends: Sequence[int], unit_tokens: np.ndarray | None = None
) -> np.ndarray:
    """[T] the unit that each token belongs to: the next one at or after it; arguments as in `backfill`.

    The one mapping between two tokenizers: rewards go to tokens by it, log-probabilities of tokens to units.
    """
    if unit_tokens is not None:
        unit = np.searchsorted(unit_tokens, np.arange(len(char_ends)), side="left")
    else:
        ends = np.asarray(char_ends, dtype=np.int64)
        first = np.searchsorted(unit_char_ends, ends, side="left")
        after = np.searchsorted(unit_char_ends, ends, side="right")
        rank = np.arange(len(char_ends)) - np.searchsorted(ends, ends, side="left")
        # Of several tokens with one end, the k-th takes the k-th unit with that end; once these are used up,
        # the rest are first bytes of the next character and take the next unit.
        unit = np.minimum(first + rank, after)
    return np.minimum(unit, len(unit_char_ends) - 1)


def step_ends(text: str) -> list[int]:
    """Character offsets (exclusive) at which a reasoning step is complete, increasing.

    White space alone and opening tags alone are no step: "a.\\n\\nb" has one end before b, and the line
    "<think>" has none.
    """
    ends: list[int] = []
    start = 0
    for match in _STEP_END.finditer(text):
        if _OPENING_TAGS.fullmatch(text, start, match.start()) and not match.group().startswith("</"):
            continue
        if match.group()[0] in ".!?;" and not _ends_sentence(text, match):
            continue
        ends.append(match.end())
        start = match.end()
    return ends


def _ends_sentence(text: str, match: re.Match[str]) -> bool:
    """False for the dot of an abbreviation or of a list's enumerator, and for a factorial."""
    after = text[match.end() : match.end() + 8].lstrip(" ")
    if match.group() == "!" and after[:1] in {"=", "+", "*", "/", "×"}:
        return False
    if match.group() != ".":
        return True
    before = text[max(0, match.start() - 24) : match.end()]
    if _DOTTED.search(before) or _ENUMERATOR.search(before):
        return False
    word = _LAST_WORD.search(before)
    if word is None:
        return True
    if _ABBREVIATION.fullmatch(word.group(1)):
        return False
    return not (_ABBREVIATION_BEFORE_A_NUMBER.fullmatch(word.group(1)) and after[:1].isdigit())


def _tokens_at(ends: np.ndarray, char_ends: np.ndarray) -> np.ndarray:
    """For each character end the token that completes it.

    A token that only begins a character of several bytes has the same character end as the token before it,
    and belongs to what follows: hence the first of equals.
    """
    tokens = np.searchsorted(char_ends, ends, side="left")
    return tokens[tokens < len(char_ends)]  # sampled text may decode to more than its tokens account for
