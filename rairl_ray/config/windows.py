"""How many positions a model has, whatever its `config.json` calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WINDOW_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "seq_len",
    "n_ctx",
    "context_length",
    "model_max_length",
)
"""Not `max_length`, which is a setting of generation."""


def window_of(config: Mapping[str, Any]) -> tuple[str, int] | None:
    """The key of a model's `config.json` that says its window, and the window in tokens; None where none does.

    A model of text and pictures says it in its `text_config`.
    """
    for key in WINDOW_KEYS:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return key, value
    text = config.get("text_config")
    return window_of(text) if isinstance(text, Mapping) else None


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding that a model's `config.json` says."""
    text = config.get("text_config")
    value = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, Mapping) else None)
    return value if isinstance(value, int) else None
