"""Nodes that are about to go: Ray's drain notices, which autoscalers and the ends of spot machines give."""

from __future__ import annotations

from collections.abc import Iterable

import ray

from rairl_ray.actors.head import HeadAway, ask


class Drained(Exception):
    """Everything is saved, and the attempt ends because nodes of the run are being drained."""

    def __init__(self, nodes: Iterable[str], step: int) -> None:
        names = ", ".join(sorted(node[:8] for node in nodes))
        super().__init__(f"node {names} is being drained: saved after step {step}, the run moves")


_noticed: set[str] = set()
"""All that this process was told of: a notice is never taken back, but Ray forgets it with the node."""


def notices() -> set[str]:
    """Ids of the nodes of which the connected cluster says, or has said, that it drains them."""
    # The function that Ray's own libraries ask; there is no public one.
    _noticed.update(ray._private.state.state.get_draining_nodes())
    return set(_noticed)


def draining_nodes() -> set[str]:
    """The same for a step, which does not wait: none while the head is away, who tells it when it is back."""
    try:
        return ask(notices)
    except HeadAway:
        return set()
