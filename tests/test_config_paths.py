"""Paths in a configuration are understood once, where they enter."""

from __future__ import annotations

from typing import Any

import pytest

from rairl_ray.config.load import load_config


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
