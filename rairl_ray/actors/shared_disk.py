"""Whether all nodes of a job see its files: run folders, verbs' results and models lie on a disk they share.

Learner ranks write checkpoints where the driver commits them, actors map a file that the driver wrote, and
every actor reads its model from a folder. A node with a disk of its own would fail in the middle of a run, or
write what nobody finds; so each is asked before anything is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ray

from rairl_ray.actors.group import ActorGroup
from rairl_ray.actors.head import never_stranded
from rairl_ray.actors.process_monitor import ProcessMonitor
from rairl_ray.files import not_shared, unseen


def require_shared(sign: Path, *files: Path) -> None:
    """Refuse to work on this node where it does not see what the driver sees.

    Args:
        sign: what was `planted` in the folder that is worked on.

    Raises:
        PlacementError: naming the folder, or the first of the other files.
    """
    if missing := unseen([sign, *files]):
        key, path = ("output_dir", str(sign.parent)) if missing[0] == str(sign) else ("file", missing[0])
        raise not_shared(key, path, ray.util.get_node_ip_address())


def check_shared(monitor: ProcessMonitor, sign: Path, models: Mapping[str, str], seconds: float) -> None:
    """Ask one process on each node that is not the driver's.

    Args:
        sign: what was `planted` in the run folder.
        models: key of the configuration -> path; those that are no path here are not looked for.
        seconds: longest wait for an answer.

    Raises:
        PlacementError: the first node that does not see something.
        GroupFailure: a process did not answer.
    """
    actors = [process for process in monitor.processes.values() if process.handle is not None]
    if not actors:
        return
    here = ray.get_runtime_context().get_node_id()
    far = {process.node_id: process for process in actors if process.node_id not in ("", here)}
    keys = {str(sign): "output_dir"} | {path: key for key, path in models.items() if Path(path).exists()}
    groups = [ActorGroup(process.role, [process], monitor) for process in far.values()]
    asked = [
        group.submit("look for shared files", seconds, lambda actor, _rank: actor.unseen.remote([*keys]))
        for group in groups
    ]
    for group, pending in zip(groups, asked, strict=True):
        [missing] = group.wait(pending, never_stranded())
        if missing:
            path = sign.parent if missing[0] == str(sign) else missing[0]
            raise not_shared(keys[missing[0]], path, group.processes[0].node)
