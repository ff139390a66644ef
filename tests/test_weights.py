"""Weights as numpy views, and their checksum."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rairl_ray.engines.weights import checksum, pack, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 4), max_size=3)), max_size=5), st.randoms()
)
def test_pack_and_checksum(parts: list[tuple[int, list[int]]], random: Any) -> None:
    named = {f"t{i}": (100 * torch.randn(shape)).to(DTYPES[kind]) for i, (kind, shape) in enumerate(parts)}
    back = unpack(pack(named))
    assert all(
        torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in named.items()
    )
    items = list(named.items())
    random.shuffle(items)
    assert checksum(items) == checksum(named) == checksum(back)
    for name, tensor in named.items():
        if tensor.numel():
            assert checksum({**named, name: tensor + 1}) != checksum(named)
    if named:
        assert checksum(items[1:]) != checksum(named)


def test_views_are_not_copies_and_read_only_ones_are_safe() -> None:
    tensor = torch.ones(3, 2, dtype=torch.bfloat16)
    array, dtype = pack({"a": tensor})["a"]
    assert (array.dtype, dtype) == (np.int16, "bfloat16")
    tensor.zero_()
    assert not array.any()
    array.flags.writeable = False
    unpack({"a": (array, dtype)})["a"].fill_(1)
    assert not array.any()
