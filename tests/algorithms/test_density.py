"""Densities (docs/method.md 2): one mask for training, scoring, reranking; and backfill across tokenizers."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rairl_ray.algorithms.density import backfill, step_ends, unit_starts, unit_tokens
from rairl_ray.config.schema import Density

TRACE = "<think>\n3+5=8\n8+2=10\n</think>\n<answer>\n10\n</answer>"

texts = st.text(alphabet="ab 1.;!?\n<é", max_size=60)


def characters(text: str, finished: bool = True) -> list[int]:
    """Character ends of a tokenizer with one token a character, and the end-of-sequence token."""
    return list(range(1, len(text) + 1)) + ([len(text) + 1] if finished else [])


@st.composite
def tokenized(draw: st.DrawFn) -> tuple[str, list[int]]:
    """Any text with any cut into tokens, some of them without characters of their own."""
    text = draw(texts)
    cuts = draw(st.lists(st.integers(0, len(text)), max_size=30))
    finished = draw(st.booleans())
    return text, [*sorted(cuts), len(text)] + ([len(text) + 1] if finished else [])


def steps(text: str) -> list[str]:
    ends = step_ends(text)
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


@given(tokenized(), st.integers(1, 40))
def test_invariants_of_all_densities(case: tuple[str, list[int]], every: int) -> None:
    text, ends = case
    count = len(ends)
    sparse = unit_tokens(text, ends, Density(type="sparse"))
    interval = unit_tokens(text, ends, Density(type="interval", every=every))
    partial = unit_tokens(text, ends, Density(type="partial"))
    dense = unit_tokens(text, ends, Density(type="dense"))
    assert sparse.tolist() == [count - 1]
    assert dense.tolist() == list(range(count))
    assert interval.tolist() == [t for t in range(count) if (t + 1) % every == 0 or t == count - 1]
    for units in (sparse, interval, partial, dense):
        assert units.dtype == np.int64
        assert units[-1] == count - 1
        assert (np.diff(units) > 0).all()
        starts = unit_starts(units)
        segments = [list(range(a, b + 1)) for a, b in zip(starts, units, strict=True)]
        assert [t for segment in segments for t in segment] == list(range(count))


@given(tokenized())
def test_interval_of_one_is_dense_and_a_long_interval_is_sparse(case: tuple[str, list[int]]) -> None:
    text, ends = case
    dense, sparse = Density(type="dense"), Density(type="sparse")
    one, long = Density(type="interval", every=1), Density(type="interval", every=len(ends))
    assert unit_tokens(text, ends, one).tolist() == unit_tokens(text, ends, dense).tolist()
    assert unit_tokens(text, ends, long).tolist() == unit_tokens(text, ends, sparse).tolist()


@pytest.mark.parametrize("kind", ["sparse", "interval", "partial", "dense"])
def test_no_tokens_no_units(kind: str) -> None:
    units = unit_tokens("", [], Density(type=kind))
    assert units.shape == (0,)
    assert unit_starts(units).shape == (0,)


def test_the_prompt_is_not_even_an_argument() -> None:
    assert list(inspect.signature(unit_tokens).parameters) == ["text", "char_ends", "density"]


def test_partial_ends_at_every_step_of_a_reasoning_trace() -> None:
    units = unit_tokens(TRACE, characters(TRACE), Density(type="partial"))
    ends = {TRACE.index("8+2"), TRACE.index("</think>"), TRACE.index("<answer>") - 1}
    ends |= {TRACE.index("</answer>"), len(TRACE), len(TRACE) + 1}
    assert {int(u) + 1 for u in units} == ends


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is 3.5 kg. So 2 * 3.5 = 7.", ["It is 3.5 kg.", " So 2 * 3.5 = 7."]),
        ("Mr. Smith vs. Dr. No, e.g. the U.S. End.", ["Mr. Smith vs. Dr. No, e.g. the U.S. End."]),
        ("a; b! c? d", ["a;", " b!", " c?"]),
        ("so 5! = 120 ways. Yes", ["so 5! = 120 ways."]),
        ("one\n\n\ntwo\n", ["one\n", "\n\ntwo\n"]),
        ("1. first thing\n2. second. third", ["1. first thing\n", "2. second."]),
        ("- item one\n- item two\n", ["- item one\n", "- item two\n"]),
        ("see No. 5 and fig. 2. He said no. Then", ["see No. 5 and fig. 2.", " He said no."]),
        ('He said "stop." (She left.) Then', ['He said "stop."', " (She left.)"]),
        ("wait... what?! ok", ["wait...", " what?!"]),
        ("at example.com or v1.2.3 we go. x", ["at example.com or v1.2.3 we go."]),
        ("The answer is B.</think><answer>B</answer>", ["The answer is B.", "</think>", "<answer>B</answer>"]),
        ("<think>\n</think>", ["<think>\n</think>"]),
        ("", []),
    ],
)
def test_step_ends(text: str, expected: list[str]) -> None:
    assert steps(text) == expected


def test_several_step_ends_in_one_token_are_one_unit() -> None:
    text = "a.\nb?\nc"
    assert unit_tokens(text, [3, 6, 7], Density(type="partial")).tolist() == [0, 1, 2]
    assert unit_tokens(text, [6, 7], Density(type="partial")).tolist() == [0, 1]


def test_the_first_byte_of_the_next_character_is_no_part_of_a_step() -> None:
    text = "a\n\u00e9b"  # the accented letter as two byte tokens: the first completes no character
    units = unit_tokens(text, [1, 2, 2, 3, 4], Density(type="partial"))
    assert units.tolist() == [1, 4]
    assert backfill(np.array([2, 4]), np.array([7.0, 9.0]), [1, 2, 2, 3, 4]).tolist() == [7, 7, 9, 9, 9]


@given(tokenized(), st.sampled_from(["sparse", "interval", "partial", "dense"]), st.integers(1, 9))
def test_backfill_with_one_tokenizer_equals_index_backfill(
    case: tuple[str, list[int]], kind: str, every: int
) -> None:
    text, ends = case
    units = unit_tokens(text, ends, Density(type=kind, every=every))
    values = np.arange(len(units), dtype=np.float32)
    brute = [next(v for u, v in zip(units, values, strict=True) if u >= t) for t in range(len(ends))]
    unit_ends = np.asarray(ends)[units]
    assert backfill(unit_ends, values, ends, units).tolist() == brute
    if kind != "interval" or len(set(ends)) == len(ends):  # an interval may cut a character in two
        assert backfill(unit_ends, values, ends).tolist() == brute


@given(texts, st.data())
def test_backfill_across_tokenizers_takes_the_next_unit_by_characters(text: str, data: st.DataObject) -> None:
    cuts = st.sets(st.integers(1, max(1, len(text) - 1)))
    policy, discriminator = (
        [*sorted(c for c in data.draw(cuts) if c < len(text)), len(text), len(text) + 1] for _ in range(2)
    )
    units = unit_tokens(text, discriminator, Density(type="partial"))
    unit_ends = np.asarray(discriminator)[units]
    values = np.arange(len(units)) * 1.5
    expected = [next(v for u, v in zip(unit_ends, values, strict=True) if u >= end) for end in policy]
    assert backfill(unit_ends, values, policy).tolist() == expected


def test_tokens_after_the_last_unit_take_its_value() -> None:
    assert backfill(np.array([2, 4]), np.array([1.0, -1.0]), [1, 2, 3, 9, 9]).tolist() == [1, 1, -1, -1, -1]


def test_a_trace_without_units_has_no_reward_and_not_zero() -> None:
    assert np.isnan(backfill(np.zeros(0), np.zeros(0), [1, 2])).tolist() == [True, True]
