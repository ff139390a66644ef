"""Which files of a mirrored folder go where: marks, what was fetched, and what is mirrored by itself."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rairl_ray.checkpoint import MANIFEST
from rairl_ray.files import REWARD_FILE, json_text, name_beside, write_atomic
from rairl_ray.storage import Object

MARK = ".mirror"
RECORD = ".fetched"
"""File of a fetched folder: name -> the facts of the remote file and of its copy, as they were then."""
SIGNS = ("config.yaml", "settings.json", "sweep.json", "transfer.json")
"""A folder is mirrored once it has one of these: of a run, an evaluation, a sweep, a transfer matrix."""
APART = ("trials", "warm_starts")
"""Folders of a sweep whose runs are mirrored by themselves, from their first moment on."""
TEXTS = ("config.yaml", "fork.json", "adapter_config.json")
"""Files in which paths below the staging folder are URIs over there."""
CHECKPOINTS = "checkpoints/"
REPORT = "report/"

Signature = tuple[int, int]
"""Size and modification time."""
Wanted = Callable[[str], bool]
"""Whether a file of a run is needed, by its name below the run."""
STATE = {
    "sweep.json", "points.jsonl", "config.yaml", "fork.json", "metrics.jsonl", "events.log",
    "evaluations/final/summary.json",
    "final/policy/config.json", "final/policy/adapter_config.json", f"final/reward_model/{REWARD_FILE}",
}  # fmt: skip
"""Files that say how a run or a sweep stands."""
STATE_FOLDERS = ("logs/", "stopped/", "stop_requests/")
"""Of a sweep: files that say more of it."""


def state_files(file: str) -> bool:
    """Wanted of a run or a sweep of which one asks how it stands."""
    return file in STATE or file.startswith(STATE_FOLDERS)


def model_files(file: str) -> bool:
    """Wanted of a run whose policy or reward is used."""
    return file in STATE or file.startswith("final/")


def but_weights(file: str) -> bool:
    """Wanted of a run that is reported."""
    return not file.endswith((".safetensors", ".bin")) and not file.startswith(REPORT)


def everything(_file: str) -> bool:
    """Wanted of a run that goes on; checkpoints are asked for by themselves."""
    return True


def write_mark(folder: Path, before: str | None, *, goes_on: bool) -> dict[str, Any]:
    """Give a folder a mark of its own.

    Args:
        before: the mark that the remote copy bore when this folder began.
        goes_on: whether this folder continues that copy, or is another run.
    """
    mark = {"token": uuid.uuid4().hex, "before": before, "goes_on": goes_on}
    write_atomic(folder / MARK, json_text(mark) + "\n")
    return mark


def read_mark(folder: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.keys() == {"token", "before", "goes_on"} else None


def local_files(folder: Path) -> dict[str, Signature]:
    """Path below the folder -> signature, of what is mirrored: no links, no locks or unfinished files (hidden).

    Of checkpoints only those with a manifest, which the trainer's rename has finished.
    """
    return walk(folder)[0]


def walk(folder: Path) -> tuple[dict[str, Signature], list[str]]:
    """(`local_files`, the folders below that are mirrored by themselves)."""
    found: dict[str, Signature] = {}
    apart = [name for name in APART if (folder / "sweep.json").is_file() and (folder / name).is_dir()]
    for above, folders, files in os.walk(folder):  # It passes over what vanishes meanwhile.
        place = Path(above).relative_to(folder).as_posix()
        if place in apart or (MARK in files and place != "."):
            apart += [] if place in apart else [place]
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(above, name) for name in files if not name.startswith(".")):
            with contextlib.suppress(FileNotFoundError):
                facts = path.lstat()
                if stat.S_ISREG(facts.st_mode):
                    found[path.relative_to(folder).as_posix()] = (facts.st_size, facts.st_mtime_ns)
    whole = {step for step in steps_of(found) if f"{step}/{MANIFEST}" in found}
    return {
        n: s for n, s in found.items() if not n.startswith(CHECKPOINTS) or "/".join(n.split("/")[:2]) in whole
    }, apart


def by_itself(names: Mapping[str, Object], inner: tuple[str, ...] = ()) -> dict[str, Object]:
    """Remote files without marks and without folders mirrored by themselves, there or (`inner`) here."""
    inner += tuple(name.removesuffix(MARK) for name in names if name.endswith(f"/{MARK}"))
    inner += tuple(f"{name}/" for name in APART if "sweep.json" in names)
    return {name: facts for name, facts in names.items() if name != MARK and not name.startswith(inner)}


def signature_of(path: Path) -> tuple[int, ...]:
    """Empty where there is no file."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return ()
    return facts.st_size, facts.st_mtime_ns


def read_record(folder: Path) -> dict[str, list[int]]:
    """What was fetched into a folder: file -> size and time over there, size and time here."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_record(
    folder: Path, fetched: Mapping[str, Object], before: Mapping[str, list[int]] | None = None
) -> None:
    record = {**(before or {}), **{f: [*facts, *signature_of(folder / f)] for f, facts in fetched.items()}}
    write_atomic(folder / RECORD, json.dumps(record))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Wait until no other process fetches this folder, and hold it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f".{folder.name}.fetch"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def put_in_place(temporary: Path, folder: Path, known: Mapping[str, list[int]]) -> Path | None:
    """Let a fetched folder take the place of the staged one, whose inner folders stay.

    Args:
        known: the record of the staged one.

    Returns:
        Where that is now, if it was more than a copy.
    """
    aside = None
    if folder.exists():
        local, apart = walk(folder)
        for inner in apart:
            (temporary / inner).parent.mkdir(parents=True, exist_ok=True)
            (folder / inner).rename(temporary / inner)
        ours = {file: facts for file, facts in local.items() if not file.startswith(REPORT)}
        copied = all(known.get(file, [])[2:] == [*facts] for file, facts in ours.items())
        aside = temporary.with_name(f"{temporary.name}-old") if copied else name_beside(folder)
        folder.rename(aside)
        if copied:
            shutil.rmtree(aside, ignore_errors=True)
            aside = None
    temporary.rename(folder)
    return aside


def steps_of(names: Iterable[str]) -> set[str]:
    """The checkpoint folders (checkpoints/step-000020) among names of files."""
    parts = [name.split("/") for name in names if name.startswith(f"{CHECKPOINTS}step-")]
    return {"/".join(part[:2]) for part in parts if len(part) > 2}
