"""Writes files beside training: a true copy in host memory first, then a thread that writes it.

`snapshot` copies at once, so that training may go on changing its tensors. The thread writes, hashes what
it writes (not what the disk gives back) and makes it durable. One write at a time, so that host memory
holds at most one copy.
"""

from __future__ import annotations

import copy
import hashlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from rairl_ray.files import fsync_folder
from rairl_ray.types import Written


def snapshot(value: Any) -> Any:
    """A copy of nested dicts, lists and tuples whose tensors lie in host memory and belong to nobody else.

    Tensors that are one (tied weights) stay one. A view is copied alone, without the storage behind it.
    """
    return _copied(value, {})


def _copied(value: Any, seen: dict[tuple[object, ...], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # What has no elements has no address of its own.
        place = value.data_ptr() if value.numel() else id(value)
        key = (value.device, place, value.dtype, value.shape, value.stride())
        if key not in seen:
            seen[key] = value.detach().to("cpu", copy=True)
        return seen[key]
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps the class and what state_dict() hangs on it
        for name, item in value.items():
            copied[name] = _copied(item, seen)
        return copied
    if isinstance(value, list):
        return [_copied(item, seen) for item in value]
    if type(value) is tuple:
        return tuple(_copied(item, seen) for item in value)
    return copy.deepcopy(value)


class AsyncWriter:
    """Writes one set of files at a time, in a thread of its own."""

    def __init__(self) -> None:
        # It costs three times as much as everything else in a write, and says less than our own hash.
        torch.serialization.set_crc32_options(False)
        # Its priority stays: a thread that waits for a core while it holds Python's lock holds training up.
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._future: Future[Written] | None = None

    def start(self, folder: Path, files: Mapping[str, Any], parts: Mapping[str, tuple[str, ...]]) -> None:
        """Begin to write `files` (name below `folder` -> bytes, or what torch.save takes)."""
        if self._future is not None and not self._future.done():
            raise RuntimeError("a write is still on; wait for it before the next one")
        self._future = self._thread.submit(_write_all, folder, files, dict(parts))

    def result(self, wait: bool) -> Written | None:
        """What the last `start` has written; None while it is still writing and `wait` is false.

        A disk that fails is a value (`Written.error`), any other error is raised.
        """
        if self._future is None:
            raise RuntimeError("nothing was ever written")
        if not wait and not self._future.done():
            return None
        return self._future.result()


def _write_all(folder: Path, files: Mapping[str, Any], parts: dict[str, tuple[str, ...]]) -> Written:
    start = time.perf_counter()
    facts: dict[str, dict[str, Any]] = {}
    path = folder
    try:
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            facts[name] = _write(path, content)
        for path in {(folder / name).parent for name in files}:
            fsync_folder(path)
    except OSError as error:
        return Written({}, {}, time.perf_counter() - start, f"{path}: {error.strerror or error}")
    return Written(facts, parts, time.perf_counter() - start)


def _write(path: Path, content: Any) -> dict[str, Any]:
    sink = _Sink(path)
    try:
        if isinstance(content, bytes):
            sink.write(content)
        else:
            torch.save(content, cast(IO[bytes], sink))
    finally:
        sink.close()
    return {"size": sink.size, "sha256": sink.digest.hexdigest()}


class _Sink:
    """A file that hashes what passes through it.

    torch.save calls `write` from C++ code that no exception may cross, so a failure waits for `close`.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self.digest = hashlib.sha256()
        self._file = open(path, "wb")  # noqa: SIM115
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        if self._error is None:
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """torch.save asks for it; `close` does it."""

    def close(self) -> None:
        """Make the file durable. Raises the first OSError of all writes."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            self._error = self._error or error
        with suppress(OSError):
            self._file.close()
        if self._error is not None:
            raise self._error
