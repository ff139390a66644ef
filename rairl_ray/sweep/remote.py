"""A sweep whose `output_dir` is remote: its folder mirrored, its trials fetched, and watched from any node.

Each trial's process mirrors its own run. The sweep's process mirrors the rest of the sweep's folder, and
fetches of a trial that ran on another node what says how it ended. Without a scheme all of this does nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from rairl_ray.errors import RunFailure
from rairl_ray.mirror import AT_ONCE, Mirror
from rairl_ray.mirrored_files import MARK, read_mark, state_files
from rairl_ray.runfolder import RunFolder
from rairl_ray.storage import FAULTS, Store, local_folder
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import sweep_folder, trial_folder, trial_log
from rairl_ray.sweep.result import DONE, FINISHED, state_of
from rairl_ray.sweep.stopping import leave_request, stop_request, trial_ids
from rairl_ray.trainer.outputs import refusing, sent_back

LOOK_SECONDS = 5.0
"""Between two looks for a stop request over there, and before a place that does not answer is asked again."""
_looked: dict[str, tuple[float, bool]] = {}
"""Trial -> when it was looked for a stop request, and whether there was one."""


@contextmanager
def mirrored_sweep(file: SweepFile, resume: bool, warn: Callable[[str], None]) -> Iterator[None]:
    """The sweep's folder is fetched before and mirrored within; of a resume all trials' states are there, too.

    Raises:
        ConfigError: a place that cannot be used; nothing was started.
        RunFailure: the sweep ended well, but not everything arrived.
    """
    if "://" not in file.output_dir:
        yield
        return
    store, folder = Store(file.output_dir), sweep_folder(file)
    store.probe()
    staging = local_folder(file.output_dir)
    mirror = Mirror(store, staging, [file.name], warn)
    with refusing(store):
        staging.mkdir(parents=True, exist_ok=True)
        mirror.look()
        mirror.fetch(file.name)
        if resume:
            mirror.read_inner(file.name, state_files)
            requests = stop_request(file).parent.name
            for name in store.names(f"{file.name}/{requests}"):
                store.delete(f"{file.name}/{requests}/{name}")
            _send_rest(file, store, warn)
    # Trials of two sweeps must not take turns.
    mirror.when_taken = partial(leave_request, stop_request(file))
    warn(f"output: {store.plain}/{file.name}, staged in {folder}")
    mirror.start()
    rest = f"the files are in {folder}; sweep --resume uploads the rest"
    with sent_back([mirror], rest, warn):
        yield
        try:
            _send_rest(file, store, warn)
        except FAULTS as error:
            raise RunFailure(
                f"{store.plain}/{file.name}: not all trials were uploaded ({error}); {rest}"
            ) from None


def _send_rest(file: SweepFile, store: Store, warn: Callable[[str], None]) -> None:
    """Upload what did not arrive of finished trials of this machine, whose processes are gone.

    Raises one of FAULTS.
    """
    there, late = store.names(file.name), []
    for name in trial_ids(file):
        place, mark = f"trials/{name}", read_mark(trial_folder(file, name))
        last = (f"{place}/final/policy/config.json", f"{place}/final/policy/adapter_config.json")
        whole = f"{place}/evaluations/final/summary.json" in there and not there.keys().isdisjoint(last)
        if not whole and mark is not None and state_of(file, name) == FINISHED:
            token = store.read(f"{file.name}/{place}/{MARK}")
            late += [f"{file.name}/{place}"] if token in (None, mark["token"].encode()) else []
    mirror = Mirror(store, local_folder(file.output_dir), late, warn)
    mirror.look()
    mirror.sync()


def bring_trials(file: SweepFile, names: Sequence[str], warn: Callable[[str], None]) -> None:
    """Fetch how trials ended that ran on another node. A place that does not answer is a line."""
    names = [name for name in names if state_of(file, name) not in DONE]
    if "://" not in file.output_dir or not names:
        return
    try:
        mirror = Mirror(Store(file.output_dir), local_folder(file.output_dir), [], warn)

        def bring(name: str) -> None:
            for path in (trial_folder(file, name), trial_log(file, name)):
                place = path.relative_to(mirror.staging).as_posix()
                if path.suffix != ".log":
                    mirror.read(place, state_files)
                elif not path.is_file() and mirror.store.read(place) is not None:
                    mirror.store.download(place, path)

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(bring, names))
    except FAULTS as error:
        warn(f"how {', '.join(names[:3])} ended could not be fetched: {' '.join(str(error).split())[:300]}")


# --- on the node of a trial -----------------------------------------------------------------------------


def spec_for(file: SweepFile) -> dict[str, Any]:
    """What a trial's watcher needs to find the sweep on its own node."""
    if "://" not in file.output_dir:
        return {"remote": None}
    return {"remote": file.output_dir, "staging": str(local_folder(file.output_dir))}


def on_this_node(spec: dict[str, Any]) -> dict[str, Any]:
    """The same trial in the staging folder of this node, with what says how its run stands.

    Raises one of FAULTS where the place does not answer: nobody knows then whether the run was started.
    """
    if spec.get("remote") is None:
        return spec
    here = local_folder(spec["remote"])

    def moved(text: str) -> str:
        return str(here / Path(text).relative_to(spec["staging"]))

    name = Path(spec["folder"]).relative_to(spec["staging"]).as_posix()
    try:
        Mirror(Store(spec["remote"]), here, [], print).read(name, state_files)
    except FAULTS:
        time.sleep(LOOK_SECONDS)
        raise
    changed = {"folder": moved(spec["folder"]), "log": moved(spec["log"]), "staging": str(here)}
    return {**spec, **changed, "stops": [moved(stop) for stop in spec["stops"]]}


def asked_elsewhere(spec: dict[str, Any]) -> bool:
    """Whether the sweep, whose process is on another node, asks the trial to stop."""
    if not _elsewhere(spec):
        return False
    last, asked = _looked.get(spec["folder"], (-math.inf, False))
    if not asked and time.monotonic() - last > LOOK_SECONDS:
        with suppress(*FAULTS):
            store = Store(spec["remote"])
            asked = any(store.read(_place(spec, stop)) is not None for stop in spec["stops"])
        _looked[spec["folder"]] = (time.monotonic(), asked)
    return asked


def send_log(spec: dict[str, Any]) -> None:
    """Upload what the trial printed, where the sweep's process, which mirrors the logs, is on another node."""
    if _elsewhere(spec):
        with suppress(*FAULTS):
            Store(spec["remote"]).upload(Path(spec["log"]), _place(spec, spec["log"]), lambda _bytes: None)


def _place(spec: dict[str, Any], path: str) -> str:
    return Path(path).relative_to(spec["staging"]).as_posix()


def _elsewhere(spec: dict[str, Any]) -> bool:
    """Whether no process works on the sweep's folder in this node's staging folder."""
    return spec.get("remote") is not None and RunFolder(Path(spec["stops"][0]).parents[1]).holder is None
