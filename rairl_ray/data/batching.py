"""Which rank and micro-batch a trace goes to, and the padded tensors a model reads.

All of it is deterministic, and none of it changes a loss: denominators are those of the whole batch
(PolicyBatch, DiscriminatorBatch), whatever the split. Tensors are right padded (docs/method.md 8, defect 7) and
speak of completion tokens by their position in `input_ids`; a prompt or padding token is never a target.
Dimensions: B rows, L positions, T completion tokens, U units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from rairl_ray.data.packing import Packing, pack
from rairl_ray.types import DiscriminatorSample, PolicySample

Samples = Sequence[PolicySample] | Sequence[DiscriminatorSample]

KEYS_PER_TOKEN = 4
"""Keys of attention (one copy of a prompt for each of its traces) that a pass may hold for each of its tokens:
with shared key heads they are a twentieth of what the backward pass keeps of a token."""
HALVINGS = 4
"""How often the largest piece of a prompt's traces is halved in search of ranks with equal work."""


def balance(lengths: Sequence[int], ranks: int, groups: Sequence[int] | None = None) -> list[list[int]]:
    """Splits rows over ranks with about equal tokens: longest group first, to the lightest rank.

    `groups` [N] are ids of rows that must share a rank. Returns one increasing index list a rank, empty
    for a rank without work; ties go to the earlier group and the lower rank.
    """
    if ranks < 1:
        raise ValueError(f"cannot balance over {ranks} ranks")
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    weighted = [(sum(lengths[row] for row in rows), rows) for rows in _grouped(lengths, groups)]
    for weight, rows in sorted(weighted, key=lambda item: (-item[0], item[1][0])):
        rank = min(range(ranks), key=lambda r: (loads[r], len(shares[r]), r))
        shares[rank].extend(rows)
        loads[rank] += weight
    return [sorted(share) for share in shares]


def micro_batches(
    lengths: Sequence[int], tokens_per_micro_batch: int, groups: Sequence[int] | None = None
) -> list[list[int]]:
    """Splits rows into forward passes of rows x longest row <= `tokens_per_micro_batch` padded tokens.

    Rows of about one length go together (longest first). A group of `groups` [N] is never split; one that
    is over the budget by itself is a micro-batch of its own.
    """
    batches: list[list[int]] = []
    current: list[int] = []
    width = 0
    ordered = sorted(_grouped(lengths, groups), key=lambda rows: (-max(lengths[row] for row in rows), rows[0]))
    for rows in ordered:
        widest = max(width, max(lengths[row] for row in rows))
        if current and (len(current) + len(rows)) * widest > tokens_per_micro_batch:
            batches.append(current)
            current, widest = [], max(lengths[row] for row in rows)
        current = current + rows
        width = widest
    return [*batches, current] if current else batches


def shares(
    samples: Samples, ranks: int, tokens: int, *, packed: bool, groups: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """Splits samples over ranks and forward passes: rank -> passes -> rows; a rank may have none.

    `packed`: for rows that are packed, else for padded ones. Rows of one of `groups` [N] share a pass.
    """
    if packed:
        return _packed_shares(samples, ranks, tokens, groups)
    lengths = [len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples]
    plans = []
    for share in balance(lengths, ranks, groups):
        passes = micro_batches(
            [lengths[i] for i in share], tokens, None if groups is None else [groups[i] for i in share]
        )
        plans.append([[share[i] for i in rows] for rows in passes])
    return plans


def _packed_shares(
    samples: Samples, ranks: int, tokens: int, groups: Sequence[int] | None
) -> list[list[list[int]]]:
    """The same for packed rows (data/packing.py), in increasing order.

    A pass costs at most `tokens` (`_costs`). Traces of one prompt share a pass, unless that is over the budget
    or lets ranks wait for each other; those of one of `groups` [N] always do, and may be over the budget.
    """
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [numbers.setdefault(sample.prompt_ids, len(numbers)) for sample in samples]
    cost = _costs(samples, prompts)
    together = _grouped(prompts, prompts if groups is None else groups)
    total = sum(map(cost, together))
    plans = []
    for halvings in range(HALVINGS if groups is None else 1):
        pieces = together
        if groups is None:
            limit = min(tokens, math.ceil(total / ranks / 2**halvings))
            pieces = [piece for rows in together for piece in _pieces(samples, rows, limit, cost)]
        costs = [cost(piece) for piece in pieces]
        split = [[pieces[i] for i in share] for share in balance(costs, ranks)]
        plans.append((max(sum(map(cost, share)) for share in split), split))
    _, best = min(plans, key=lambda plan: plan[0])
    return [_filled(share, tokens, cost) for share in best]


def _costs(samples: Samples, prompts: Sequence[int]) -> Callable[[Sequence[int]], int]:
    """What rows cost in one pass: packed tokens, or keys of attention where a long prompt has many traces."""
    sizes = [(len(sample.prompt_ids), len(sample.completion_ids)) for sample in samples]

    def cost(rows: Sequence[int]) -> int:
        once = sum({prompts[row]: sizes[row][0] for row in rows}.values())
        keys = sum(sum(sizes[row]) for row in rows)
        return max(once + sum(sizes[row][1] for row in rows), math.ceil(keys / KEYS_PER_TOKEN))

    return cost


def _pieces(
    samples: Samples,
    rows: Sequence[int],
    limit: int,
    cost: Callable[[Sequence[int]], int],
) -> list[list[int]]:
    """The traces of one prompt in as few parts of about one size as cost `limit` at most, or one by one."""
    lengths = [len(samples[row].completion_ids) for row in rows]
    for count in range(1, len(rows) + 1):
        pieces = [[rows[i] for i in share] for share in balance(lengths, count)]
        if count == len(rows) or max(map(cost, pieces)) <= limit:
            break
    return pieces


def _filled(pieces: Sequence[list[int]], tokens: int, cost: Callable[[Sequence[int]], int]) -> list[list[int]]:
    """First fit, the dearest first."""
    passes: list[list[int]] = []
    for piece in sorted(pieces, key=lambda rows: (-cost(rows), rows[0])):
        for index, rows in enumerate(passes):
            if cost(rows + piece) <= tokens:
                passes[index] = rows + piece
                break
        else:
            passes.append(piece)
    return [sorted(rows) for rows in passes]


def _grouped(lengths: Sequence[int], groups: Sequence[int] | None) -> list[list[int]]:
    if groups is None:
        return [[row] for row in range(len(lengths))]
    if len(groups) != len(lengths):
        raise ValueError(f"{len(lengths)} rows but {len(groups)} group ids")
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    return list(members.values())


@dataclass(frozen=True, kw_only=True)
class SequenceTensors:
    """Prompt and completion of B traces, right padded."""

    input_ids: Tensor
    """[B, L] int64: prompt, completion, padding."""
    attention_mask: Tensor
    """[B, L] int64: 1 for prompt and completion."""
    prompt_lengths: Tensor
    """[B] int64"""
    completion_ids: Tensor
    """[B, T] int64; padding has pad_id."""
    completion_mask: Tensor
    """[B, T] bool"""
    target_positions: Tensor
    """[B, T] int64: position of each completion token in `input_ids`; the logits that predict it stand at
    position - 1. Padding has 1, a position that can be gathered and must be masked."""
    packing: Packing | None = None
    """How the model reads these rows without padding and each prompt once; None: as they are."""

    def to(self, device: torch.device | str) -> Self:
        moved: dict[str, Any] = {}
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            moved[name] = None if value is None else value.to(device)
        return type(self)(**moved)


@dataclass(frozen=True, kw_only=True)
class PolicyTensors(SequenceTensors):
    """A micro-batch of PolicySample."""

    advantages: Tensor
    """[B, T] float32, 0 at padding (the mask, not the zero, says what is padding)."""
    sampling_logprobs: Tensor
    """[B, T] float32, 0 where unknown."""
    expert: Tensor
    """[B] bool: an expert trace without sampling log-probabilities (its ratio is 1)."""


@dataclass(frozen=True, kw_only=True)
class DiscriminatorTensors(SequenceTensors):
    """A micro-batch of DiscriminatorSample."""

    unit_positions: Tensor
    """[B, U] int64: position in `input_ids` of each unit's last token; padding has 0."""
    unit_mask: Tensor
    """[B, U] bool"""
    unit_start_index: Tensor
    """[B, U] int64: completion-token index of each unit's first token; padding has 0."""
    unit_end_index: Tensor
    """[B, U] int64: completion-token index of each unit's last token (inclusive); padding has 0."""
    positive: Tensor
    """[B] bool"""
    pair_id: Tensor
    """[B] int64"""
    policy_logprobs: Tensor
    """[B, U] float32: log pi of each unit's segment, 0 where not given."""
    reference_logprobs: Tensor | None
    """[B, T] float32: the implicit head's reference, 0 at padding; None unless all samples bring it along."""


def policy_tensors(samples: Sequence[PolicySample], pad_id: int, *, packed: bool = False) -> PolicyTensors:
    """Pads a micro-batch of the policy learner; `packed` adds how its rows are read without padding."""
    for sample in samples:
        _check_length("advantages", sample.advantages, sample.completion_ids)
        if sample.sampling_logprobs is not None:
            _check_length("sampling_logprobs", sample.sampling_logprobs, sample.completion_ids)
    sampling = [_or_zeros(s.sampling_logprobs, s.completion_ids) for s in samples]
    return PolicyTensors(
        **_sequences(samples, pad_id, packed),
        advantages=_padded([s.advantages for s in samples], 0.0, torch.float32),
        sampling_logprobs=_padded(sampling, 0.0, torch.float32),
        expert=torch.tensor([s.sampling_logprobs is None for s in samples], dtype=torch.bool),
    )


def discriminator_tensors(
    samples: Sequence[DiscriminatorSample], pad_id: int, *, packed: bool = False
) -> DiscriminatorTensors:
    """Pads a micro-batch of the discriminator learner; `packed` adds how its rows are read without padding."""
    for sample in samples:
        _check_length("unit_starts", sample.unit_starts, sample.unit_tokens)
        if sample.policy_logprobs is not None:
            _check_length("policy_logprobs", sample.policy_logprobs, sample.unit_tokens)
        if sample.reference_logprobs is not None:
            _check_length("reference_logprobs", sample.reference_logprobs, sample.completion_ids)
        if len(sample.unit_tokens) and int(sample.unit_tokens[-1]) >= len(sample.completion_ids):
            raise ValueError(f"unit ends at token {sample.unit_tokens[-1]} of {len(sample.completion_ids)}")
    logprobs = [_or_zeros(s.policy_logprobs, s.unit_tokens) for s in samples]
    references = [s.reference_logprobs for s in samples if s.reference_logprobs is not None]
    known = len(references) == len(samples)
    return DiscriminatorTensors(
        **_sequences(samples, pad_id, packed),
        unit_positions=_padded([s.unit_tokens + len(s.prompt_ids) for s in samples], 0, torch.int64),
        unit_mask=_mask([len(s.unit_tokens) for s in samples]),
        unit_start_index=_padded([s.unit_starts for s in samples], 0, torch.int64),
        unit_end_index=_padded([s.unit_tokens for s in samples], 0, torch.int64),
        positive=torch.tensor([s.positive for s in samples], dtype=torch.bool),
        pair_id=torch.tensor([s.pair_id for s in samples], dtype=torch.int64),
        policy_logprobs=_padded(logprobs, 0.0, torch.float32),
        reference_logprobs=_padded(references, 0.0, torch.float32) if known else None,
    )


def _sequences(samples: Samples, pad_id: int, packed: bool) -> dict[str, Any]:
    if not samples:
        raise ValueError("a micro-batch needs at least one sample")
    if any(not s.prompt_ids for s in samples):
        raise ValueError("a prompt without tokens: nothing predicts the first completion token")
    rows = [np.array(s.prompt_ids + s.completion_ids, dtype=np.int64) for s in samples]
    targets = [np.arange(len(s.completion_ids), dtype=np.int64) + len(s.prompt_ids) for s in samples]
    completions = [np.array(s.completion_ids, dtype=np.int64) for s in samples]
    return {
        "input_ids": _padded(rows, pad_id, torch.int64),
        "attention_mask": _mask([len(row) for row in rows]).long(),
        "prompt_lengths": torch.tensor([len(s.prompt_ids) for s in samples], dtype=torch.int64),
        "completion_ids": _padded(completions, pad_id, torch.int64),
        "completion_mask": _mask([len(ids) for ids in completions]),
        "target_positions": _padded(targets, 1, torch.int64),
        "packing": pack([s.prompt_ids + s.completion_ids for s in samples]) if packed else None,
    }


def _padded(rows: Sequence[np.ndarray], value: float, dtype: torch.dtype) -> Tensor:
    """[B, longest]"""
    padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=dtype)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row, dtype=dtype)
    return padded


def _mask(lengths: Sequence[int]) -> Tensor:
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def _or_zeros(values: np.ndarray | None, like: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.zeros(len(like), dtype=np.float32) if values is None else values


def _check_length(name: str, values: np.ndarray, like: Sequence[int] | np.ndarray) -> None:
    if len(values) != len(like):
        raise ValueError(f"{name} has {len(values)} values for {len(like)} tokens")
