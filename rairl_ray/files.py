"""Small file operations that survive a kill at any instant; standard library only."""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rairl_ray.errors import DataError, PlacementError

REWARD_FILE = "reward.json"
"""The settings in the folder of a saved reward model; light readers know a whole one by it."""
SEEN_SECONDS = 10.0
"""How long a node may take to see what another one has written: network file systems keep lists of folders."""
LOOK_SECONDS = 0.5
SIGN = ".seen-"
"""How the name of a file begins that says whose disk a folder is on."""


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` (created, renamed, removed) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A file to write, which takes the place of `path` when the block ends well and vanishes otherwise."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees either the old file or the whole new one, never a part."""
    with replacing(path) as file:
        file.write(text)


def name_beside(path: Path) -> Path:
    """The first free name of PATH~1, PATH~2, ...: where earlier work is moved; nothing is overwritten."""
    return next(p for i in range(1, 1000) if not (p := Path(f"{path}~{i}")).exists())


def json_text(value: Any, **options: Any) -> str:
    """Standard JSON: NaN and infinities become null, because most readers refuse Python's spelling of them."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def append_line(path: Path, line: str) -> None:
    """Append one line. A last line that a kill tore off is closed first, so that it spoils only itself."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END) > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.replace("\n", " ").encode() + b"\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write a JSONL file atomically, one row in memory at a time; the number of rows."""
    count = 0
    with replacing(path) as file:
        for row in rows:
            file.write(json_text(row) + "\n")
            count += 1
    return count


def stream_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file that we wrote whole, one in memory at a time."""
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def read_json_lines(path: Path, *, skip_broken: bool = False) -> list[dict[str, Any]]:
    """Rows of a JSONL file; a last line that a kill tore is left out.

    Raises DataError naming file and line for any other broken line, unless `skip_broken`.
    """
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            if number == len(lines) or skip_broken:
                continue
            raise DataError(
                f"{path}: line {number} is not a JSON object ({error}); remove or repair it"
            ) from error
        rows.append(row)
    return rows


@contextmanager
def planted(folder: Path) -> Iterator[Path]:
    """A new file in a folder while the block lasts: a folder of the same name on another disk has none.

    What a killed process has left is removed. Raises OSError where the folder cannot be written.
    """
    for old in folder.glob(f"{SIGN}*"):
        old.unlink(missing_ok=True)
    sign = folder / f"{SIGN}{uuid.uuid4().hex[:12]}"
    sign.touch()
    try:
        yield sign
    finally:
        sign.unlink(missing_ok=True)


def unseen(paths: Iterable[str | Path]) -> list[str]:
    """Those of the paths that this machine does not see within SEEN_SECONDS."""
    missing, until = [str(path) for path in paths], time.monotonic() + SEEN_SECONDS
    while missing := [path for path in missing if not Path(path).exists()]:
        if time.monotonic() > until:
            break
        time.sleep(LOOK_SECONDS)
    return missing


def not_shared(key: str, path: str | Path, node: str) -> PlacementError:
    """The line about a path that a node does not see. `key`: what names the path."""
    return PlacementError(
        f"{key}: node {node} does not see {path}; put it on a disk that all nodes share (an output_dir with a "
        "scheme is staged in $RAIRL_STAGING, a model of the hub in $HF_HOME)"
    )
