"""The data cursor: complete epochs, exact restores, independence of streams."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rairl_ray.data.cursor import Cursor
from rairl_ray.errors import DataError, ResumeError


@given(st.integers(1, 30), st.integers(0, 5), st.lists(st.integers(0, 40), max_size=8))
def test_every_epoch_has_every_row_once_however_it_is_taken(size: int, seed: int, takes: list[int]) -> None:
    cursor = Cursor(size, seed, "prompts")
    taken = [index for n in takes for index in cursor.next(n)]
    assert len(taken) == sum(takes)
    assert cursor.epoch == sum(takes) // size
    for start in range(0, len(taken) - size + 1, size):
        assert sorted(taken[start : start + size]) == list(range(size))
    assert taken == Cursor(size, seed, "prompts").next(len(taken))


@given(st.integers(1, 20), st.integers(0, 60), st.integers(0, 60))
def test_a_restored_cursor_continues_exactly(size: int, before: int, after: int) -> None:
    cursor = Cursor(size, 3, "prompts")
    cursor.next(before)
    state = json.loads(json.dumps(cursor.state()))
    expected = cursor.next(after)
    restored = Cursor(size, 3, "prompts")
    restored.restore(state)
    assert restored.next(after) == expected


@pytest.mark.parametrize("before", [9, 10, 11, 20])
def test_restore_at_the_edge_of_an_epoch_neither_repeats_nor_ends(before: int) -> None:
    cursor = Cursor(10, 0, "prompts")
    cursor.next(before)
    restored = Cursor(10, 0, "prompts")
    restored.restore(cursor.state())
    assert restored.next(10) == cursor.next(10)


def test_epochs_seeds_and_streams_have_orders_of_their_own() -> None:
    cursor = Cursor(50, 0, "prompts")
    orders = [
        cursor.next(50),
        cursor.next(50),
        Cursor(50, 1, "prompts").next(50),
        Cursor(50, 0, "experts").next(50),
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_order_is_fixed_for_ever() -> None:
    """A change here makes every saved run unresumable."""
    assert Cursor(8, 0, "prompts").next(10) == [7, 4, 5, 3, 2, 0, 1, 6, 3, 0]


def test_bad_uses_are_refused() -> None:
    with pytest.raises(DataError, match="prompts: there are no rows"):
        Cursor(0, 0, "prompts")
    with pytest.raises(ValueError, match="-1"):
        Cursor(3, 0, "prompts").next(-1)
    for other in (Cursor(4, 0, "prompts"), Cursor(3, 1, "prompts"), Cursor(3, 0, "experts")):
        with pytest.raises(ResumeError, match="resume with the same data and seed"):
            other.restore(Cursor(3, 0, "prompts").state())
