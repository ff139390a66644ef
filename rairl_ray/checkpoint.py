"""Atomic checkpoints: a folder counts only once its manifest, written last, matches every file.

Life of one: `begin` makes a temporary folder beside the finished ones and writes the trainer's own state into
it; learner ranks write their shards beside training and hash them; `commit` checks that all of it is there,
writes the manifest, makes it durable and renames. A kill, a full disk or a lost folder at any point leaves
the last good checkpoint as it was. Trainer state is JSON, never a pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rairl_ray.errors import ResumeError
from rairl_ray.files import fsync_folder, write_atomic
from rairl_ray.types import Written

TRAINER = "trainer"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Identity:
    """What a run is, beyond its state: written into each manifest."""

    config_hash: str
    code_version: str
    mlflow_run_id: str | None
    references: dict[str, dict[str, str]] = field(default_factory=dict)
    """Role -> path and content of the frozen weights that it needs and no checkpoint holds."""


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written."""

    step: int
    folder: Path
    files: dict[str, dict[str, Any]]
    """The trainer's own files: name below `folder` -> size and sha256."""


class CheckpointStore:
    """Checkpoints of one run folder.

    `keep` newest ones stay. `keep=None` opens the store to read only: nothing is cleaned, so that it
    is safe beside a running trainer. `warn` is called with one line for each broken checkpoint.
    """

    def __init__(
        self, run_folder: str | Path, keep: int | None = None, warn: Callable[[str], None] | None = None
    ) -> None:
        self.folder = Path(run_folder).absolute() / "checkpoints"
        self._keep = keep
        self._warn = warn or logging.getLogger(__name__).warning

    def begin(self, step: int, state: Mapping[str, Any]) -> Draft:
        """A temporary folder with the trainer's state in it; the learners' shards go into folders beside that.

        Args:
            state: name -> JSON value with string keys (else TypeError), each in a file trainer/NAME.json.

        Raises:
            OSError: nothing is left behind then.
        """
        if self._keep is None:
            raise ValueError("this checkpoint store was opened to read only")
        # No two attempts share a folder: a rank of an earlier one may still be writing into its own.
        folder = self.folder / f".tmp-step-{step:06d}-{uuid.uuid4().hex[:8]}"
        draft = Draft(step, folder, {})
        try:
            (folder / TRAINER).mkdir(parents=True)
            for name, value in state.items():
                _check_json(value, name)
                text = json.dumps(value)
                file = f"{TRAINER}/{name}.json"
                write_atomic(folder / file, text)
                content = text.encode()
                draft.files[file] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        except BaseException:
            self.abort(draft)
            raise
        return draft

    def abort(self, draft: Draft) -> None:
        """Give the space of an unfinished checkpoint back; never raises."""
        shutil.rmtree(draft.folder, ignore_errors=True)

    def commit(
        self, draft: Draft, written: Mapping[str, Written], versions: Mapping[str, int], identity: Identity
    ) -> Path:
        """Finish a checkpoint whose shards are all on the disk; returns its folder.

        Shards are not read again: their ranks hashed what they wrote, and only the sizes are looked at.
        Checkpoints of later steps belong to a past that a resume has left, and are removed. On any error,
        such as OSError for a full disk, the unfinished folder is removed and the error goes on.

        Args:
            written: role -> what its ranks wrote below draft.folder / role.
            versions: role -> version of its weights.
        """
        temporary, final = draft.folder, self.path(draft.step)
        replaced = None
        try:
            named = _named(draft, written)
            manifest = {"step": draft.step, "versions": dict(versions), **asdict(identity), **named}
            for name, expected in named["files"].items():
                size = (temporary / name).stat().st_size
                if size != expected["size"]:
                    raise OSError(f"{name} has {size} bytes, not {expected['size']}")
            write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
            for path in (temporary, *(path for path in temporary.rglob("*") if path.is_dir())):
                fsync_folder(path)
            if final.exists():
                replaced = self.folder / f".old-{final.name}"
                os.rename(final, replaced)
            os.rename(temporary, final)
            fsync_folder(self.folder)
        except BaseException:
            self.abort(draft)
            self._restore_replaced()
            raise
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        self._point_latest(final)
        self._prune(draft.step)
        return final

    def latest_valid(self, verified: Path | None = None) -> Path | None:
        """The newest checkpoint whose files all match its manifest; broken ones are skipped with a warning.

        `verified` was found good a moment ago and is not read again.
        """
        if not self.folder.is_dir():
            return None
        if self._keep is not None:
            self._restore_replaced()
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self._finished()):
            problem = None if path == verified else verify(path)
            if problem is None:
                return path
            self._warn(f"{path}: broken checkpoint is skipped: {problem}")
        return None

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, in order; its files are not looked at."""
        return [_step(path) for path in self._finished()]

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def read(self, path: Path) -> dict[str, Any]:
        """The trainer's state of a checkpoint, as given to `begin`. Raises ResumeError if unreadable."""
        names = [file for file in self.manifest(path)["files"] if file.startswith(f"{TRAINER}/")]
        return {Path(file).stem: _read_json(path / file) for file in names}

    def manifest(self, path: Path) -> dict[str, Any]:
        """Step, versions, identity of the run, parts and files of a checkpoint."""
        return _read_json(path / MANIFEST)

    # --- inside ----------------------------------------------------------------------------------

    def _finished(self) -> list[Path]:
        found = [path for path in self.folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
        return sorted(found, key=_step)

    def _restore_replaced(self) -> None:
        """Undo a replacement that was interrupted between its two renames; finish one that was not."""
        for old in self.folder.glob(".old-*"):
            final = self.folder / old.name.removeprefix(".old-")
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, final)

    def _point_latest(self, final: Path) -> None:
        """Move the `latest` link. It is for people and tools; a file system without links loses only that."""
        link = self.folder / ".tmp-latest"
        try:
            link.unlink(missing_ok=True)
            os.symlink(final.name, link)
            os.replace(link, self.folder / "latest")
        except OSError as error:
            self._warn(f"{self.folder / 'latest'}: cannot be moved to {final.name}: {error.strerror}")

    def _prune(self, step: int) -> None:
        assert self._keep is not None
        finished = self._finished()
        kept = [path for path in finished if _step(path) <= step][-self._keep :]
        for path in finished:
            if path not in kept:
                # Renamed first: a kill while files vanish must not leave something that looks finished.
                doomed = self.folder / f".tmp-removed-{path.name}"
                with contextlib.suppress(OSError):
                    shutil.rmtree(doomed, ignore_errors=True)
                    os.rename(path, doomed)
                    shutil.rmtree(doomed, ignore_errors=True)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, in one line; None if every file has its size and checksum."""
    try:
        files = _read_json(path / MANIFEST)["files"]
        for name, expected in files.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["size"]:
                return f"{name} has {file.stat().st_size} bytes, not {expected['size']}"
            if _sha256(file) != expected["sha256"]:
                return f"{name} does not match its checksum"
        if not any(name.startswith(f"{TRAINER}/") for name in files):
            return f"{MANIFEST} names no state of the trainer"
    except (ResumeError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"{MANIFEST} cannot be used ({error})"
    return None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ResumeError(f"{path}: cannot be read ({error}); resume from another checkpoint") from error
    if not isinstance(value, dict):
        raise ResumeError(f"{path}: not a JSON object; resume from another checkpoint")
    return value


def _named(draft: Draft, written: Mapping[str, Written]) -> dict[str, Any]:
    """`parts`: what one looks for -> the files that hold it, with checksums; `files`: all of them, once."""
    files = dict(draft.files)
    parts = {file.removesuffix(".json"): [file] for file in draft.files}
    for role, report in written.items():
        files |= {f"{role}/{name}": facts for name, facts in report.files.items()}
        for part, names in report.parts.items():
            parts[f"{role}/{part}"] = [f"{role}/{name}" for name in names]
    sums = {part: {name: files[name]["sha256"] for name in parts[part]} for part in sorted(parts)}
    return {"parts": sums, "files": files}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_json(value: object, where: str) -> None:
    """JSON would silently turn other keys into strings, and they would come back as something else."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; checkpoint state needs string keys")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, f"{where}[{index}]")
