"""Paths in a configuration are understood once, where they enter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rairl_ray.config.load import config_hash, load_config


@pytest.mark.parametrize("role", ["policy", "discriminator"])
def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, role: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    keys = [
        "output_dir",
        "data.path",
        "data.demonstrations",
        f"model.{role}.path",
        f"model.{role}.chat_template",
    ]
    config = load_config(None, [f"{key}=~/a/b" for key in keys])
    for key in keys:
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        assert value == "/home/me/a/b", key
    assert load_config(None, ["data.path=a~b"]).data.path == "a~b"


@pytest.mark.parametrize("role", ["policy", "discriminator"])
def test_a_chat_template_is_found_from_where_actors_stand(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str
) -> None:
    hashes = set()
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        config = load_config(None, [f"model.{role}.chat_template=own.jinja"])
        monkeypatch.chdir("/")
        assert getattr(config.model, role).chat_template == str(tmp_path / folder / "own.jinja")
        hashes.add(config_hash(config))
    assert len(hashes) == 1  # a checkout may move
    assert config_hash(load_config(None, [f"model.{role}.chat_template=other.jinja"])) not in hashes
