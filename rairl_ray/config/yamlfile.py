"""YAML files with line numbers: YAML 1.2 scalars, no duplicate keys, errors that name the line.

PyYAML reads YAML 1.1, where ``1e-4`` is text, ``on`` is a boolean and ``1:30`` is ninety. Here a number is
what Python calls a number, only ``true`` and ``false`` are booleans, and a date is text.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rairl_ray.errors import ConfigError

_FLOAT = re.compile(
    r"""^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""


class FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same on libyaml, ten times as fast; its errors say less, so `Loader` reads what it refuses."""


class Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes every text that any YAML 1.1 or 1.2 reader would take for something else. On libyaml, too."""


Loader.yaml_implicit_resolvers = FastLoader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in [
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+0123456789.")),
    ("merge", re.compile(r"^<<$"), ["<"]),
]:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


@dataclass(frozen=True)
class Document:
    """One mapping and the line of each of its dotted keys (1-based)."""

    name: str
    data: dict[str, Any]
    lines: dict[str, int]

    def origin(self, key: str) -> str:
        """`file:line` of a dotted key, or of the nearest parent that the file names."""
        while key:
            if key in self.lines:
                return f"{self.name}:{self.lines[key]}"
            key = key.rpartition(".")[0]
        return self.name


def read_document(path: Path, name: str) -> Document:
    """Read a YAML mapping. `name` stands for the file in messages.

    Raises:
        ConfigError: no such file, not text, malformed, not a mapping, a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{name}: no such file; give the path of a YAML experiment file") from None
    except IsADirectoryError:
        raise ConfigError(f"{name}: is a folder; give the path of a YAML experiment file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{name}: is not UTF-8 text; give the path of a YAML experiment file") from None
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror})") from None
    data, lines = _parse(text, name)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{name}: holds {type(data).__name__}, not a mapping; write lines such as `seed: 1`")
    return Document(name, data, lines)


def parse_scalar(text: str, name: str) -> Any:
    """The value of an override, read as YAML: `1e-4`, `null`, `[a, b]`, `{}`, `text`.

    Lists and mappings need their brackets, so that a prompt such as `Think: then answer` stays text. There
    are no comments: `#` is a character like any other.
    """
    text = text.strip()
    closing = {"[": "]", "{": "}", "'": "'", '"': '"'}.get(text[0])
    if closing is None:
        marks = (": " in text, text.endswith(":"), text.startswith(("- ", "#")), " #" in text, "\t#" in text)
        return text if any(marks) else _parse(text, name)[0]
    if not text.endswith(closing):
        raise ConfigError(f"{name}: malformed YAML: opens with {text[0]} and does not end with {closing}")
    return _parse(text, name)[0]


def _parse(text: str, name: str) -> tuple[Any, dict[str, int]]:
    data, lines = _parsed(text, name)
    return copy.deepcopy(data), dict(lines)


@functools.lru_cache(maxsize=256)
def _parsed(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """Read once where a thousand trials of a sweep have the same base files."""
    try:
        try:
            return _read(FastLoader, text, name)
        except yaml.YAMLError:
            return _read(Loader, text, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}" if mark and "=" not in name else name
        raise ConfigError(f"{place}: malformed YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: malformed YAML: {' '.join(str(error).split())}") from None


def _read(kind: Any, text: str, name: str) -> tuple[Any, dict[str, int]]:
    loader = kind(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        if node is None:
            return None, lines
        _index(node, "", name, lines, ())
        return loader.construct_document(node), lines
    finally:
        loader.dispose()


def _index(node: yaml.Node, prefix: str, name: str, lines: dict[str, int], above: tuple[int, ...]) -> None:
    """Collect the line of every dotted key; refuse a key that stands twice and an alias of itself."""
    if id(node) in above:
        raise ConfigError(f"{name}:{node.start_mark.line + 1}: malformed YAML: an alias that contains itself")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _index(item, f"{prefix}[]", name, lines, above)
    if not isinstance(node, yaml.MappingNode):
        return
    here: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in here:
            raise ConfigError(f"{name}:{line}: {key} is given twice, first in line {here[key]}; keep one")
        here[key] = line
        _index(value_node, key, name, lines, above)
    lines.update(here)
