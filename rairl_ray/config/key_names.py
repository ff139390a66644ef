"""The dotted keys of the schema: all of them, what a mapping names that is none, and what was meant by it."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from rairl_ray.config.schema import RunConfig
from rairl_ray.config.section import Section

RENAMED = {
    "clip_norm": "max_grad_norm", "warmup_share": "warmup_ratio", "importance_cap": "tis_cap",
    "failure_retries": "max_restarts_per_role", "probe_every": "sync_check_every",
}  # fmt: skip
"""Former names of keys, answered with the present ones."""

RENAMED_VALUES = {"slip": "propagated_error"}
"""The same of values."""


def known_keys() -> list[str]:
    """All dotted keys of the schema, sections included."""
    return list(_schema_keys(RunConfig, ""))


def nearest_key(key: str) -> str:
    """The valid key that a mistyped one most likely meant, or the present name of one that was renamed."""
    parent, _, last = key.rpartition(".")
    known = known_keys()
    if last in RENAMED and (present := f"{parent}.{RENAMED[last]}") in known:
        return present

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        its_parent, _, its_last = candidate.rpartition(".")
        tail = difflib.SequenceMatcher(None, last, its_last).ratio()
        short = last == "".join(word[0] for word in its_last.split("_")) or its_last.startswith(last)
        return whole + tail + 0.5 * (parent == its_parent) + 0.5 * short

    return max(known, key=likeness)


def unknown_keys(data: Mapping[str, Any], section: type[Section], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        field = section.model_fields.get(str(key))
        if field is None:
            yield from leaves(value, f"{prefix}{key}")
        elif isinstance(value, dict):
            inner = _section_of(field.annotation)
            if inner is not None:
                yield from unknown_keys(value, inner, f"{prefix}{key}.")
            elif typing.get_origin(field.annotation) is not dict:
                yield from ((f"{prefix}{key}.{below}", leaf) for below, leaf in value.items())


def _schema_keys(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _schema_keys(inner, f"{prefix}{name}.")


def _section_of(annotation: Any) -> type[Section] | None:
    """The section class of `Section`, or of a union with one, else None."""
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    options = typing.get_args(annotation) if union else (annotation,)
    for option in options:
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a nested mapping; an empty mapping is a value."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, data
