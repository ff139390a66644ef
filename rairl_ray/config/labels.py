"""Label selectors as Ray reads them: `spot`, `!spot`, `in(A100,H100)`, `!in(A100,H100)`."""

from __future__ import annotations

import re
from collections.abc import Mapping

_WORD = r"[a-zA-Z0-9](?:[a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_KEY = re.compile(rf"(?:{_WORD}(?:\.{_WORD})*/)?{_WORD}")
_SELECTOR = re.compile(rf"(!?)(?:in\(({_WORD}(?:,{_WORD})*)\)|({_WORD}))")

OF_ONE_NODE = "ray.io/node-id"
"""The label that Ray gives every node and that says nothing about its kind."""


def plain(selector: str) -> str:
    """The selector without the blanks behind its commas: Ray accepts `in(A, B)`, and then looks for ` B`."""
    return selector.replace(", ", ",")


def problem(key: str, value: str) -> str:
    """What is wrong with one selector; empty where Ray accepts it."""
    if not _KEY.fullmatch(key):
        return f"{key!r} is no label's name; write letters, digits and . _ - between them, such as market"
    if not _SELECTOR.fullmatch(value):
        return f"{key}={value!r} is no selector; write VALUE, '!VALUE', in(A, B) or '!in(A, B)'"
    return ""


def matches(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels has all that is asked. `!spot` holds where the label is missing, too."""
    return all(_holds(value, labels.get(key)) for key, value in selector.items())


def _holds(selector: str, label: str | None) -> bool:
    found = _SELECTOR.fullmatch(selector)
    if found is None:
        raise ValueError(f"no label selector: {selector!r}")
    negated, several, one = found.groups()
    allowed = several.split(",") if several else [one]
    return (label in allowed) != bool(negated)


def said(labels: Mapping[str, str]) -> str:
    """Labels or selectors in one line, without the one that names a single node."""
    return ", ".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != OF_ONE_NODE)
