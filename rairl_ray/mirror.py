"""Keeps the folders of a run equal in a remote `output_dir`: fetched before, uploaded beside training.

The trainer knows a local staging folder alone. Each mirrored folder bears a mark (`.mirror`), and so does its
remote copy: equal marks say that the remote copy is this folder's. A folder whose mark the remote copy does
not bear is another run, or the same one as another machine has continued. A folder below it with a mark of its
own (an evaluation of a run, a trial of a sweep) is mirrored by itself.
"""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rairl_ray.checkpoint import MANIFEST, verify
from rairl_ray.mirrored_files import (
    CHECKPOINTS,
    MARK,
    RECORD,
    SIGNS,
    TEXTS,
    Signature,
    Wanted,
    alone,
    by_itself,
    everything,
    local_files,
    model_files,
    put_in_place,
    read_mark,
    read_record,
    signature_of,
    steps_of,
    walk,
    write_mark,
    write_record,
)
from rairl_ray.storage import FAULTS, Object, Store

PAUSE_SECONDS = 5.0
"""Between two looks at the folders, and before a failed upload is tried again."""
PATIENCE_SECONDS = 60.0
"""At the end: how long no byte may move before the rest is left to a resume."""

AT_ONCE = 16
"""So many small folders are fetched side by side."""
LARGE = 1 << 20
"""Bytes from which on a file is not uploaded again without need."""


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
        self.when_taken: Callable[[], None] = lambda: None
        """Called where another process has taken a copy over."""

    # --- before training -------------------------------------------------------------------------

    def look(self) -> None:
        """Note whose the remote copies are now. Raises one of FAULTS."""
        self._found = {name: self._remote_mark(name) for name in self.names}

    def add(self, name: str) -> None:
        """Mirror one more folder from now on, fetched first."""
        self.read(name, everything)
        self.names = (*self.names, name)

    def read(self, name: str, wanted: Wanted) -> Path | None:
        """Fetch a folder that is not mirrored. Raises one of FAULTS."""
        self._found[name] = self._remote_mark(name)
        return self.fetch(name, wanted)

    def read_named(self, text: str) -> None:
        """Fetch the runs of this place whose final models a text names. Raises one of FAULTS."""
        for name in sorted(set(re.findall(rf"{re.escape(str(self.staging))}/([^\s'\"]+?)/final/", text))):
            if name not in self.names:
                self.read(name, model_files)

    def read_inner(self, name: str, wanted: Wanted) -> None:
        """Fetch the folders below one that are mirrored by themselves. Raises one of FAULTS."""
        found = [file.removesuffix(f"/{MARK}") for file in self.store.names(name) if file.endswith(f"/{MARK}")]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for depth in sorted({one.count("/") for one in found}):  # A folder before what lies in it.
                level = [f"{name}/{one}" for one in found if one.count("/") == depth]
                list(pool.map(lambda one: self.read(one, wanted), level))

    def resume(self, name: str) -> Path | None:
        """Fetch a run that is to go on, with its newest whole checkpoint. Raises one of FAULTS."""
        folder = self.fetch(name)
        if folder is not None and self._found[name] is not None:
            self.fetch_checkpoint(name)
        return folder

    def begin(self, name: str) -> None:
        """Say that a run starts afresh: a folder that is there now is left alone; one in its place is not."""
        if (self.staging / name / "config.yaml").is_file():
            self._aside[name] = (self.staging / name).stat().st_ino

    def fetch(self, name: str, wanted: Wanted = everything) -> Path | None:
        """The newest state of a folder in the staging folder, without checkpoints: what lies there if it is the
        newest, or the remote copy's files, of which those that have not changed are not fetched again.

        A staged folder that another machine has continued is moved aside if anything was done in it here. None
        where neither place has the folder. Raises one of FAULTS.
        """
        with alone(self.staging / name):  # Trials of a node may start from the same model.
            return self._fetch(name, wanted)

    def _fetch(self, name: str, wanted: Wanted) -> Path | None:
        folder, theirs = self.staging / name, self._found[name]
        mine = read_mark(folder)
        fresh = mine is not None and mine["before"] == theirs and not mine["goes_on"]
        if theirs is None or fresh or (mine is not None and mine["token"] == theirs):
            return folder if folder.is_dir() else None
        inner = tuple(f"{one}/" for one in walk(folder)[1])
        there = by_itself(self.store.names(name), inner)
        known = read_record(folder) if mine is not None and mine["before"] == theirs else {}
        chosen = {
            file: facts
            for file, facts in there.items()
            if file in known or (wanted(file) and not file.startswith(CHECKPOINTS))
        }
        same = all(known.get(file, [])[:2] == [*facts] for file, facts in chosen.items())
        if known and same and known.keys() <= there.keys():
            return folder
        temporary = folder.with_name(f".fetching-{folder.name}-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        for file, facts in chosen.items():
            if known.get(file) == [*facts, *signature_of(folder / file)]:
                (temporary / file).parent.mkdir(parents=True, exist_ok=True)
                os.link(folder / file, temporary / file)
            else:
                self._download(name, file, temporary / file)
        write_mark(temporary, theirs, goes_on=True)
        write_record(temporary, chosen)
        aside = put_in_place(temporary, folder, known)
        if aside is not None:
            self._warn(f"{name} was continued elsewhere: its older state here was moved to {aside}")
        self._fetched[name] = local_files(folder)
        return folder

    def fetch_checkpoint(self, name: str, step: int | None = None) -> list[int]:
        """Fetch the newest whole checkpoint, or that of `step`, unless it is here; the steps over there.

        Raises one of FAULTS.
        """
        folder, there = self.staging / name, self.store.names(name)
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        here = steps_of(local_files(folder))
        found = [one for one in sorted(steps_of(there), reverse=True) if f"{one}/{MANIFEST}" in there]
        asked = found if step is None else [one for one in found if one == f"{CHECKPOINTS}step-{step:06d}"]
        for one in asked:
            if one in here or (step is None and here and max(here) >= one):
                break
            if self._fetch_checkpoint(name, one, there, folder):
                break
        if name in self._fetched:
            self._fetched[name] = local_files(folder)
        return sorted(int(one.rpartition("-")[2]) for one in found)

    def _download(self, name: str, file: str, target: Path) -> None:
        self.store.download(f"{name}/{file}", target)
        if target.name in TEXTS:
            text = target.read_text(encoding="utf-8").replace(self.store.plain, str(self.staging))
            target.write_text(text, encoding="utf-8")

    def borrow(self, name: str) -> None:
        """Fetch a warm start that has its final policy. A copy that others own stays theirs: nothing goes up
        unless this run trains it anew. Raises one of FAULTS."""
        policy = self.store.names(f"{name}/final/policy").keys()
        if policy & {"config.json", "adapter_config.json"}:  # Uploaded last.
            folder = self.fetch(name, model_files)
            if folder is not None and (read_mark(folder) or {}).get("token") != self._found[name]:
                self.begin(name)

    def _fetch_checkpoint(self, name: str, step: str, sizes: Mapping[str, Object], folder: Path) -> bool:
        files = {file: facts for file, facts in sizes.items() if file.startswith(f"{step}/")}
        temporary = folder / CHECKPOINTS / f".tmp-fetched-{Path(step).name}"
        shutil.rmtree(temporary, ignore_errors=True)
        for file in files:
            self.store.download(f"{name}/{file}", temporary / file.removeprefix(f"{step}/"))
        problem = verify(temporary)
        if problem is not None:
            self._warn(f"{self.store.plain}/{name}/{step}: broken checkpoint is skipped: {problem}")
            return False
        temporary.rename(folder / step)
        if (folder / RECORD).is_file():
            write_record(folder, files, read_record(folder))
        return True

    # --- beside training -------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; again: nothing."""
        if self._thread is None:
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
            return next((self._taken[name] for name in reversed(self.names) if name in self._taken), None)
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
                    text = "work goes on, uploads are tried again"
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
            signed = any((folder / sign).is_file() for sign in SIGNS)
            if not signed or folder.stat().st_ino == self._aside.get(name):
                continue
            if name not in self._claimed and self._fetched.get(name) == local_files(folder):
                continue  # Nothing was done in it here yet.
            try:
                if name not in self._taken:
                    self._claim(name, folder)
                    self._send(name, folder)
            except TakenError as error:
                self._taken[name] = str(error)
                self._warn(str(error))
                self.when_taken()

    def _claim(self, name: str, folder: Path) -> None:
        """See that the remote copy is this folder's. An earlier run there is moved aside, as it was here."""
        known = self._claimed.get(name, self._found.get(name))
        mine = read_mark(folder) or write_mark(folder, known, goes_on=False)
        theirs = self._remote_mark(name)
        if theirs is not None and theirs == mine["token"]:
            if self._claimed.get(name) != theirs:  # A resume on the same machine: what is there is not known.
                self._claimed[name], self._sent[name] = theirs, {}
            return
        if name in self._claimed and theirs not in (mine["before"], None):
            raise TakenError(
                f"{self.store.plain}/{name}: another process writes there now; uploads of this one have ended"
            )
        if not (mine["goes_on"] and theirs == mine["before"]) and by_itself(self.store.names(name)):
            free = next(i for i in range(1, 1000) if not self.store.names(f"{name}~{i}"))
            self.store.move(name, f"{name}~{free}")
            self._warn(f"an earlier run was moved to {self.store.plain}/{name}~{free}")
        self.store.write(f"{name}/{MARK}", mine["token"].encode())
        self._claimed[name], self._sent[name] = mine["token"], self._fetched.pop(name, {})

    def _send(self, name: str, folder: Path) -> None:
        sent, local = self._sent[name], local_files(folder)
        if not sent:
            self._skip_equal(name, folder, local)
        for file, signature in sorted(local.items(), key=lambda item: item[0].endswith("config.json")):
            if not file.startswith(CHECKPOINTS):  # Whoever sees a model's config.json finds its weights.
                self._put(name, folder, file, signature)
        fresh = [self._send_checkpoint(name, folder, step, local) for step in sorted(steps_of(local))]
        # With a new checkpoint all that is no longer kept here goes, one that no manifest finished included.
        # The last one to arrive stays until the next one has, even if it is no longer kept here.
        # Other files there that were not sent from here are not ours: reports, evaluations made elsewhere.
        there = {
            name for name in (self.store.names(name) if any(fresh) else ()) if name.startswith(CHECKPOINTS)
        }
        newest = next((file for file in reversed(sent) if file.endswith(f"/{MANIFEST}")), None)
        gone = {*sent, *there} - local_files(folder).keys()
        gone = {file for file in gone if file.startswith(CHECKPOINTS) or not (folder / file).exists()}
        if newest is not None:
            gone = {file for file in gone if not file.startswith(newest.removesuffix(MANIFEST))}
        if (read_mark(folder) or {}).get("token") != self._claimed[name]:
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
        for step in sorted(steps_of(local)):
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
            if Path(file).name in TEXTS:
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
        return "" if by_itself(self.store.names(name)) else None
