"""A JSON Lines file mapped over a pool of Ray Data actors, in chunks, so that a kill loses no finished one.

    source.jsonl ──byte ranges──> map_batches(actor pool) ──> parts/000000.jsonl, parts/000001.jsonl, ...

Only byte ranges travel through Ray: an actor reads its lines from the source and leaves its results in a file
of their own, both on a disk that driver and actors share (as a run folder is). So memory does not grow with
the file, results are in the source's order whatever actor was faster, and a job that is started again does
only the chunks that have no part yet.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.data.exceptions import ExecutionTimeoutError

from rairl_ray.actors.shared_disk import require_shared
from rairl_ray.errors import DataError, RunFailure, UserError
from rairl_ray.files import planted, stream_json_lines, write_json_lines

RETRIES = 2
"""Times that the pool is started again after an actor died, for the chunks that have no part yet."""


class Line(NamedTuple):
    """One row of the source."""

    number: int
    """From 1."""
    values: dict[str, Any]


class LineMap(Protocol):
    """What an actor of the pool does with the lines of a chunk: any number of result rows, in order."""

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class Chunk:
    """Consecutive lines of the source."""

    index: int
    offset: int
    """Byte at which its first line begins."""
    first_line: int
    """From 1."""
    lines: int
    """Lines of the file in it, blank ones included."""


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Actors that map chunks."""

    actors: int
    cpus: float
    gpus: float = 0.0
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that a process needs before it imports its heavy library."""
    silence_seconds: float = 3600.0
    """Longest time without any finished chunk, the start of the actors included."""


def split(source: Path, lines_per_chunk: int, check: Callable[[Line], None] | None = None) -> list[Chunk]:
    """Chunks of a JSON Lines file, read once; blank lines hold no row.

    Args:
        check: called with every row; what it raises is told with file and line.

    Raises:
        DataError: the first line that is not a JSON object or that `check` refuses, or a file without rows.
    """
    chunks: list[Chunk] = []
    offset = start = rows = number = 0
    first = 1
    with open(source, "rb") as file:
        for number, text in enumerate(file, start=1):
            offset += len(text)
            if text.strip():
                rows += 1
                line = _parsed(source, number, text)
                if check is not None:
                    check(line)
            if number - first + 1 == lines_per_chunk:
                chunks.append(Chunk(len(chunks), start, first, lines_per_chunk))
                start, first = offset, number + 1
    if number >= first:
        chunks.append(Chunk(len(chunks), start, first, number - first + 1))
    if not rows:
        raise DataError(f"{source}: no rows; give a file with at least one JSON object a line")
    return chunks


def read_chunk(source: Path, chunk: Chunk) -> list[Line]:
    """The rows of a chunk."""
    lines = []
    with open(source, "rb") as file:
        file.seek(chunk.offset)
        for number in range(chunk.first_line, chunk.first_line + chunk.lines):
            text = file.readline()
            if text.strip():
                lines.append(_parsed(source, number, text))
    return lines


def _parsed(source: Path, number: int, text: bytes) -> Line:
    try:
        values = json.loads(text.decode("utf-8-sig" if number == 1 else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}:{number}: not valid JSON ({error}); correct or remove the line") from None
    if not isinstance(values, dict):
        raise DataError(f"{source}:{number}: holds {type(values).__name__}, not an object with columns")
    return Line(number, values)


class ChunkActor:
    """One process of the pool."""

    def __init__(
        self,
        source: Path,
        parts: Path,
        sign: Path,
        make: Callable[..., LineMap],
        arguments: Mapping[str, Any],
    ) -> None:
        """Args: sign: what the driver planted among the parts."""
        self._source, self._parts, self._sign = source, parts, sign
        self._make, self._arguments = make, arguments
        self._map: LineMap | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Map the one chunk of a batch; answers an error of the user as text, since Ray Data loses its type."""
        chunk = Chunk(**{name: int(values[0]) for name, values in batch.items()})
        try:
            if self._map is None:
                require_shared(self._sign, self._source)
                self._map = self._make(**self._arguments)
            write_json_lines(part_of(self._parts, chunk), self._map(read_chunk(self._source, chunk)))
        except UserError as error:
            return {"error": [str(error)]}
        return {"error": [""]}


def part_of(parts: Path, chunk: Chunk) -> Path:
    return parts / f"{chunk.index:06d}.jsonl"


def map_file(
    source: Path,
    chunks: Sequence[Chunk],
    parts: Path,
    make: Callable[..., LineMap],
    arguments: Mapping[str, Any],
    pool: Pool,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Make every part that is not there yet.

    Args:
        make: called with `arguments` in each actor; its result maps the lines of a chunk.
        progress: called with the number of finished chunks, those of earlier jobs included.

    Raises:
        UserError: what one raised inside an actor said.
        RunFailure: after RETRIES starts anew an actor still dies, or nothing finishes for `silence_seconds`.
    """
    parts.mkdir(parents=True, exist_ok=True)
    _quiet_ray_data(pool)
    for attempt in range(RETRIES + 1):
        missing = [chunk for chunk in chunks if not part_of(parts, chunk).exists()]
        done = len(chunks) - len(missing)
        progress(done)
        if not missing:
            return
        try:
            with planted(parts) as sign:
                for _ in _finished(source, missing, parts, sign, make, arguments, pool):
                    done += 1
                    progress(done)
            return
        except (ExecutionTimeoutError, ray.exceptions.RayError) as error:
            if attempt == RETRIES:
                raise RunFailure(
                    f"an actor failed {attempt + 1} times on {source} ({done} of {len(chunks)} chunks are "
                    f"kept: the same command goes on from there): {' '.join(str(error).split())[-800:]}"
                ) from error


def _finished(
    source: Path,
    chunks: Sequence[Chunk],
    parts: Path,
    sign: Path,
    make: Callable[..., LineMap],
    arguments: Mapping[str, Any],
    pool: Pool,
) -> Iterator[None]:
    """Yields once for each chunk whose part is there now."""
    table = ray.data.from_items([dict(vars(chunk)) for chunk in chunks], override_num_blocks=len(chunks))
    with warnings.catch_warnings():
        # Ray 2.60 has no other way yet to bound restarts, and says that this one will go.
        warnings.simplefilter("ignore", DeprecationWarning)
        results = table.map_batches(
            ChunkActor,
            batch_size=1,
            compute=ActorPoolStrategy(size=min(pool.actors, len(chunks)), max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(source.absolute(), parts.absolute(), sign.absolute(), make, dict(arguments)),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            runtime_env={"env_vars": dict(pool.environment)},
            ray_remote_args_fn=_no_restarts,
        )
    for batch in results.iter_batches(batch_size=1, prefetch_batches=0):
        if batch["error"][0]:
            raise UserError(str(batch["error"][0]))
        yield


def _no_restarts() -> dict[str, int]:
    """Ray would start a dead actor again without end; `map_file` starts the pool again, RETRIES times."""
    return {"max_restarts": 0, "max_task_retries": 0}


def rows_of(parts: Path, chunks: Sequence[Chunk]) -> Iterator[dict[str, Any]]:
    """All result rows in the source's order, one part in memory at a time."""
    for chunk in chunks:
        yield from stream_json_lines(part_of(parts, chunk))


def _quiet_ray_data(pool: Pool) -> None:
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = int(pool.silence_seconds) + 1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
