"""Keyed randomness: every draw is a function of (run seed, stream, ids, step), never of process state.

A resumed, resharded or restarted run therefore repeats itself (AGENTS.md, principles).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable

import numpy as np


def key_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def keyed_random(*parts: object) -> random.Random:
    """A fresh `random.Random` for one keyed draw."""
    return random.Random(key_seed(*parts))


def keyed_generator(*parts: object) -> np.random.Generator:
    """A fresh numpy generator for one keyed draw."""
    return np.random.Generator(np.random.PCG64(key_seed(*parts)))


def occurrences(ids: Iterable[str]) -> list[int]:
    """How often each id stands before itself: 0, and 1 where a problem is drawn a second time in a step."""
    seen: Counter[str] = Counter()
    places = []
    for name in ids:
        places.append(seen[name])
        seen[name] += 1
    return places
