"""The buffer of past traces: bounded, keyed, exact after a save."""

from __future__ import annotations

import json
from collections import Counter

from rairl_ray.algorithms.replay import ReplayBuffer
from rairl_ray.types import Prompt, Trace


def trace(number: int) -> Trace:
    prompt = Prompt(id=f"p{number}", question="q", answer=None, metadata={"options": ["a", "b"], "n": number})
    ids = (number, 2) if number % 2 else None
    return Trace(prompt=prompt, text=f"t{number}", finished=number % 3 > 0, token_ids=ids, edit_char=None)


def test_capacity_is_a_bound_and_nothing_is_evicted_before_it() -> None:
    buffer = ReplayBuffer(5, seed=1)
    buffer.add([trace(n) for n in range(5)])
    assert sorted(t.text for t in buffer.sample(9, ("k",))) == ["t0", "t1", "t2", "t3", "t4"]
    buffer.add([trace(n) for n in range(5, 50)])
    assert len(buffer) == 5
    held = {t.text for t in buffer.sample(5, ("k",))}
    assert "t49" in held, "the newest is always kept"
    assert held - {"t45", "t46", "t47", "t48", "t49"}, "older ones survive: it is no queue"


def test_zero_capacity_is_off() -> None:
    buffer = ReplayBuffer(0)
    buffer.add([trace(1)])
    assert len(buffer) == 0
    assert buffer.sample(3, ("k",)) == []


def test_samples_are_different_traces_and_depend_on_the_key_alone() -> None:
    buffer = ReplayBuffer(40, seed=1)
    buffer.add([trace(n) for n in range(40)])
    first = buffer.sample(10, (3, "a"))
    assert len({t.text for t in first}) == 10
    assert first == buffer.sample(10, (3, "a"))
    assert first != buffer.sample(10, (4, "a"))


def test_every_old_trace_is_as_likely_to_be_replaced() -> None:
    evicted: Counter[str] = Counter()
    for seed in range(900):
        buffer = ReplayBuffer(3, seed)
        buffer.add([trace(n) for n in range(4)])
        evicted.update({"t0", "t1", "t2"} - {t.text for t in buffer.sample(3, ())})
    assert all(240 < evicted[name] < 360 for name in ("t0", "t1", "t2"))


def test_state_survives_json_and_goes_on_exactly() -> None:
    kept = ReplayBuffer(6, seed=9)
    kept.add([trace(n) for n in range(20)])
    resumed = ReplayBuffer.from_state(json.loads(json.dumps(kept.state())))
    assert resumed.state() == kept.state()
    for buffer in (kept, resumed):
        buffer.add([trace(n) for n in range(20, 30)])
    assert resumed.sample(6, ("x",)) == kept.sample(6, ("x",))
    assert resumed.sample(6, ("x",))[0].prompt.metadata["options"] == ["a", "b"]
