"""Nodes that are about to go: Ray's drain notices, which autoscalers and the ends of spot machines give."""

from __future__ import annotations

from collections.abc import Iterable

import ray


class Drained(Exception):
    """Everything is saved, and the attempt ends because nodes of the run are being drained."""

    def __init__(self, nodes: Iterable[str], step: int) -> None:
        names = ", ".join(sorted(node[:8] for node in nodes))
        super().__init__(f"node {names} is being drained: saved after step {step}, the run moves")


def draining_nodes() -> set[str]:
    """Ids of the nodes that the connected cluster is draining."""
    # The function that Ray's own libraries ask; there is no public one.
    return set(ray._private.state.state.get_draining_nodes())
