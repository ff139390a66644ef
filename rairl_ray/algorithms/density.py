"""Which completion tokens are scored ("units"), and how unit values become token values (docs/method.md 2).

All densities are one code path: the indexes of the tokens at which a unit ends. They depend on the
completion alone, never on the prompt, so the same function serves training, scoring, reranking,
localisation and plots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from rairl_ray.algorithms.steps import step_ends
from rairl_ray.config.schema import Density
from rairl_ray.config.variants import complete


def unit_tokens(text: str, char_ends: Sequence[int], density: Density) -> np.ndarray:
    """Indexes of the completion tokens at which a unit ends, increasing; the last token always ends one.

    text: the completion. char_ends [T]: end offset of each token in it. Returns [U] int64, U = 0 iff T = 0.
    """
    count = len(char_ends)
    if count == 0:
        return np.zeros(0, dtype=np.int64)
    return np.union1d(DENSITIES[density.type](text, char_ends, density), [count - 1]).astype(np.int64)


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
    where tokens share a character end and an `interval` unit ends between them. Returns [T]; NaN for a trace
    without units, which has no reward (`advantages` leaves it out of its group).
    """
    if len(unit_values) == 0:
        return np.full(len(char_ends), np.nan, dtype=np.float32)
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


def tokens_at(ends: Sequence[int], char_ends: Sequence[int]) -> np.ndarray:
    """For each character end the token that completes it.

    A token that only begins a character of several bytes has the same character end as the token before it,
    and belongs to what follows: hence the first of equals.
    """
    tokens = np.searchsorted(
        np.asarray(char_ends, dtype=np.int64), np.asarray(ends, dtype=np.int64), side="left"
    )
    return tokens[tokens < len(char_ends)]  # sampled text may decode to more than its tokens account for


DENSITIES: dict[str, Callable[[str, Sequence[int], Density], np.ndarray]] = {
    "sparse": lambda text, char_ends, density: np.zeros(0, dtype=np.int64),
    "partial": lambda text, char_ends, density: tokens_at(step_ends(text), char_ends),
    "interval": lambda text, char_ends, density: np.arange(density.every - 1, len(char_ends), density.every),
    "dense": lambda text, char_ends, density: np.arange(len(char_ends)),
}
"""Indexes of the tokens that end a unit, in any order; the last token does so in all of them."""
complete(f"{__name__}.DENSITIES", DENSITIES, Density, "type")
