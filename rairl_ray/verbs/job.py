"""Work on a file that goes on where a killed process left it: its settings, its parts, its one owner."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rairl_ray.display import Display
from rairl_ray.engines.origin import content_id
from rairl_ray.errors import ConfigError
from rairl_ray.files import REWARD_FILE, json_text, name_beside, write_atomic

SETTINGS_FILE = "settings.json"


class Job:
    """A folder of finished parts, good for exactly one set of settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self.settings = json.loads(json_text(dict(settings)))

    def differences(self) -> dict[str, str]:
        """Key -> `key (then: old, now: new)` of what an earlier job here did otherwise; empty if nothing."""
        file = self.folder / SETTINGS_FILE
        if not file.is_file():
            used = self.folder.is_dir() and any(self.folder.iterdir())
            return {SETTINGS_FILE: f"{file} (missing)"} if used else {}
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            return {SETTINGS_FILE: f"{file} (unreadable)"}
        return {
            key: f"{key} (then: {earlier.get(key)}, now: {self.settings.get(key)})"
            for key in sorted({*earlier, *self.settings})
            if earlier.get(key) != self.settings.get(key)
        }

    def open(self) -> None:
        """Make the folder and note the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / SETTINGS_FILE, json_text(self.settings, indent=1, sort_keys=True) + "\n")

    def move_aside(self, display: Display) -> None:
        """Keep the work of other settings beside this one, as NAME~1; nothing where there is none."""
        changed = self.differences()
        if not changed:
            return
        aside = name_beside(self.folder)
        self.folder.rename(aside)
        told = ", ".join(changed.values())
        display.note(f"an evaluation of this name with other settings was moved to {aside}: {told}")


@contextmanager
def sole_owner(place: Path) -> Iterator[None]:
    """Hold a file or folder as its only worker; the kernel gives it back however this process ends.

    Raises:
        ConfigError: another process works on it.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.with_name(f".{place.name}.lock")
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{place}: another process is working on it; wait for it, or name another"
            ) from None
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def file_id(path: Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def rows_id(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash of rows."""
    return hashlib.sha256(json_text(list(rows)).encode()).hexdigest()[:16]


def reward_id(folder: Path) -> list[str]:
    """What identifies a saved reward: its weights, and how they are read."""
    return [content_id(str(folder)), file_id(folder / REWARD_FILE)]


def remove(folder: Path) -> None:
    """Delete parts that are joined."""
    shutil.rmtree(folder, ignore_errors=True)
