"""Balancing, micro-batches and padded tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rairl_ray.data.batching import balance, discriminator_tensors, micro_batches, policy_tensors
from rairl_ray.types import DiscriminatorSample, PolicySample

rows_with_groups = st.lists(st.tuples(st.integers(1, 300), st.integers(0, 6)), max_size=40)


def _groups_are_whole(parts: list[list[int]], groups: list[int]) -> bool:
    home = {}
    return all(home.setdefault(groups[row], part) == part for part, rows in enumerate(parts) for row in rows)


@given(rows_with_groups, st.integers(1, 6), st.booleans())
def test_balance(rows: list[tuple[int, int]], ranks: int, grouped: bool) -> None:
    lengths, groups = [n for n, _ in rows], [g for _, g in rows]
    shares = balance(lengths, ranks, groups if grouped else None)
    assert len(shares) == ranks
    assert sorted(row for share in shares for row in share) == list(range(len(rows)))
    assert shares == balance(lengths, ranks, groups if grouped else None)
    assert not grouped or _groups_are_whole(shares, groups)
    # Greedy longest-first leaves at most one item of difference between the ranks.
    loads = [sum(lengths[row] for row in share) for share in shares]
    units = [sum(n for n, g in rows if g == group) for group in set(groups)] if grouped else lengths
    assert max(loads) - min(loads) <= max(units, default=0)


def test_balance_of_equal_rows_is_even_and_of_uneven_rows_is_by_tokens() -> None:
    assert [len(share) for share in balance([7] * 9, 3)] == [3, 3, 3]
    assert balance([100, 10, 10, 10, 70], 2) == [[0], [1, 2, 3, 4]]
    assert balance([5, 5], 3) == [[0], [1], []]
    assert balance([0, 0, 0, 0], 2) == [[0, 2], [1, 3]]


@given(rows_with_groups, st.integers(1, 900), st.booleans())
def test_micro_batches(rows: list[tuple[int, int]], budget: int, grouped: bool) -> None:
    lengths, groups = [n for n, _ in rows], [g for _, g in rows]
    batches = micro_batches(lengths, budget, groups if grouped else None)
    assert sorted(row for batch in batches for row in batch) == list(range(len(rows)))
    assert all(batches)
    assert batches == micro_batches(lengths, budget, groups if grouped else None)
    for batch in batches:
        padded = len(batch) * max(lengths[row] for row in batch)
        single = len({groups[row] for row in batch}) == 1 if grouped else len(batch) == 1
        assert padded <= budget or single
    assert not grouped or _groups_are_whole(batches, groups)


def test_micro_batches_put_rows_of_one_length_together() -> None:
    lengths = [10, 100] * 8
    batches = micro_batches(lengths, 400)
    assert sum(len(b) * max(lengths[r] for r in b) for b in batches) == sum(lengths)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="0 ranks"):
        balance([1], 0)
    with pytest.raises(ValueError, match="2 rows but 1 group"):
        micro_batches([1, 2], 10, [0])


# --- tensors ---------------------------------------------------------------------------------------

ids = st.lists(st.integers(1, 99), min_size=1, max_size=7).map(tuple)


@st.composite
def policy_samples(draw: st.DrawFn) -> PolicySample:
    completion = draw(ids)
    values = np.array(
        draw(st.lists(st.sampled_from([0.0, -1.5, 2.0]), min_size=7, max_size=7)), dtype=np.float32
    )
    advantages = values[: len(completion)]
    logprobs = -advantages if draw(st.booleans()) else None
    return PolicySample(
        prompt_ids=draw(ids), completion_ids=completion, advantages=advantages, sampling_logprobs=logprobs
    )


@st.composite
def discriminator_samples(draw: st.DrawFn) -> DiscriminatorSample:
    completion = draw(ids)
    ends = np.array(sorted(draw(st.sets(st.integers(0, len(completion) - 1)))), dtype=np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    return DiscriminatorSample(
        prompt_ids=draw(ids), completion_ids=completion, unit_tokens=ends, unit_starts=starts,
        positive=draw(st.booleans()), pair_id=draw(st.integers(0, 5)),
        policy_logprobs=-ends.astype(np.float32) if draw(st.booleans()) else None,
    )  # fmt: skip


@given(st.lists(policy_samples(), min_size=1, max_size=5))
def test_policy_tensors_give_every_sample_back(samples: list[PolicySample]) -> None:
    batch = policy_tensors(samples, pad_id=0)
    longest = max(len(s.prompt_ids + s.completion_ids) for s in samples)
    assert batch.input_ids.shape == (len(samples), longest)
    assert batch.completion_ids.shape == (len(samples), max(len(s.completion_ids) for s in samples))
    gathered = batch.input_ids.gather(1, batch.target_positions)
    for row, sample in enumerate(samples):
        keep = batch.completion_mask[row]
        assert tuple(batch.input_ids[row, batch.attention_mask[row] == 1].tolist()) == (
            sample.prompt_ids + sample.completion_ids
        )
        assert batch.attention_mask[row].diff().le(0).all()  # right padded
        assert tuple(gathered[row, keep].tolist()) == sample.completion_ids
        assert tuple(batch.completion_ids[row, keep].tolist()) == sample.completion_ids
        assert batch.advantages[row, keep].tolist() == sample.advantages.tolist()
        assert int(keep.sum()) == len(sample.completion_ids)  # an advantage of 0.0 is no padding
        assert bool(batch.expert[row]) == (sample.sampling_logprobs is None)
        expected = (
            [0.0] * len(sample.completion_ids) if batch.expert[row] else sample.sampling_logprobs.tolist()
        )
        assert batch.sampling_logprobs[row, keep].tolist() == expected
        assert int(batch.prompt_lengths[row]) == len(sample.prompt_ids)
        # No prompt or padding position is ever a target.
        positions = batch.target_positions[row, keep]
        assert positions.min() >= len(sample.prompt_ids) and batch.attention_mask[row, positions].all()
    assert (batch.target_positions - 1 >= 0).all() and (batch.target_positions < longest).all()


@given(st.lists(discriminator_samples(), min_size=1, max_size=5))
def test_discriminator_tensors_give_every_unit_back(samples: list[DiscriminatorSample]) -> None:
    batch = discriminator_tensors(samples, pad_id=0)
    gathered = batch.input_ids.gather(1, batch.unit_positions)
    for row, sample in enumerate(samples):
        keep = batch.unit_mask[row]
        assert gathered[row, keep].tolist() == [sample.completion_ids[t] for t in sample.unit_tokens]
        assert batch.unit_start_index[row, keep].tolist() == sample.unit_starts.tolist()
        assert batch.unit_end_index[row, keep].tolist() == sample.unit_tokens.tolist()
        wanted = np.zeros(len(sample.unit_tokens)) if sample.policy_logprobs is None else sample.policy_logprobs
        assert batch.policy_logprobs[row, keep].tolist() == wanted.tolist()
        assert bool(batch.positive[row]) == sample.positive and int(batch.pair_id[row]) == sample.pair_id
        assert (batch.unit_positions[row, keep] >= len(sample.prompt_ids)).all()


def test_tensors_move_and_have_the_stated_types() -> None:
    sample = PolicySample(
        prompt_ids=(5, 6), completion_ids=(7,), advantages=np.ones(1, np.float32), sampling_logprobs=None
    )
    batch = policy_tensors([sample], pad_id=0).to("meta")
    assert batch.input_ids.device.type == "meta" and batch.advantages.device.type == "meta"
    batch = policy_tensors([sample], pad_id=0)
    assert batch.completion_mask.dtype == torch.bool and batch.expert.dtype == torch.bool
    assert batch.advantages.dtype == torch.float32 and batch.target_positions.dtype == torch.int64


def test_misaligned_samples_are_refused() -> None:
    wrong = PolicySample(prompt_ids=(1,), completion_ids=(2, 3), advantages=np.ones(1), sampling_logprobs=None)
    with pytest.raises(ValueError, match="advantages has 1 values for 2 tokens"):
        policy_tensors([wrong], pad_id=0)
    headless = PolicySample(prompt_ids=(), completion_ids=(2,), advantages=np.ones(1), sampling_logprobs=None)
    with pytest.raises(ValueError, match="a prompt without tokens"):
        policy_tensors([headless], pad_id=0)
    beyond = DiscriminatorSample(
        prompt_ids=(1,), completion_ids=(2,), unit_tokens=np.array([1]), unit_starts=np.array([0]),
        positive=True, pair_id=0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="unit ends at token 1 of 1"):
        discriminator_tensors([beyond], pad_id=0)
