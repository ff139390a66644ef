"""Keeps the folders of a run equal in a remote `output_dir`: fetched before, uploaded beside training.

The trainer knows a local staging folder alone. Each mirrored folder bears a mark (`.mirror`), and so does its
remote copy: equal marks say that the remote copy is this folder's. A folder whose mark the remote copy does
not bear is another run, or the same one as another machine has continued.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rairl_ray.checkpoint import MANIFEST, verify
from rairl_ray.files import json_text, name_beside, write_atomic
from rairl_ray.storage import FAULTS, Object, Store

MARK = ".mirror"
CHECKPOINTS = "checkpoints/"
PAUSE_SECONDS = 5.0
"""Between two looks at the folders, and before a failed upload is tried again."""
PATIENCE_SECONDS = 60.0
"""At the end: how long no byte may move before the rest is left to a resume."""

LARGE = 1 << 20
"""Bytes from which on a file is not uploaded again without need."""

Signature = tuple[int, int]
"""Size and modification time."""


class TakenError(RuntimeError):
    """Another process mirrors its own folder to the same name."""


class Mirror:
    """Local folders -> their remote copies. `sync` is one pass; `start` repeats it in a thread."""

    def __init__(self, store: Store, staging: Path, names: Sequence[str], warn: Callable[[str], None]) -> None:
        """The run's own name is the last of `names`; those before it are its warm starts'."""
        self.store, self.staging, self.names, self._warn = store, staging, tuple(names), warn
        self._sent: dict[str, dict[str, Signature]] = {name: {} for name in names}
        self._fetched: dict[str, dict[str, Signature]] = {}
        self._claimed: dict[str, str] = {}
        self._found: dict[str, str | None] = {}
        self._aside: dict[str, int] = {}
        self._taken: dict[str, str] = {}
        self._ending, self._finished = threading.Event(), threading.Event()
        self._given_up = threading.Event()
        self._moved = time.monotonic()
        self._problem: str | None = "nothing was uploaded yet"
        self._thread: threading.Thread | None = None

    # --- before training -------------------------------------------------------------------------

    def look(self) -> None:
        """Note whose the remote copies are now. Raises one of FAULTS."""
        self._found = {name: self._remote_mark(name) for name in self.names}

    def begin(self, name: str) -> None:
        """Say that a run starts afresh: a folder that is there now is left alone; one in its place is not."""
        if (self.staging / name / "config.yaml").is_file():
            self._aside[name] = (self.staging / name).stat().st_ino

    def fetch(self, name: str) -> Path | None:
        """The newest state of a run in the staging folder: what lies there already, or the remote copy.

        Small files, final artifacts, and the newest checkpoint that is whole. A staged folder that another
        machine has continued is moved aside. None where neither place has the run. Raises one of FAULTS.
        """
        folder, theirs = self.staging / name, self._found[name]
        mine = _mark(folder)
        if theirs is None or (mine is not None and theirs in (mine["token"], mine["before"])):
            return folder if folder.is_dir() else None
        if folder.exists():
            aside = name_beside(folder)
            folder.rename(aside)
            self._warn(f"{name} was continued elsewhere: its older state here was moved to {aside}")
        temporary = folder.with_name(f".fetching-{folder.name}-{uuid.uuid4().hex[:8]}")
        sizes = self.store.names(name)
        for file in sizes:
            if not file.startswith(CHECKPOINTS) and file != MARK:
                self.store.download(f"{name}/{file}", temporary / file)
        config = temporary / "config.yaml"
        if config.is_file():  # Outside, its paths are URIs.
            text = config.read_text(encoding="utf-8")
            config.write_text(text.replace(self.store.plain, str(self.staging)), encoding="utf-8")
        (temporary / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        for step in sorted(_steps(sizes), reverse=True):
            if f"{step}/{MANIFEST}" in sizes and self._fetch_checkpoint(name, step, sizes, temporary):
                break
        write_mark(temporary, theirs, goes_on=True)
        self._fetched[name] = _local_files(temporary)
        temporary.rename(folder)
        return folder

    def borrow(self, name: str) -> None:
        """Fetch a warm start that has its final policy. A copy that others own stays theirs: nothing goes up
        unless this run trains it anew. Raises one of FAULTS."""
        policy = self.store.names(f"{name}/final/policy").keys()
        if policy & {"config.json", "adapter_config.json"}:  # Uploaded last.
            folder = self.fetch(name)
            if folder is not None and (_mark(folder) or {}).get("token") != self._found[name]:
                self.begin(name)

    def _fetch_checkpoint(self, name: str, step: str, sizes: Mapping[str, Object], folder: Path) -> bool:
        for file in sizes:
            if file.startswith(f"{step}/"):
                self.store.download(f"{name}/{file}", folder / file)
        problem = verify(folder / step)
        if problem is None:
            return True
        self._warn(f"{self.store.plain}/{name}/{step}: broken checkpoint is skipped: {problem}")
        (folder / step).rename(folder / CHECKPOINTS / f".tmp-broken-{Path(step).name}")
        return False

    # --- beside training -------------------------------------------------------------------------

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def finish(self) -> str | None:
        """One last pass, tried again while bytes move; what did not arrive, None for nothing."""
        self._moved = time.monotonic()
        self._ending.set()
        while not self._finished.wait(0.1) and time.monotonic() - self._moved < PATIENCE_SECONDS:
            if self._thread is None or not self._thread.is_alive():
                break
        if self._finished.is_set():
            return self._taken.get(self.names[-1])
        self._given_up.set()
        return self._problem or "the last upload did not end"

    def _run(self) -> None:
        warned = False
        while not self._given_up.is_set():
            last = self._ending.is_set()
            try:
                self.sync()
                self._problem = None
                if warned:
                    self._warn(f"{self.store.plain}: uploads go on")
                warned = False
                if last:
                    self._finished.set()
                    return
            except FAULTS as error:
                self._problem = " ".join(str(error).split())[:300]
                if not warned:
                    text = "training goes on, uploads are tried again"
                    self._warn(f"{self.store.plain}: cannot be reached: {self._problem}; {text}")
                warned = True
            if last:
                time.sleep(1.0)
            else:
                self._ending.wait(PAUSE_SECONDS)

    def sync(self) -> None:
        """Upload what changed since the last pass. Raises one of FAULTS."""
        for name in self.names:
            folder = self.staging / name
            # A fresh start makes the folder, then moves what is in it aside, then writes its configuration.
            if not (folder / "config.yaml").is_file() or folder.stat().st_ino == self._aside.get(name):
                continue
            try:
                if name not in self._taken:
                    self._claim(name, folder)
                    self._send(name, folder)
            except TakenError as error:
                self._taken[name] = str(error)
                self._warn(str(error))

    def _claim(self, name: str, folder: Path) -> None:
        """See that the remote copy is this folder's. An earlier run there is moved aside, as it was here."""
        known = self._claimed.get(name, self._found.get(name))
        mine = _mark(folder) or write_mark(folder, known, goes_on=False)
        theirs = self._remote_mark(name)
        if theirs is not None and theirs == mine["token"]:
            if self._claimed.get(name) != theirs:  # A resume on the same machine: what is there is not known.
                self._claimed[name], self._sent[name] = theirs, {}
            return
        if name in self._claimed and theirs not in (mine["before"], None):
            raise TakenError(
                f"{self.store.plain}/{name}: another process writes there now; uploads of this one have ended"
            )
        if not (mine["goes_on"] and theirs == mine["before"]) and self.store.names(name):
            free = next(i for i in range(1, 1000) if not self.store.names(f"{name}~{i}"))
            self.store.move(name, f"{name}~{free}")
            self._warn(f"an earlier run was moved to {self.store.plain}/{name}~{free}")
        self.store.write(f"{name}/{MARK}", mine["token"].encode())
        self._claimed[name], self._sent[name] = mine["token"], self._fetched.pop(name, {})

    def _send(self, name: str, folder: Path) -> None:
        sent, local = self._sent[name], _local_files(folder)
        if not sent:
            self._skip_equal(name, folder, local)
        for file, signature in sorted(local.items(), key=lambda item: item[0].endswith("config.json")):
            if not file.startswith(CHECKPOINTS):  # Whoever sees a model's config.json finds its weights.
                self._put(name, folder, file, signature)
        fresh = [self._send_checkpoint(name, folder, step, local) for step in sorted(_steps(local))]
        # With a new checkpoint all that is no longer kept here goes, one that no manifest finished included.
        # The last one to arrive stays until the next one has, even if it is no longer kept here.
        there = {*sent, *(self.store.names(name) if any(fresh) else ())} - {MARK}
        newest = next((file for file in reversed(sent) if file.endswith(f"/{MANIFEST}")), None)
        gone = there - _local_files(folder).keys()
        if newest is not None:
            gone = {file for file in gone if not file.startswith(newest.removesuffix(MANIFEST))}
        if (_mark(folder) or {}).get("token") != self._claimed[name]:
            return  # Moved aside meanwhile: this was not the list of the folder that was uploaded.
        for file in sorted(gone, key=lambda file: not file.endswith(MANIFEST)):
            self.store.delete(f"{name}/{file}")
            sent.pop(file, None)

    def _send_checkpoint(self, name: str, folder: Path, step: str, local: dict[str, Signature]) -> bool:
        """Upload a checkpoint, its manifest last; whether that was done now, and it is whole.

        It goes up from a second name of its files, which pruning here cannot take away meanwhile.
        """
        manifest = f"{step}/{MANIFEST}"
        if self._sent[name].get(manifest) == local[manifest]:
            return False
        parts = [file for file in local if file.startswith(f"{step}/") and file != manifest]
        held = folder / CHECKPOINTS / f".tmp-upload-{Path(step).name}"
        try:
            shutil.rmtree(held, ignore_errors=True)
            for file in (*parts, manifest):
                (held / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / file, held / file)
            self.store.delete(f"{name}/{manifest}")
            return all(self._put(name, held, file, local[file]) for file in (*parts, manifest))
        except FileNotFoundError:
            return False
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _skip_equal(self, name: str, folder: Path, local: dict[str, Signature]) -> None:
        """On the first pass of a resume: what need not be uploaded again, checkpoints that are whole in both
        places and large files that were uploaded after they were written."""
        there, sent = self.store.names(name), self._sent[name]
        for step in sorted(_steps(local)):
            manifest = f"{step}/{MANIFEST}"
            if manifest in there and self.store.read(f"{name}/{manifest}") == (folder / manifest).read_bytes():
                sent |= {file: local[file] for file in local if file.startswith(f"{step}/")}
        for file, (size, modified) in local.items():
            remote = there.get(file)
            if size < LARGE or file.startswith(CHECKPOINTS) or remote is None:
                continue
            if remote.size == size and remote.modified > modified:
                sent[file] = local[file]

    def _put(self, name: str, folder: Path, file: str, signature: Signature) -> bool:
        """Upload a file that changed; whether it is there. A file that has vanished meanwhile is not."""
        if self._sent[name].get(file) == signature:
            return True
        if self._given_up.is_set():
            raise OSError("given up")
        try:
            if file == "config.yaml":
                text = (folder / file).read_text(encoding="utf-8").replace(str(self.staging), self.store.plain)
                self.store.write(f"{name}/{file}", text.encode())
            else:
                self.store.upload(folder / file, f"{name}/{file}", self._note_move)
        except FileNotFoundError:
            if (folder / file).exists():
                raise
            return False
        self._sent[name].pop(file, None)  # The order of `sent` is that of arrival.
        self._sent[name][file] = signature
        self._note_move(0)
        return True

    def _note_move(self, _bytes: int) -> None:
        self._moved = time.monotonic()

    def _remote_mark(self, name: str) -> str | None:
        """The token of a remote copy, None where there is no copy; files without a token have an empty one."""
        content = self.store.read(f"{name}/{MARK}")
        if content is not None:
            return content.decode()
        return "" if self.store.names(name) else None


def write_mark(folder: Path, before: str | None, *, goes_on: bool) -> dict[str, Any]:
    """Give a folder a mark of its own.

    Args:
        before: the mark that the remote copy bore when this folder began.
        goes_on: whether this folder continues that copy, or is another run.
    """
    mark = {"token": uuid.uuid4().hex, "before": before, "goes_on": goes_on}
    write_atomic(folder / MARK, json_text(mark) + "\n")
    return mark


def _mark(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"token", "before", "goes_on"} else None


def _local_files(folder: Path) -> dict[str, Signature]:
    """Path below the folder -> signature, of what is mirrored: no links, no locks or unfinished files (hidden).

    Of checkpoints only those with a manifest, which the trainer's rename has finished.
    """
    found = {}
    for above, folders, files in os.walk(folder):  # It passes over what vanishes meanwhile.
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(above, name) for name in files if not name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode):
                    found[path.relative_to(folder).as_posix()] = (facts.st_size, facts.st_mtime_ns)
    whole = {step for step in _steps(found) if f"{step}/{MANIFEST}" in found}
    return {
        n: s for n, s in found.items() if not n.startswith(CHECKPOINTS) or "/".join(n.split("/")[:2]) in whole
    }


def _steps(names: Iterable[str]) -> set[str]:
    """The checkpoint folders (checkpoints/step-000020) among names of files."""
    parts = [name.split("/") for name in names if name.startswith(f"{CHECKPOINTS}step-")]
    return {"/".join(part[:2]) for part in parts if len(part) > 2}
