"""Traces of one micro-batch laid end to end: no padding, and a prompt is there once for all its completions.

Traces of one prompt become a stretch for the prompt and one for each completion; a trace alone is one stretch.
Position ids start again after the prompt for each completion; a token sees its own stretch and its prompt's.
Heads go on speaking of rows: `Packing.place` says where each position of a padded row is.

No mask over all pairs of tokens is ever made: attention runs stretch by stretch (engines/packed_attention.py),
over no more pairs than rows of their own would have, so that sharing never costs more than it saves.
Dimensions: B rows, L positions of a padded row, N packed tokens, S stretches of one attention call, Q queries
and K keys of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

NEVER = np.iinfo(np.int64).max // 2
"""Position of a key that is padding: after every query."""


@dataclass(frozen=True, kw_only=True)
class Stretches:
    """Queries of about one length that one attention call serves, each row with the keys that it may see."""

    queries: Tensor
    """[S, Q] int64: packed index of each query; padding has 0."""
    keys: Tensor
    """[S, K] int64: packed index of each key; padding has 0."""
    query_positions: Tensor
    """[S, Q] int64: position ids; padding has 0."""
    key_positions: Tensor
    """[S, K] int64: position ids; padding has NEVER."""
    causal: bool
    """Queries and keys are the same stretch from its start: without a window no mask is needed."""
    _masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    """Made once for all layers."""

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """[S, 1, Q, K] to be added to attention scores; None where plain causal attention does the same."""
        if self.causal and (window is None or window >= self.queries.shape[1]):
            return None
        if (window, dtype) not in self._masks:
            distance_SQK = self.query_positions[:, :, None] - self.key_positions[:, None, :]
            seen = distance_SQK >= 0
            if window is not None:
                seen &= distance_SQK < window
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._masks[window, dtype] = mask.masked_fill_(~seen, float("-inf"))[:, None]
        return self._masks[window, dtype]

    def to(self, device: torch.device | str) -> Stretches:
        return Stretches(
            queries=self.queries.to(device),
            keys=self.keys.to(device),
            query_positions=self.query_positions.to(device),
            key_positions=self.key_positions.to(device),
            causal=self.causal,
        )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the tokens of B padded rows stand in one packed row of N tokens, and what each may see."""

    source: Tensor
    """[N] int64: index of each packed token in the flattened [B, L] rows."""
    position_ids: Tensor
    """[N] int64"""
    place: Tensor
    """[B, L] int64: packed index of each position of a row; padding has 0."""
    stretches: tuple[Stretches, ...]
    order: Tensor
    """[N] int64: where each packed token is in the queries of all `stretches`, flattened and joined."""

    def to(self, device: torch.device | str) -> Packing:
        return Packing(
            source=self.source.to(device),
            position_ids=self.position_ids.to(device),
            place=self.place.to(device),
            stretches=tuple(stretches.to(device) for stretches in self.stretches),
            order=self.order.to(device),
        )


def pack(prompts: Sequence[tuple[int, ...]], completions: Sequence[int]) -> Packing:
    """The packing of traces whose padded rows are prompt, completion, padding.

    Args:
        prompts: the prompt's ids of each trace.
        completions: the number of completion tokens of each.
    """
    width = max(len(prompt) + size for prompt, size in zip(prompts, completions, strict=True))
    place = np.zeros((len(prompts), width), dtype=np.int64)
    source: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    roots: list[tuple[int, int]] = []  # (packed start, length)
    leaves: list[tuple[int, int, int, int]] = []  # (prompt's start, its length, completion's start, its length)
    start = 0

    def lay(row: int, first: int, length: int) -> None:
        """Append positions first..first + length of a row."""
        nonlocal start
        source.append(row * width + np.arange(first, first + length))
        positions.append(np.arange(first, first + length))
        place[row, first : first + length] = np.arange(start, start + length)
        start += length

    for rows in _together(prompts):
        size, root = len(prompts[rows[0]]), start
        if len(rows) == 1:
            lay(rows[0], 0, size + completions[rows[0]])
            roots.append((root, start - root))
            continue
        lay(rows[0], 0, size)
        roots.append((root, size))
        for row in rows:
            place[row, :size] = np.arange(root, root + size)
            leaves.append((root, size, start, completions[row]))
            lay(row, size, completions[row])
    stretches, order = _stretches(roots, [leaf for leaf in leaves if leaf[3]], start)
    return Packing(
        source=torch.from_numpy(np.concatenate(source)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        place=torch.from_numpy(place),
        stretches=stretches,
        order=torch.from_numpy(order),
    )


def _together(prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    return list(rows.values())


def _stretches(
    roots: Sequence[tuple[int, int]], leaves: Sequence[tuple[int, int, int, int]], tokens: int
) -> tuple[tuple[Stretches, ...], np.ndarray]:
    """All stretches, those of about one length (within a power of two) in one call, and `Packing.order`."""
    found: list[Stretches] = []
    order = np.zeros(tokens, dtype=np.int64)
    offset = 0
    for causal, items in ((True, [(0, 0, *root) for root in roots]), (False, list(leaves))):
        sizes: dict[int, list[tuple[int, int, int, int]]] = {}
        for item in items:
            sizes.setdefault(item[3].bit_length(), []).append(item)
        for _, members in sorted(sizes.items()):
            longest = max(item[3] for item in members)
            for row, (_, _, start, length) in enumerate(members):
                order[start : start + length] = offset + row * longest + np.arange(length)
            offset += len(members) * longest
            found.append(_one_call(members, causal))
    return tuple(found), order


def _one_call(members: Sequence[tuple[int, int, int, int]], causal: bool) -> Stretches:
    """Keys are the prompt, padded to the longest, then the stretch itself, padded likewise."""
    longest_prompt = max(item[1] for item in members)
    longest = max(item[3] for item in members)
    queries = np.zeros((len(members), longest), dtype=np.int64)
    query_positions = np.zeros_like(queries)
    keys = np.zeros((len(members), longest_prompt + longest), dtype=np.int64)
    key_positions = np.full_like(keys, NEVER)
    for row, (root, size, start, length) in enumerate(members):
        own, at = np.arange(start, start + length), size + np.arange(length)
        queries[row, :length], query_positions[row, :length] = own, at
        keys[row, :size], key_positions[row, :size] = np.arange(root, root + size), np.arange(size)
        keys[row, longest_prompt : longest_prompt + length] = own
        key_positions[row, longest_prompt : longest_prompt + length] = at
    return Stretches(
        queries=torch.from_numpy(queries),
        keys=torch.from_numpy(keys),
        query_positions=torch.from_numpy(query_positions),
        key_positions=torch.from_numpy(key_positions),
        causal=causal,
    )
