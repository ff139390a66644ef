"""The resolved configuration as YAML, its hash and its differences: property tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rairl_ray.config.load import NOT_HASHED, config_hash, differences, dump_yaml, from_dict, load_config

ROOT = Path(__file__).resolve().parents[2]
VALID = """\
model: {policy: {build: {max_length: 128}}}
data: {max_prompt_tokens: 32}
rollout: {max_completion_tokens: 64}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(VALID)
    return path


positive = st.floats(min_value=1e-300, max_value=1e300, allow_nan=False, allow_infinity=False)
# YAML has no escape for a lone surrogate; nothing else is left out.
words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**60),
    "trainer.steps": st.integers(1, 10**9),
    "policy.learning_rate": positive,
    "reward.temperature": positive,
    "policy.weight_decay": st.floats(0, 1e6),
    "data.system_prompt": st.none() | words,
    "data.config_name": st.sampled_from(["yes", "1e5", "0x1F", "1:30", "null", "2024-01-01", "", " a", "<<"]),
    "tracking.tags": st.dictionaries(words.filter(bool), words, max_size=3),
    "rollout.prefix_caching": st.booleans(),
    "reward.clip": st.none() | st.tuples(st.floats(-50, -1), st.floats(1, 50)),
    "discriminator.perturbations.kinds": st.lists(st.sampled_from(["operator", "numbers"]), min_size=1),
    "reward.density.type": st.sampled_from(["sparse", "interval", "partial", "dense"]),
}  # fmt: skip
some_values = st.fixed_dictionaries({}, optional=VALUES)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(VALID)
    for key, value in values.items():
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return data


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=some_values)
def test_dump_and_load_are_inverse(tmp_path: Path, values: dict[str, Any]) -> None:
    config = from_dict(nested(values))
    text = dump_yaml(config)
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == config
    # Readers with plain YAML 1.1 see the same.
    assert from_dict(yaml.safe_load(text)) == config


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=some_values)
def test_overrides_say_the_same_as_a_file(file: Path, values: dict[str, Any]) -> None:
    overrides = [f"{key}={flow(value)}" for key, value in values.items()]
    assert load_config(file, overrides) == from_dict(nested(values))


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


@settings(max_examples=60, deadline=None)
@given(first=some_values, second=some_values)
def test_the_hash_differs_exactly_where_hashed_keys_differ(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    one, two = from_dict(nested(first)), from_dict(nested(second))
    hashed = [key for key, _, _ in differences(one, two) if key.split(".")[0] not in NOT_HASHED]
    assert (config_hash(one) == config_hash(two)) == (not hashed)
    assert differences(one, one) == []
    swapped = {(key, str(new), str(old)) for key, old, new in differences(two, one)}
    assert swapped == {(key, str(old), str(new)) for key, old, new in differences(one, two)}


def test_the_hash_is_the_same_in_every_process(file: Path) -> None:
    code = f"from rairl_ray.config.load import *; print(config_hash(load_config({str(file)!r})))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True, cwd=ROOT,
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert seen == {config_hash(load_config(file))}
    assert len(seen.pop()) == 12


def test_the_hash_ignores_where_and_how_a_run_is_watched(file: Path) -> None:
    plain = load_config(file)
    moved = load_config(
        file, ["name=b", "output_dir=/x", "tracking.uri=none", "placement.device=cpu", "cluster.address=auto"]
    )
    assert config_hash(moved) == config_hash(plain)
    here, there = (load_config(file, [f"warm_start={folder}/sft.yaml"]) for folder in ("/a", "/b"))
    assert config_hash(here) == config_hash(there) != config_hash(plain)


def test_differences_name_keys_and_both_values(file: Path) -> None:
    old = load_config(file)
    new = load_config(
        file, ["reward.clip=[-1, 1]", "model.policy.build=null", "model.policy.path=x/y", "seed=4"]
    )
    rows = {key: (before, after) for key, before, after in differences(old, new)}
    assert rows["seed"] == (0, 4)
    assert rows["reward.clip"] == (None, [-1.0, 1.0])
    assert rows["model.policy.path"] == (None, "x/y")
    assert rows["model.policy.build.max_length"] == (128, None)


def test_configurations_are_frozen(file: Path) -> None:
    config = load_config(file)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
