"""Finds prompts that are longer than `data.max_prompt_tokens` before anything starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks.generated import GeneratedSplit
from rairl_ray.errors import DataError
from rairl_ray.types import Demonstration

PROBED = 500
"""Generated problems are all of about one length: so many are checked, and the rest is trusted."""
SHOWN = 20

_log = logging.getLogger(__name__)


def fit_prompt_length(
    demonstrations: Sequence[Demonstration],
    renderer: Renderer,
    max_prompt_tokens: int,
    on_bad_row: Literal["fail", "skip"],
) -> Sequence[Demonstration]:
    """The rows whose rendered prompt has at most `max_prompt_tokens` tokens.

    Raises DataError naming the longer ones, or leaves them out and warns (`data.on_bad_row=skip`).
    """
    generated = isinstance(demonstrations, GeneratedSplit)
    checked = (
        [demonstrations[i] for i in range(min(PROBED, len(demonstrations)))] if generated else demonstrations
    )
    lengths = [len(renderer.prompt_ids(row.prompt)) for row in checked]
    long = [(row, n) for row, n in zip(checked, lengths, strict=True) if n > max_prompt_tokens]
    if not long:
        return demonstrations
    names = ", ".join(f"{row.prompt.id} ({n} tokens)" for row, n in long[:SHOWN])
    more = f" and {len(long) - SHOWN} more" if len(long) > SHOWN else ""
    found = f"data.max_prompt_tokens={max_prompt_tokens}: {len(long)} longer prompts: {names}{more}"
    if generated or on_bad_row == "fail" or len(long) == len(demonstrations):
        skip = "" if generated else ", or set data.on_bad_row=skip"
        raise DataError(f"{found}; raise it (within the model's window) or shorten data.system_prompt{skip}")
    _log.warning("%s; skipped", found)
    return [row for row, n in zip(checked, lengths, strict=True) if n <= max_prompt_tokens]
