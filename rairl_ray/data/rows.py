"""Reading rows from files and hub datasets, with the place of every row, and the report of bad ones."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rairl_ray.errors import DataError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
SHOWN = 20

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    place: str
    """`file:line` (jsonl, csv) or `file: row n`: what a message about this row begins with."""
    position: int
    """Place in its source from 0, bad and blank rows counted: stable ids are made of it."""
    values: Mapping[str, object]


class BadRow(ValueError):
    """What is wrong with one row, without its place."""


@dataclass
class BadRowReport:
    """Collects bad rows of one source, then fails or skips (`data.on_bad_row`)."""

    source: str
    on_bad_row: Literal["fail", "skip"]
    found: list[tuple[str, str]] = field(default_factory=list)
    """(place, what is wrong)"""

    def add(self, place: str, reason: object) -> None:
        self.found.append((place, str(reason)))

    def finish(self, good_rows: int) -> None:
        """Raises DataError with the first 20 bad rows, or warns with them and their number.

        A source without any good row is an error either way.
        """
        if not self.found and good_rows:
            return
        if not self.found:
            raise DataError(f"{self.source}: no rows; give a file with at least one")
        listed = "; ".join(f"{place}: {reason}" for place, reason in self.found[:SHOWN])
        more = f"; and {len(self.found) - SHOWN} more" if len(self.found) > SHOWN else ""
        if self.on_bad_row == "fail":
            raise DataError(f"{listed}{more}; correct the file or set data.on_bad_row=skip")
        if not good_rows:
            raise DataError(f"{listed}{more}; no good row is left in {self.source}")
        _log.warning("%s: skipped %d bad rows: %s%s", self.source, len(self.found), listed, more)


def column(values: Mapping[str, object], name: str) -> object:
    """The value of a column; dots reach into nested objects and lists ("meta.answer", "outputs.0.text").

    A column whose own name has dots comes first. Raises BadRow naming the columns there are.
    """
    if name in values:
        return values[name]
    value: object = values
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise BadRow(f"no column {name!r} (there are: {', '.join(map(str, values)) or 'none'})")
    return value


def text_column(values: Mapping[str, object], name: str) -> str:
    """A column as text, numbers written out. Raises BadRow for anything empty, nested or not encodable."""
    value = column(values, name)
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(
            f"column {name!r} holds {value}, which is no number; write the number, or null where it is missing"
        )
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"column {name!r} holds {_shown(value)}, not text")
    text = str(value)
    if not text.strip():
        raise BadRow(f"column {name!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"column {name!r} holds half of a surrogate pair, which is no text") from None
    return text


def optional_text_column(values: Mapping[str, object], name: str) -> str | None:
    """As `text_column`, but None where the column is missing, null, NaN (a table's null) or empty."""
    try:
        value = column(values, name)
    except BadRow:
        return None
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return None if missing or (isinstance(value, str) and not value.strip()) else text_column(values, name)


def read_rows(
    source: str, report: BadRowReport, *, split: str, config_name: str | None = None
) -> Iterator[Row]:
    """Rows of a file, of the `split` of a folder, or of a hub dataset. Unreadable rows go to the report.

    Raises DataError for a missing file, a folder without the split, or a dataset that cannot be loaded.
    """
    path = Path(source)
    if path.is_dir():
        offset = 0
        for file in split_files(path, split):
            position = -1
            for place, position, values in read_file(file, report):
                yield Row(place, offset + position, values)
            offset += position + 1
    elif path.is_file():
        yield from read_file(path, report)
    elif is_hub_id(source):
        yield from _read_hub(source, split, config_name)
    else:
        formats = ", ".join(SUFFIXES)
        raise DataError(
            f"data.path={source}: no such file or folder; "
            f"give a {formats} file, a folder of such files, or a hub id like openai/gsm8k"
        )


def is_hub_id(source: str) -> bool:
    """`owner/name` or `name`: anything that does not look like a path."""
    parts = source.split("/")
    return (
        len(parts) <= 2
        and all(part and not part.startswith((".", "~")) for part in parts)
        and Path(source).suffix.lower() not in SUFFIXES
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """`SPLIT.jsonl` (or another format), else the hub's shards `SPLIT-*.parquet`."""
    for suffix in SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return [folder / f"{split}{suffix}"]
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if shards:
        return shards
    present = ", ".join(sorted(p.name for p in folder.iterdir())[:SHOWN]) or "nothing"
    raise DataError(
        f"data.path={folder}: no {split}.jsonl (or .json, .parquet, .csv) in it, only {present}; "
        f"set data.train_split and data.eval_split"
    )


def read_file(path: Path, report: BadRowReport) -> Iterator[Row]:
    """Rows of one file, by its suffix."""
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: unknown format {path.suffix or 'without suffix'}; give one of {', '.join(SUFFIXES)}"
        )
    yield from reader(path, report)


def _read_jsonl(path: Path, report: BadRowReport) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                report.add(place, f"not UTF-8 text (byte {error.start + 1})")
            except (json.JSONDecodeError, RecursionError) as error:
                what = (
                    f"{error.msg}, column {error.colno}"
                    if isinstance(error, json.JSONDecodeError)
                    else "too deep"
                )
                report.add(place, f"not valid JSON ({what})")
            else:
                yield from _mapping_row(place, number - 1, values, report)


def _read_json(path: Path, report: BadRowReport) -> Iterator[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}); "
                        f"for one object a line name the file .jsonl") from error  # fmt: skip
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start + 1}); convert it to UTF-8") from error
    if not isinstance(content, list):
        raise DataError(f"{path}: holds {_shown(content)}; a .json file must hold a list of objects")
    for index, values in enumerate(content):
        yield from _mapping_row(f"{path}: row {index + 1}", index, values, report)


def _read_csv(path: Path, report: BadRowReport) -> Iterator[Row]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start + 1}); convert it to UTF-8") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 2
    try:
        for index, values in enumerate(reader):
            place, line = f"{path}:{line}", reader.line_num + 1
            if None in values or None in values.values():
                report.add(place, f"not {len(reader.fieldnames or ())} columns as in the header")
            else:
                yield Row(place, index, values)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error}); correct its quotes") from error


def _read_parquet(path: Path, report: BadRowReport) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{path}: not a parquet file ({str(error).splitlines()[0]}); convert it again"
        ) from error
    index = 0
    for batch in file.iter_batches():
        for values in batch.to_pylist():
            yield from _mapping_row(f"{path}: row {index + 1}", index, values, report)
            index += 1


def _read_hub(source: str, split: str, config_name: str | None) -> Iterator[Row]:
    import datasets

    try:
        table = datasets.load_dataset(source, config_name, split=split)
    except (
        Exception
    ) as error:  # the hub client raises anything from OSError to its own types: all mean "not loaded"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"data.path={source}: dataset (config {config_name}, split {split}) could not be loaded: {reason}; "
            f"check the id, data.config_name, data.train_split, data.eval_split and the network, "
            f"or give a local path"
        ) from error
    for index, values in enumerate(table):
        yield Row(f"{source}[{split}]: row {index + 1}", index, values)


def _mapping_row(place: str, index: int, values: object, report: BadRowReport) -> Iterator[Row]:
    if isinstance(values, Mapping):
        yield Row(place, index, values)
    else:
        report.add(place, f"holds {_shown(values)}, not an object with columns")


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return f"{type(value).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
