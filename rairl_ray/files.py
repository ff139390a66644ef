"""Small file operations that survive a kill at any instant; standard library only."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rairl_ray.errors import DataError


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` (created, renamed, removed) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader sees either the old file or the whole new one, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


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


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a small JSONL file atomically."""
    write_atomic(path, "".join(json_text(row) + "\n" for row in rows))


def stream_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """`write_json_lines` for more rows than memory holds; the number of rows written."""
    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json_text(row) + "\n")
                count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)
    return count


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
