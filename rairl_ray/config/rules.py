"""Rules across keys: what no single bound can say, checked before anything starts.

Each rule is a small generator of (key, what is wrong and what to do); `check` adds file and value. Only
contradictions are errors: a key that the chosen algorithm or loss does not read is left alone, so that one
file serves airl, grpo and sft, and an ablation stays a diff of one line.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rairl_ray.config.machine_rules import MACHINE_RULES
from rairl_ray.config.method_rules import METHOD_RULES
from rairl_ray.config.placement_rules import PLACEMENT_RULES
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.errors import ConfigError, redact

RULES = (*MACHINE_RULES, *PLACEMENT_RULES, *METHOD_RULES)


def check(
    config: RunConfig, origin: Callable[[str], str] | str = "configuration", device: str | None = None
) -> None:
    """Run every rule.

    Args:
        origin: what a message calls the place of a dotted key (`file:line`, `command line`).
        device: `cpu` or `gpu`, where `placement.device: auto` has been answered.

    Raises:
        ConfigError: one line per broken rule: place, key, value, why, remedy.
    """
    if device is not None:
        placement = config.placement.model_copy(update={"device": device})
        config = config.model_copy(update={"placement": placement})
    place = origin if callable(origin) else lambda _key: origin
    lines = [
        f"{place(key)}: {key}={show(value_of(config, key))}: {text}"
        for rule in RULES
        for key, text in rule(config)
    ]
    if lines:
        raise ConfigError("\n".join(lines))


def value_of(config: RunConfig, key: str) -> Any:
    """The value at a dotted key, in its JSON form."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def show(value: Any) -> str:
    """A value as a user would write it, on one line of at most 60 characters, without the password of a URL."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    text = redact(" ".join(text.split()))
    return text if len(text) <= 60 else text[:57] + "..."


def check_output(config: RunConfig) -> None:
    """Make the run folder and prove that it can be written.

    Raises:
        ConfigError: naming output_dir and what stands in the way.
    """
    folder = Path(config.output_dir) / config.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise ConfigError(
            f"output_dir={config.output_dir}: the run folder {folder} cannot be written "
            f"({error.strerror or error}); choose another output_dir"
        ) from None


def check_files(config: RunConfig) -> None:
    """Every local file that the configuration names is there. Hub ids are not looked up.

    Raises:
        ConfigError: one line per missing file.
    """
    wanted = [("data.path", config.data.path), ("data.demonstrations", config.data.demonstrations)]
    for role in ("policy", "discriminator"):
        model: Model = getattr(config.model, role)
        wanted += [(f"model.{role}.path", model.path), (f"model.{role}.chat_template", model.chat_template)]
    missing = []
    for key, text in wanted:
        always_a_file = key == "data.demonstrations" or key.endswith("chat_template")
        if text is not None and (always_a_file or _looks_local(text)) and not Path(text).exists():
            missing.append(f"{key}={text}: no such file or folder (relative to {Path.cwd()}); correct the path")
    if missing:
        raise ConfigError("\n".join(missing))


def _looks_local(text: str) -> bool:
    suffixes = (".jsonl", ".json", ".parquet", ".csv", ".jinja")
    return text.startswith(("/", ".", "~")) or text.endswith(suffixes) or text.count("/") > 1
