"""Work on a file that goes on where a killed process left it: what it is of, and its finished parts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rairl_ray.files import json_text, write_atomic

SETTINGS_FILE = "settings.json"


class Job:
    """A folder of finished parts, good for exactly one set of settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json_text(dict(settings)))

    def differences(self) -> list[str]:
        """`key (then: old, now: new)` of what an earlier job here did otherwise; empty where it is the same."""
        file = self.folder / SETTINGS_FILE
        if not file.is_file():
            return [f"{file} (missing)"] if self.folder.is_dir() and any(self.folder.iterdir()) else []
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return [f"{file} (unreadable)"]
        return [
            f"{key} (then: {earlier.get(key)}, now: {self.settings.get(key)})"
            for key in sorted({*earlier, *self.settings})
            if earlier.get(key) != self.settings.get(key)
        ]

    def open(self) -> None:
        """Make the folder and note the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / SETTINGS_FILE, json_text(self.settings, indent=1, sort_keys=True) + "\n")


def file_id(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def remove(folder: Path) -> None:
    """Delete parts that are joined."""
    shutil.rmtree(folder, ignore_errors=True)
