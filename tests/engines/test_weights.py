"""Weights on their way: chunks, numpy views, the checksum, adapters in shared memory."""

from __future__ import annotations

import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rairl_ray.actors import weight_sync
from rairl_ray.engines import weights
from rairl_ray.engines.weights import (
    Checksum,
    adapter_folder,
    bounded,
    checksum,
    pack,
    saved_chunks,
    unpack,
    whole,
)

DTYPES = [torch.float32, torch.bfloat16, torch.int64]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 4), max_size=3)), max_size=5), st.randoms()
)
def test_pack_and_checksum(parts: list[tuple[int, list[int]]], random: Any) -> None:
    named = {f"t{i}": (10 * torch.randn(shape)).to(DTYPES[kind]) for i, (kind, shape) in enumerate(parts)}
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


def test_nothing_is_copied_on_the_way() -> None:
    tensor = torch.ones(3, 2, dtype=torch.bfloat16)
    array, dtype = pack({"a": tensor})["a"]
    assert (array.dtype, dtype) == (np.int16, "bfloat16")
    tensor.zero_()
    assert not array.any()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared = unpack({"a": (array, dtype)})["a"]
    assert shared.dtype == torch.bfloat16 and shared.data_ptr() == tensor.data_ptr()


@given(st.lists(st.integers(0, 30), max_size=12), st.integers(1, 40))
def test_groups_are_bounded_and_lose_nothing(sizes: list[int], limit: int) -> None:
    groups = list(bounded(((index, size) for index, size in enumerate(sizes)), limit))
    assert [index for group in groups for index in group] == list(range(len(sizes)))
    for group in groups:
        assert sum(sizes[index] for index in group) <= limit or len(group) == 1
    # no two neighbours would have fitted together
    first = [sizes[group[0]] for group in groups]
    for group, following in zip(groups, first[1:], strict=False):
        assert sum(sizes[index] for index in group) + following > limit


def test_the_checksum_knows_nothing_of_chunks_but_names_and_repetitions() -> None:
    named = {f"layer.{i}": torch.randn(3, 4) for i in range(7)}
    expected = checksum(named)
    for size in (1, 2, 7):
        digest = Checksum()
        names = list(named)[::-1]
        for start in range(0, len(names), size):
            for name in names[start : start + size]:
                digest.add(name, named[name])
        assert digest.hexdigest() == expected
    swapped = {**named, "layer.0": named["layer.1"], "layer.1": named["layer.0"]}
    assert checksum(swapped) != expected
    assert checksum({**named, "layer.0": named["layer.0"].to(torch.bfloat16)}) != expected
    assert checksum({**named, "layer.0": named["layer.0"].reshape(4, 3)}) != expected
    with pytest.raises(ValueError, match=r"layer\.0 came twice"):
        checksum([*named.items(), ("layer.0", named["layer.0"])])


def test_a_chunk_is_let_go_before_the_next_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the learner holds at once: never two chunks. `ray.put` copies, so its stand-in keeps nothing."""
    held: list[weakref.ref] = []
    puts: list[int] = []

    def chunks() -> Any:
        for index in range(5):
            gc.collect()
            assert not any(ref() is not None for ref in held), "an earlier chunk is still held"
            tensor = torch.full((1000,), float(index))
            held.append(weakref.ref(tensor))
            chunk = {f"t{index}": tensor}
            del tensor
            yield chunk
            del chunk

    def put(packed: Any) -> int:
        puts.append(sum(array.nbytes for array, _ in packed.values()))
        return len(puts)

    monkeypatch.setattr(weight_sync.ray, "put", put)
    update = weight_sync.put_update(chunks(), 3, None)
    assert puts == [4000] * 5 and update.chunks == (1, 2, 3, 4, 5)
    assert update.checksum == checksum({f"t{i}": torch.full((1000,), float(i)) for i in range(5)})


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_saved_policy_is_read_chunk_by_chunk(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights.bounded, "__defaults__", (1200,))
    named = {f"layer.{i}": torch.randn(10, 5) for i in range(6)}
    if kind == "adapter":
        save_file(named, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    else:
        items = list(named.items())
        save_file(dict(items[:4]), tmp_path / "model-00001-of-00002.safetensors")
        save_file(dict(items[4:]), tmp_path / "model-00002-of-00002.safetensors")
    parts, config = saved_chunks(tmp_path)
    read = list(parts)
    assert config == ({"r": 4} if kind == "adapter" else None)
    assert len(read) == 2 + (kind == "full") and checksum(whole(read)) == checksum(named)


def test_an_adapter_lies_in_shared_memory_only_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared, ordinary = tmp_path / "shared", tmp_path / "ordinary"
    shared.mkdir(), ordinary.mkdir()
    monkeypatch.setattr(weights, "SHARED_MEMORY", shared)
    monkeypatch.setenv("TMPDIR", str(ordinary))
    monkeypatch.setattr("tempfile.tempdir", None)
    named = {"base.lora_A.weight": torch.randn(4, 8).T}
    paths = []
    for _ in range(3):
        with adapter_folder(named, {"r": 4, "target_modules": {"q_proj"}}) as folder:
            assert Path(folder).parent == shared
            assert checksum(load_file(f"{folder}/adapter_model.safetensors")) == checksum(named)
            assert json.loads(Path(folder, "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
        assert not Path(folder).exists()
        paths.append(folder)
    assert len(set(paths)) == 3
    # a container's shared memory is often too small, or missing
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 100})())
    with adapter_folder(named, {}) as folder:
        assert Path(folder).parent == ordinary
    monkeypatch.setattr(weights, "SHARED_MEMORY", tmp_path / "absent")
    with adapter_folder(named, {}) as folder:
        assert Path(folder).parent == ordinary
