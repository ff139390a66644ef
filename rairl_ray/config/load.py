"""YAML files, `base:` and command-line overrides -> one validated `RunConfig`; its dump, hash and differences.

A configuration is a stack of layers, the later one winning key by key: the `base:` files, the file, the
overrides. Every error names the layer that said it: `file:line` or `command line`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from rairl_ray.config import rules
from rairl_ray.config.key_names import RENAMED_VALUES, leaves, nearest_key, unknown_keys
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.variants import ALGORITHMS
from rairl_ray.config.yamlfile import Document, Dumper, parse_scalar, read_document
from rairl_ray.errors import ConfigError

COMMAND_LINE = "command line"

DENSITY_ALIASES = {"false": "sparse", "true": "dense", "full": "dense", "partial_fixed": "interval"}
"""The official code's values of the density (docs/method.md 2); YAML's booleans count as their words."""

NOT_HASHED = frozenset({"name", "output_dir", "tracking", "cluster", "timeouts", "placement"})
"""Where a run is written, watched, placed and how long it is waited for does not change what it computes."""

_ALLOWED = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text; put a number in quotes",
    "tuple_type": "must be a list such as [a, b]",
    "dict_type": "must be a mapping such as {key: value}",
    "model_type": "must be a section with keys of its own",
    "missing": "has too few values",
}


def load_config(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge, validate and check one experiment file.

    Args:
        path: YAML file; its `base:` (a file, or a list of which later ones win) and `warm_start:` are relative
            to the file that names them. None: the schema's own values and the overrides, which need not
            describe a whole run.
        overrides: `section.key=value` texts, the value read as YAML; later ones win.

    Raises:
        ConfigError: one line per error, each with file, key, value and what is allowed.
    """
    layers = [] if path is None else _file_layers(Path(path), str(path), ())
    layers = [*layers, *(_override(text) for text in overrides)]
    data: dict[str, Any] = {}
    for layer in layers:
        data = _merge(data, layer.data)

    def origin(key: str) -> str:
        return _origin(layers, key, COMMAND_LINE if path is None else str(path))

    config = from_dict(data, origin)
    for layer in layers:
        if layer.name == COMMAND_LINE and "reward.density.every" in layer.lines:
            _refuse_idle_interval(config)
    if path is not None:
        rules.check(config, origin)
    return config


def from_dict(data: Mapping[str, Any], origin: Callable[[str], str] | str = "configuration") -> RunConfig:
    """Validate a nested mapping. The rules across keys are `rules.check`, which `load_config` also runs.

    Args:
        data: as parsed from YAML or JSON; density aliases are accepted.
        origin: what a message calls the place of a dotted key.

    Raises:
        ConfigError: unknown keys, wrong types, values out of bounds: one line each.
    """
    place = origin if callable(origin) else lambda _key: origin
    data = _with_reward_of_algorithm(_normalised(dict(data)))
    unknown = [
        f"{place(key)}: unknown key {key} (value {rules.show(value)}): the nearest key is {nearest_key(key)}"
        for key, value in unknown_keys(data, RunConfig, "")
    ]
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        # JSON mode is strict about scalars ("8" is not a number, true is not 1) but takes lists as tuples.
        return RunConfig.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, data, place))) from None


def dump_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as YAML that `load_config` reads back equal."""
    return yaml.dump(
        config.model_dump(mode="json"), Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100
    )


def read_saved(path: Path) -> RunConfig:
    """The resolved configuration of a run folder, as `dump_yaml` wrote it. Raises ConfigError.

    The rules across keys are left out: it has passed them, and they may have changed since.
    """
    document = read_document(path, str(path))
    return from_dict(document.data, document.origin)


def config_hash(config: RunConfig) -> str:
    """12 hex digits of the sha256 of the canonical JSON: equal exactly for runs that compute the same.

    Left out are NOT_HASHED and the folders of `warm_start` and of chat templates (their file names count), so
    that a checkout may move and a run may be renamed, watched or placed otherwise.
    """
    data = config.model_dump(mode="json", exclude=set(NOT_HASHED))
    for model in data["model"].values():
        model["chat_template"] = model["chat_template"] and Path(model["chat_template"]).name
    if config.warm_start is not None:
        data["warm_start"] = Path(config.warm_start).name
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def differences(old: RunConfig, new: RunConfig) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) of every key that differs, in the schema's order."""
    before, after = dict(leaves(old.model_dump(mode="json"))), dict(leaves(new.model_dump(mode="json")))
    keys = list(dict.fromkeys([*before, *after]))
    return [(key, before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)]


SHARED_WITH_WARM_START = (
    "seed",
    "output_dir",
    "data",
    "rollout",
    "learner",
    "placement",
    "cluster",
    "timeouts",
    "tracking",
)
"""Sections that a warm start takes over from the run that asks for it: an override reaches both."""


def warm_start_chain(config: RunConfig) -> list[RunConfig]:
    """The experiments that must exist before this one, nearest first; empty without `warm_start`.

    Each takes SHARED_WITH_WARM_START, the policy's `path`, `build`, `revision` and `dtype`, and the size of the
    evaluation from the run that asks for it; what is its own is how it trains.

    Raises:
        ConfigError: a missing file, a file that is not SFT, a circle, one run folder for two runs.
    """
    chain: list[RunConfig] = []
    seen: list[str] = []
    current = config
    while current.warm_start is not None:
        path = current.warm_start
        if path in seen:
            raise ConfigError(f"{path}: warm_start={path}: a warm start that starts from itself; remove one")
        seen.append(path)
        if not Path(path).is_file():
            why = "is a folder" if Path(path).is_dir() else "no such file"
            raise ConfigError(f"warm_start={path}: {why}; name an SFT experiment file")
        earlier = load_config(path)
        if earlier.algorithm.needs.rollouts:
            raise ConfigError(
                f"warm_start={path}: has algorithm.type={earlier.algorithm.type}; name an SFT experiment file"
            )
        if earlier.name == current.name:
            raise ConfigError(f"warm_start={path}: has the same run folder, name={earlier.name}; rename one")
        earlier = _sharing(earlier, current)
        chain.append(earlier)
        current = earlier
    return chain


def _sharing(earlier: RunConfig, config: RunConfig) -> RunConfig:
    shared = {key: getattr(config, key) for key in SHARED_WITH_WARM_START}
    ours = config.model.policy
    # A saved configuration names the warm start's own result, which it cannot start from itself.
    its_result = str(Path(config.output_dir) / earlier.name / "final" / "policy")
    if (ours.path is not None or ours.build is not None) and ours.path != its_result:
        keys = ("path", "build", "revision", "dtype")
        policy = earlier.model.policy.model_copy(update={key: getattr(ours, key) for key in keys})
        shared["model"] = earlier.model.model_copy(update={"policy": policy})
    sizes = ("prompts", "samples_per_prompt", "k", "temperature", "top_p", "bootstrap")
    shared["eval"] = earlier.eval.model_copy(update={key: getattr(config.eval, key) for key in sizes})
    return earlier.model_copy(update=shared)


# --- layers ---------------------------------------------------------------------------------------


def _file_layers(path: Path, name: str, above: tuple[Path, ...]) -> list[Document]:
    """The `base:` files of a file, oldest first, and the file. A base that two of them share counts once."""
    identity = path.resolve()
    if identity in above:
        raise ConfigError(f"{name}: base leads back to {name}; remove the circle")
    document = read_document(path, name)
    data = dict(document.data)
    base = data.pop("base", None)
    if isinstance(data.get("warm_start"), str):
        data["warm_start"] = os.path.abspath(path.parent / data["warm_start"])
    layer = Document(name, _normalised(data), document.lines)
    bases = [base] if isinstance(base, str) else [] if base is None else base
    if not isinstance(bases, list) or not all(isinstance(item, str) for item in bases):
        raise ConfigError(
            f"{document.origin('base')}: base={rules.show(base)}: must be the path of a YAML file, or a list "
            "of paths"
        )
    below: dict[str, Document] = {}
    for item in bases:
        base_path = path.parent / item
        if not base_path.is_file():
            why = "is a folder:" if base_path.is_dir() else "no such file"
            raise ConfigError(f"{document.origin('base')}: base={item}: {why} {base_path}")
        for lower in _file_layers(base_path, os.path.normpath(base_path), (*above, identity)):
            below.setdefault(lower.name, lower)
    return [*below.values(), layer]


def read_override(text: str) -> tuple[str, Any]:
    """(dotted key, value) of `a.b=value`. Raises ConfigError where it is none."""
    key, equals, value_text = text.partition("=")
    key = key.strip()
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: {text!r} is not an override; write section.key=value")
    if not value_text.strip():
        raise ConfigError(f"{COMMAND_LINE}: {key}= has no value; write {key}=null for none")
    value = parse_scalar(value_text, f"{COMMAND_LINE}: {key}={value_text}")
    if key == "warm_start" and isinstance(value, str):
        value = os.path.abspath(value)
    return key, value


def _override(text: str) -> Document:
    """`a.b=value` as a layer."""
    key, value = read_override(text)
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    lines = dict.fromkeys([key, *(f"{key}.{leaf}" for leaf, _ in leaves(value) if leaf)], 0)
    return Document(COMMAND_LINE, _normalised(nested), lines)


def _origin(layers: Sequence[Document], key: str, default: str) -> str:
    """The newest layer that names the key, or else its nearest parent."""
    while key:
        for layer in reversed(layers):
            if key in layer.lines:
                return COMMAND_LINE if layer.name == COMMAND_LINE else layer.origin(key)
        key = key.rpartition(".")[0]
    return default


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _normalised(data: dict[str, Any]) -> dict[str, Any]:
    """Density in one form, `{type: ...}`, so that layers merge whichever way each of them says it."""
    reward = data.get("reward")
    if not isinstance(reward, dict) or "density" not in reward:
        return data
    density = reward["density"]
    if isinstance(density, str | bool):
        density = {"type": density}
    if isinstance(density, dict) and isinstance(density.get("type"), str | bool):
        word = density["type"] if isinstance(density["type"], str) else str(density["type"]).lower()
        density = {**density, "type": DENSITY_ALIASES.get(word, word)}
    return {**data, "reward": {**reward, "density": density}}


def _with_reward_of_algorithm(data: dict[str, Any]) -> dict[str, Any]:
    """Where no layer names `reward.type`, it is what the algorithm needs; a named one is never changed."""
    algorithm, reward = data.get("algorithm"), data.get("reward", {})
    kind = str(algorithm.get("type")) if isinstance(algorithm, dict) else ""
    if kind not in ALGORITHMS or not isinstance(reward, dict):
        return data
    return {**data, "reward": {"type": ALGORITHMS[kind].reward, **reward}}


def _refuse_idle_interval(config: RunConfig) -> None:
    density = config.reward.density
    if not density.needs.every:
        raise ConfigError(
            f"{COMMAND_LINE}: reward.density.every={density.every}: only `interval` has one, but "
            f"reward.density.type={density.type}; add reward.density.type=interval"
        )


# --- keys and messages ----------------------------------------------------------------------------


def _explain(error: ValidationError, data: Mapping[str, Any], place: Callable[[str], str]) -> Iterator[str]:
    """One line for each wrong key; a key that fits none of several types gets them all."""
    reasons: dict[str, list[str]] = {}
    items = error.errors(include_url=False)
    for item in items:
        key, (*above, last) = _key_of(item["loc"], data), item["loc"]
        lacks = f"lacks {last}" if item["type"] == "missing" and isinstance(last, str) else None
        elsewhere = [other for other in items if other is not item and [*other["loc"][: len(above)]] == above]
        if isinstance(item["input"], dict) and not lacks and elsewhere and last != key.rpartition(".")[2]:
            continue  # a type of a union, for which the mapping was not meant: its section's errors are told
        reason = lacks or _ALLOWED.get(item["type"]) or item["msg"].replace("Input should be", "must be")
        if item["type"] == "literal_error" and (present := RENAMED_VALUES.get(str(item["input"]))):
            reason = f"{item['input']!r} is called '{present}' now"
        reasons.setdefault(key, []).append(reason)
    for key, texts in reasons.items():
        value = rules.show(_value_at(data, key))
        yield f"{place(key)}: {key}={value}: {' or '.join(dict.fromkeys(texts))}"


def _key_of(location: Sequence[int | str], data: Any) -> str:
    """The dotted key of a pydantic location, without its marks for the members of a union."""
    parts = []
    for part in location:
        if isinstance(data, dict) and part in data:
            parts.append(str(part))
            data = data[part]
    return ".".join(parts)


def _value_at(data: Any, key: str) -> Any:
    for part in key.split("."):
        data = data[part]
    return data
