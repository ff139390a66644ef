"""Traces of one micro-batch laid end to end: no padding, and what several traces begin with is there once.

A system prompt, a prompt for all its completions, an expert's completion up to the edit of a perturbed copy:
the traces are a tree of stretches. Position ids go on along each trace, and a token sees what its own trace has
before it. Heads go on speaking of rows: `Packing.place` says where each position of a padded row is.

No mask over all pairs of tokens is ever made: attention runs stretch by stretch (engines/packed_attention.py),
over about as many pairs as rows of their own have, so that sharing costs no more and there is nothing to weigh.
Dimensions: B rows, L positions of a padded row, N packed tokens, S stretches of one attention call, Q queries
and K keys of the longest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

SHORTEST = 8
"""Tokens in common that are worth a branch, which is a row more in attention."""

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
    """Queries and keys are the same stretches, from position 0 on: without a window no mask is needed."""
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


def pack(traces: Sequence[Sequence[int]]) -> Packing:
    """The packing of padded rows, each a trace's prompt and completion ids and then padding."""
    tree = _Tree(traces)
    stretches, order = _stretches(tree.nodes, tree.size)
    return Packing(
        source=torch.from_numpy(np.concatenate(tree.source)),
        position_ids=torch.from_numpy(np.concatenate(tree.positions)),
        place=torch.from_numpy(tree.place),
        stretches=stretches,
        order=torch.from_numpy(order),
    )


@dataclass(frozen=True)
class _Node:
    """A stretch of tokens that stands in the packed row once."""

    before: np.ndarray
    """Packed indexes of all tokens before it in its traces."""
    start: int
    """Packed index of its first token."""
    length: int


class _Tree:
    """Traces as a tree of stretches: a branch where traces that begin alike go apart."""

    def __init__(self, traces: Sequence[Sequence[int]]) -> None:
        self._rows = [np.asarray(trace, dtype=np.int64) for trace in traces]
        self._sorted = sorted(range(len(traces)), key=lambda row: tuple(traces[row]))
        self._alike = [0] + [self._common(i) for i in range(1, len(traces))]
        """Tokens that each trace has in common with the one before it in sorted order."""
        self.width = max(map(len, traces))
        self.place = np.zeros((len(traces), self.width), dtype=np.int64)
        self.source: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.nodes: list[_Node] = []
        self.size = 0
        self._grow(0, len(traces), 0, np.zeros(0, dtype=np.int64))

    def _common(self, index: int) -> int:
        one, other = self._rows[self._sorted[index - 1]], self._rows[self._sorted[index]]
        length = min(len(one), len(other))
        different = np.flatnonzero(one[:length] != other[:length])
        return int(different[0]) if len(different) else length

    def _grow(self, first: int, last: int, depth: int, before: np.ndarray) -> None:
        """Stretches of the sorted traces first..last - 1 from `depth` on; until there they are alike."""
        while first < last:
            end = first + 1
            while end < last and self._alike[end] >= depth + SHORTEST:
                end += 1
            if end == first + 1:
                self._lay(first, end, depth, len(self._rows[self._sorted[first]]), before)
            else:
                common = min(self._alike[first + 1 : end])
                self._lay(first, end, depth, common, before)
                own = np.arange(self.size - (common - depth), self.size)
                self._grow(first, end, common, np.concatenate([before, own]))
            first = end

    def _lay(self, first: int, last: int, depth: int, end: int, before: np.ndarray) -> None:
        """Positions depth..end - 1 of the sorted traces first..last - 1, once for all of them."""
        if end == depth:
            return
        places = np.arange(self.size, self.size + end - depth)
        self.place[self._sorted[first:last], depth:end] = places
        self.source.append(self._sorted[first] * self.width + np.arange(depth, end))
        self.positions.append(np.arange(depth, end))
        self.nodes.append(_Node(before, self.size, end - depth))
        self.size += end - depth


def _stretches(nodes: Sequence[_Node], tokens: int) -> tuple[tuple[Stretches, ...], np.ndarray]:
    """All stretches, those of about one size (within powers of two) in one call, and `Packing.order`."""
    sizes: dict[tuple[int, int], list[_Node]] = {}
    for node in nodes:
        sizes.setdefault((len(node.before).bit_length(), node.length.bit_length()), []).append(node)
    order = np.zeros(tokens, dtype=np.int64)
    offset = 0
    for _, members in sorted(sizes.items()):
        longest = max(node.length for node in members)
        for row, node in enumerate(members):
            order[node.start : node.start + node.length] = offset + row * longest + np.arange(node.length)
        offset += len(members) * longest
    return tuple(_one_call(members) for _, members in sorted(sizes.items())), order


def _one_call(members: Sequence[_Node]) -> Stretches:
    """Keys are what stands before, padded to the longest, then the stretch itself, padded likewise."""
    longest_before = max(len(node.before) for node in members)
    longest = max(node.length for node in members)
    queries = np.zeros((len(members), longest), dtype=np.int64)
    query_positions = np.zeros_like(queries)
    keys = np.zeros((len(members), longest_before + longest), dtype=np.int64)
    key_positions = np.full_like(keys, NEVER)
    for row, node in enumerate(members):
        size, length = len(node.before), node.length
        own, at = np.arange(node.start, node.start + length), size + np.arange(length)
        queries[row, :length], query_positions[row, :length] = own, at
        keys[row, :size], key_positions[row, :size] = node.before, np.arange(size)
        keys[row, longest_before : longest_before + length] = own
        key_positions[row, longest_before : longest_before + length] = at
    return Stretches(
        queries=torch.from_numpy(queries),
        keys=torch.from_numpy(keys),
        query_positions=torch.from_numpy(query_positions),
        key_positions=torch.from_numpy(key_positions),
        causal=longest_before == 0,
    )
