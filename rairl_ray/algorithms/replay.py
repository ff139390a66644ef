"""Past traces that the discriminator sees again, so that it does not forget old policies (docs/method.md 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rairl_ray.keys import keyed_random
from rairl_ray.types import Prompt, Trace


class ReplayBuffer:
    """At most `capacity` traces; when full, each new one replaces a random old one.

    Random replacement keeps a long tail of old policies, where first-in-first-out would keep only the newest.
    Every draw is keyed by (seed, number of traces ever added) or by the caller's key, so a resumed run
    repeats itself.
    """

    def __init__(self, capacity: int, seed: int = 0) -> None:
        self.capacity = capacity
        self.seed = seed
        self._added = 0
        self._traces: list[Trace] = []

    def __len__(self) -> int:
        return len(self._traces)

    def add(self, traces: Sequence[Trace]) -> None:
        for trace in traces:
            if len(self._traces) < self.capacity:
                self._traces.append(trace)
            elif self.capacity > 0:
                slot = keyed_random(self.seed, "replay-evict", self._added).randrange(self.capacity)
                self._traces[slot] = trace
            self._added += 1

    def sample(self, count: int, key: tuple[object, ...]) -> list[Trace]:
        """Up to `count` different traces; the same key on the same content gives the same traces."""
        drawn = min(count, len(self._traces))
        return keyed_random(self.seed, "replay-sample", *key).sample(self._traces, drawn)

    def state(self) -> dict[str, Any]:
        """Everything, as JSON-able values (prompt metadata must be JSON-able itself)."""
        return {
            "capacity": self.capacity,
            "seed": self.seed,
            "added": self._added,
            "traces": [asdict(trace) for trace in self._traces],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ReplayBuffer:
        buffer = cls(state["capacity"], state["seed"])
        buffer._added = state["added"]
        buffer._traces = [_trace(fields) for fields in state["traces"]]
        return buffer


def _trace(fields: dict[str, Any]) -> Trace:
    token_ids = fields["token_ids"]
    return Trace(
        **{
            **fields,
            "prompt": Prompt(**fields["prompt"]),
            "token_ids": None if token_ids is None else tuple(token_ids),  # JSON has no tuples
        }
    )
