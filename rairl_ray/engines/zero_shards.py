"""Reshards a learner's saved state for another number of ranks or another ZeRO stage.

DeepSpeed loads a ZeRO checkpoint only on as many ranks as wrote it; its universal format converts a whole
checkpoint into a second folder first, and leaves out stage 0. Here each rank reads, out of the saved files
(memory-mapped), just the pieces of the parameters that are now its own. Bits are moved, not computed:
master weights and Adam moments come out as they went in.

An optimizer holds its state in vectors, and a stage is a rule which piece of which parameter lies where:
    stage 0      a vector for each parameter, the same on all ranks
    stage 1, 2   a vector for each parameter group, all its parameters joined and cut into equal parts
    stage 3      a vector for each sub-group, each of its parameters cut into equal parts
The files are those of deepspeed/runtime/zero/{stage_1_and_2,stage3}.py and bf16_optimizer.py (0.19).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")

BASE = {1: "base_optimizer_state", 2: "base_optimizer_state", 3: "optimizer_state_dict"}
"""Stage -> where DeepSpeed's optimizer keeps the state of the torch optimizer inside it."""
MASTERS = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups", 3: "fp32_flat_groups"}
"""Stage -> its float32 weights."""

Shapes = Sequence[Mapping[str, Sequence[int]]]
"""For each vector, the parameters in it in order: name -> shape."""


class Piece(NamedTuple):
    """Part of a flattened parameter in a rank's vector."""

    name: str
    start: int
    """Place in the parameter."""
    numel: int
    offset: int
    """Place in the vector."""


@dataclass(frozen=True)
class Saved:
    """One learner's state, by parameter."""

    values: dict[str, dict[str, list[tuple[int, Tensor]]]]
    """Parameter -> master, exp_avg or exp_avg_sq -> (place in the flattened parameter, values), in order."""
    step: Tensor
    """Adam's count of updates."""
    groups: list[dict[str, Any]]
    """Hyperparameters (learning rate, ...) of each parameter group."""
    common: dict[str, Any]
    """DeepSpeed's model file: schedule and counters."""


def pieces(
    group: Mapping[str, Sequence[int]], stage: int, rank: int, ranks: int, length: int
) -> Iterator[Piece]:
    """What a rank's vector of `length` values holds; the rest of it is padding."""
    begin = 0
    for name, shape in group.items():
        numel = math.prod(shape)
        if stage == 3:
            part = -(-numel // ranks)
            start = min(rank * part, numel)
            yield Piece(name, start, min(part, numel - start), begin)
            begin += part
            continue
        first = 0 if stage == 0 else rank * length
        low, high = max(begin, first), min(begin + numel, first + length)
        if low < high:
            yield Piece(name, low - begin, high - low, low - first)
        begin += numel


def read(folder: Path, ranks: int, stage: int, plain: Shapes) -> Saved:
    """Open the files that `ranks` ranks at ZeRO `stage` left in `folder`; nothing is read before it is used.

    Args:
        plain: the parameters in the order of the torch optimizer, which at stage 0 are not in the files.
    """
    model = "mp_rank_00_model_states.pt" if stage < 3 else "*zero_pp_rank_0_mp_rank_00_model_states.pt"
    common = _load(folder, model)
    values: dict[str, dict[str, list[tuple[int, Tensor]]]] = {}
    base: dict[str, Any] = {}
    for rank in range(ranks if stage else 1):
        if stage:
            shard = _load(folder, f"*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]
            base, masters, shapes = shard[BASE[stage]], shard[MASTERS[stage]], common["param_shapes"]
        else:
            base, shapes = common["optimizer"], plain
            masters = [common["module"][name] for group in shapes for name in group]
        for index, group in enumerate(shapes):
            vectors = {MASTER: masters[index], **{kind: base["state"][index][kind] for kind in MOMENTS}}
            for piece in pieces(group, stage, rank, ranks, vectors["exp_avg"].numel()):
                kinds = values.setdefault(piece.name, {})
                for kind, vector in vectors.items():
                    taken = vector.reshape(-1).narrow(0, piece.offset, piece.numel)
                    kinds.setdefault(kind, []).append((piece.start, taken))
    return Saved(values, base["state"][0]["step"], base["param_groups"], common)


def reshard(
    saved: Saved, shapes: Shapes, lengths: Sequence[int], param_groups: Sequence[Mapping[str, Any]],
    *, stage: int, rank: int, ranks: int,
) -> tuple[list[Tensor], dict[str, Any]]:  # fmt: skip
    """(master vectors, state of the torch optimizer) of one rank in a new layout.

    Args:
        lengths: size of each vector, padding included.
        param_groups: the new optimizer's own, for which vectors belong to which group.
    """
    masters, state = [], {}
    for index, (group, length) in enumerate(zip(shapes, lengths, strict=True)):
        vectors = {kind: torch.zeros(length) for kind in (MASTER, *MOMENTS)}
        for piece in pieces(group, stage, rank, ranks, length):
            for kind, vector in vectors.items():
                _fill(vector.narrow(0, piece.offset, piece.numel), saved.values[piece.name][kind], piece)
        masters.append(vectors.pop(MASTER))
        state[index] = {"step": saved.step.clone(), **vectors}
    groups = [{**old, "params": new["params"]} for old, new in zip(saved.groups, param_groups, strict=True)]
    return masters, {"state": state, "param_groups": groups}


def _fill(target: Tensor, values: Sequence[tuple[int, Tensor]], piece: Piece) -> None:
    end, filled = piece.start + piece.numel, 0
    for place, taken in values:
        low, high = max(piece.start, place), min(end, place + taken.numel())
        if low < high:
            target[low - piece.start : high - piece.start] = taken[low - place : high - place]
            filled += high - low
    if filled != piece.numel:
        raise ValueError(f"{piece.name}: {filled} of {piece.numel} values from {piece.start} on are there")


def _load(folder: Path, pattern: str) -> dict[str, Any]:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: {len(found)} files are called {pattern}, not one")
    loaded: dict[str, Any] = torch.load(found[0], map_location="cpu", weights_only=False, mmap=True)
    return loaded
