"""A file mapped by chunks over a real pool of Ray Data actors: order, errors, deaths, going on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from rairl_ray.actors.chunks import Line, Pool, map_file, part_of, read_chunk, rows_of, split
from rairl_ray.errors import DataError, RunFailure, UserError

POOL = Pool(actors=2, cpus=0.5, silence_seconds=120)


class Doubled:
    """Twice `x`; may refuse one line, or die at one, always or once."""

    def __init__(self, refuse: int = 0, die: int = 0, died: Path | None = None) -> None:
        self._refuse, self._die, self._died = refuse, die, died

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        for line in lines:
            if line.number == self._refuse:
                raise DataError(f"line {line.number} is refused")
            if line.number == self._die and (self._died is None or not self._died.exists()):
                if self._died is not None:
                    self._died.touch()
                os._exit(1)
        return [{"line": line.number, "x": 2 * line.values["x"]} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def one_cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def numbers(folder: Path, count: int) -> Path:
    file = folder / "numbers.jsonl"
    file.write_text("".join(json.dumps({"x": x}) + "\n" for x in range(count)))
    return file


def test_results_are_in_the_order_of_the_source(tmp_path: Path) -> None:
    source = numbers(tmp_path, 100)
    chunks = split(source, 7)
    seen: list[int] = []
    map_file(source, chunks, tmp_path / "parts", Doubled, {}, POOL, seen.append)
    assert [row["x"] for row in rows_of(tmp_path / "parts", chunks)] == [2 * x for x in range(100)]
    assert seen == list(range(len(chunks) + 1))


def test_only_missing_parts_are_made(tmp_path: Path) -> None:
    source = numbers(tmp_path, 20)
    chunks, parts = split(source, 5), tmp_path / "parts"
    parts.mkdir()
    part_of(parts, chunks[1]).write_text('{"x": "kept"}\n')
    map_file(source, chunks, parts, Doubled, {}, POOL)
    assert [row["x"] for row in rows_of(parts, chunks)] == [0, 2, 4, 6, 8, "kept", *range(20, 40, 2)]
    before = [part_of(parts, chunk).stat().st_mtime_ns for chunk in chunks]
    map_file(source, chunks, parts, Doubled, {"refuse": 1}, POOL)  # nothing is left that could be refused
    assert [part_of(parts, chunk).stat().st_mtime_ns for chunk in chunks] == before


def test_an_error_of_the_user_comes_out_with_its_text(tmp_path: Path) -> None:
    source = numbers(tmp_path, 20)
    with pytest.raises(UserError, match=r"^line 13 is refused$"):
        map_file(source, split(source, 5), tmp_path / "parts", Doubled, {"refuse": 13}, POOL)


def test_a_pool_whose_actor_died_starts_again_with_what_is_missing(tmp_path: Path) -> None:
    source = numbers(tmp_path, 20)
    chunks = split(source, 5)
    map_file(source, chunks, tmp_path / "parts", Doubled, {"die": 13, "died": tmp_path / "died"}, POOL)
    assert (tmp_path / "died").exists()
    assert [row["x"] for row in rows_of(tmp_path / "parts", chunks)] == [2 * x for x in range(20)]


def test_a_chunk_that_always_kills_ends_the_job_and_keeps_the_others(tmp_path: Path) -> None:
    source = numbers(tmp_path, 20)
    chunks, parts = split(source, 5), tmp_path / "parts"
    with pytest.raises(RunFailure, match=r"failed 3 times on .*the same command goes on from there"):
        map_file(source, chunks, parts, Doubled, {"die": 13}, POOL)
    assert not part_of(parts, chunks[2]).exists()
    map_file(source, chunks, parts, Doubled, {}, POOL)
    assert [row["x"] for row in rows_of(parts, chunks)] == [2 * x for x in range(20)]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_chunks_cover_the_file_with_its_own_line_numbers(size: int, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"x": "\xc3\xa9"}\n\n{"x": 2}\r\n   \n{"x": 3}')
    chunks = split(file, size)
    lines = [line for chunk in chunks for line in read_chunk(file, chunk)]
    assert lines == [Line(1, {"x": "é"}), Line(3, {"x": 2}), Line(5, {"x": 3})]
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert sum(chunk.lines for chunk in chunks) == 5


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"x": 1}\n{"x": \n', r"odd\.jsonl:2: not valid JSON"),
        ('{"x": 1}\n[1]\n', r"odd\.jsonl:2: holds list, not an object"),
        ("\n \n", r"odd\.jsonl: no rows"),
        ("", r"odd\.jsonl: no rows"),
    ],
)
def test_a_bad_file_is_one_line(content: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=said):
        split(file, 3)


def test_every_row_is_checked_before_anything_starts(tmp_path: Path) -> None:
    def check(line: Line) -> None:
        if line.values["x"] == 4:
            raise DataError(f"{line.number} is bad")

    with pytest.raises(DataError, match="5 is bad"):
        split(numbers(tmp_path, 10), 3, check)


def test_a_chunk_is_found_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "wide.jsonl"
    file.write_text("".join(json.dumps({"x": "é" * n}, ensure_ascii=False) + "\n" for n in range(10)), "utf-8")
    chunk = split(file, 4)[1]
    assert (chunk.first_line, chunk.lines) == (5, 4)
    assert [len(line.values["x"]) for line in read_chunk(file, chunk)] == [4, 5, 6, 7]
