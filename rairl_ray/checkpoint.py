"""Atomic checkpoints: a folder counts only once its manifest, written last, matches every file.

Life of one: `begin` makes a temporary folder beside the finished ones; actors write their shards into
its policy/ and discriminator/; `commit` adds trainer/state.json and the manifest, makes all of it
durable, and renames. A kill or a full disk at any point leaves the last good checkpoint as it was.
Trainer state is JSON, never a pickle: reading a checkpoint executes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rairl_ray.errors import ResumeError
from rairl_ray.files import fsync_folder, write_atomic

PARTS = ("policy", "discriminator", "trainer")
MANIFEST = "manifest.json"
STATE = Path("trainer") / "state.json"


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

    def begin(self, step: int) -> Path:
        """An empty temporary folder with policy/, discriminator/ and trainer/, for the actors' shards."""
        if self._keep is None:
            raise ValueError("this checkpoint store was opened to read only")
        temporary = self.temporary(step)
        if temporary.exists():
            shutil.rmtree(temporary)
        try:
            for part in PARTS:
                (temporary / part).mkdir(parents=True)
        except OSError:
            self.abort(step)
            raise
        return temporary

    def abort(self, step: int) -> None:
        """Give the space of an unfinished checkpoint back; never raises."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def commit(
        self,
        step: int,
        parts: dict[str, Any],
        *,
        versions: dict[str, int] | None = None,
        config_hash: str | None = None,
        code_version: str | None = None,
        mlflow_run_id: str | None = None,
    ) -> Path:
        """Finish the checkpoint of `begin(step)`; returns its folder.

        `parts` is the trainer's own state: JSON values with string keys (else TypeError). Checkpoints
        of later steps belong to a past that a resume has left, and are removed. On any error, such as
        OSError for a full disk, the unfinished folder is removed and the error goes on.
        """
        temporary = self.temporary(step)
        final = self.folder / f"step-{step:06d}"
        try:
            _check_json(parts, "state")
            write_atomic(temporary / STATE, json.dumps(parts))
            manifest = {
                "step": step,
                "versions": versions or {},
                "config_hash": config_hash,
                "code_version": code_version,
                "mlflow_run_id": mlflow_run_id,
                "files": _describe_and_sync(temporary),
            }
            write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
            replaced = None
            if final.exists():
                replaced = self.folder / f".old-{final.name}"
                os.rename(final, replaced)
            os.rename(temporary, final)
            fsync_folder(self.folder)
        except BaseException:
            self.abort(step)
            self._restore_replaced()
            raise
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        self._point_latest(final)
        self._prune(step)
        return final

    def latest_valid(self) -> Path | None:
        """The newest checkpoint whose files all match its manifest; broken ones are skipped with a warning."""
        if not self.folder.is_dir():
            return None
        if self._keep is not None:
            self._restore_replaced()
            for leftover in self.folder.glob(".tmp-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        for path in reversed(self._finished()):
            problem = verify(path)
            if problem is None:
                return path
            self._warn(f"{path}: broken checkpoint is skipped: {problem}")
        return None

    def read(self, path: Path) -> dict[str, Any]:
        """The trainer's state of a checkpoint, as given to `commit`. Raises ResumeError if unreadable."""
        return _read_json(path / STATE)

    def manifest(self, path: Path) -> dict[str, Any]:
        """Step, versions, config hash, code version, MLflow run id and files of a checkpoint."""
        return _read_json(path / MANIFEST)

    # --- inside ----------------------------------------------------------------------------------

    def temporary(self, step: int) -> Path:
        """Where the unfinished checkpoint of `begin(step)` lies; learner ranks write into it."""
        return self.folder / f".tmp-step-{step:06d}"

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
        if str(STATE) not in files:
            return f"{STATE} is not in the manifest"
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


def _describe_and_sync(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file below `folder`, all made durable, whoever wrote them."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            fsync_folder(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    return files


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
