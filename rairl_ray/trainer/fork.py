"""`launch.py train --fork RUN@STEP`: a new run that goes on from another one's checkpoint, with other settings.

Weights, optimizers, cursors, replay and seed are those of the run, so the fork draws what the run drew: what
differs is what the changed keys do. The checkpoint is linked, not copied, where the disk allows it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rairl_ray.checkpoint import MANIFEST, CheckpointStore, verify
from rairl_ray.config.load import config_hash, differences, load_config, read_saved
from rairl_ray.config.rules import show
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError, ResumeError
from rairl_ray.files import write_atomic
from rairl_ray.runfolder import RunFolder
from rairl_ray.storage import local_folder
from rairl_ray.trainer.outputs import Places
from rairl_ray.trainer.run_context import FREE_KEYS, run_root

FORK_KEYS = {
    "name": "the fork's own folder; without it RUN-at-STEP and some digits of what it computes",
    "reward.density.": "where a unit of the reward ends",
    "reward.temperature": "what the reward is divided by",
    "reward.clip": "the bounds of the reward",
    "reward.outcome_weight": "how much of the task's correctness is mixed in",
    "reward.rescore": "whether the drift of rewards is measured",
    "discriminator.": "loss, rates, negatives, updates; but see below",
    "advantage.": "how rewards become advantages",
    "policy.": "rates, clipping, KL",
    "rollout.": "how the policy samples",
    "trainer.": "how long, how many prompts a step",
    "eval.": "what is evaluated, and when",
}
"""Keys (or prefixes of keys) that a fork may change, besides those of a resume -> what they decide."""

FIXED_KEYS = {
    "discriminator.head": "its weights are in the checkpoint",
    "discriminator.replay.capacity": "the buffer is in the checkpoint",
    "discriminator.warmup_": "the warm-up lies behind the checkpoint, or is under way in it",
}
"""Exceptions to FORK_KEYS -> why."""


@dataclass(frozen=True)
class Fork:
    """Where a fork starts, and as what it goes on."""

    checkpoint: Path
    step: int
    config: RunConfig
    changed: tuple[str, ...]
    """`key (run: value, now: value)` of every key that differs from the run's."""

    @property
    def source(self) -> RunFolder:
        return RunFolder(self.checkpoint.parents[1])


def fork_of(text: str, overrides: Sequence[str], resume: str | None = None) -> Fork:
    """A fork as the command line names it; checked, nothing is written.

    Args:
        text: RUN@STEP, with a run folder or a name below `output_dir`.
        overrides: `key=value` on top of the run's own saved configuration.
        resume: what `--resume` names beside it, which makes no sense.

    Raises:
        UserError: no such run or checkpoint (with the nearest ones), a damaged one, a key that cannot change.
    """
    if resume is not None:
        raise ConfigError(f"--fork {text}: is a new run; to continue one, --resume {resume} alone")
    if other := next((word for word in overrides if "=" not in word), None):
        raise ConfigError(f"--fork {text}: {other}: the configuration is the run's own; give key=value alone")
    run, _, step = text.rpartition("@")
    if not run or not step.isdecimal():
        raise ConfigError(f"--fork {text}: must be RUN@STEP, such as --fork demo/airl@20")
    # The folder alone: the rest of the configuration is the run's own.
    output = [word for word in overrides if word.partition("=")[0].strip() == "output_dir"]
    output_dir = load_config(None, output).output_dir
    places = Places(output_dir, partial(print, file=sys.stderr))
    found = places.find(run)
    if found is None:
        root = run_root("--fork", run, output_dir)
        steps = CheckpointStore(root).steps()
    else:
        root, steps = places.with_checkpoint(found, int(step))
        overrides = [*overrides, *([] if output else [f"output_dir={found.mirror.store.uri}"])]
    checkpoint = _checkpoint(text, root, int(step), steps)
    saved = read_saved(root / "config.yaml").model_copy(update={"warm_start": None})
    # The policy's path names the warm start's result already; what follows must not train another one.
    config = load_config(root / "config.yaml", ["warm_start=null", *overrides])
    changed = [item for item in differences(saved, config) if item[0] not in ("name", "output_dir")]
    _refuse_fixed(text, changed)
    if config.trainer.steps <= int(step):
        raise ConfigError(
            f"--fork {text}: trainer.steps={config.trainer.steps}: the fork starts after step {step}; give more"
        )
    if config.name == saved.name:
        name = f"{saved.name}-at-{step}-{config_hash(config)[:6]}"
        config = config.model_copy(update={"name": name})
    if local_folder(config.output_dir) / config.name == root.absolute():
        raise ConfigError(f"--fork {text}: name={config.name}: is the run itself; give the fork another name")
    told = tuple(f"{key} (run: {show(old)}, now: {show(new)})" for key, old, new in changed)
    return Fork(checkpoint, int(step), config, told)


def take_over(fork: Fork, folder: RunFolder) -> None:
    """Fill a fork's fresh folder with the run's metrics and its checkpoint, the fork's newest from now on.

    Raises ResumeError where the checkpoint cannot be copied.
    """
    target = folder.checkpoints / fork.checkpoint.name
    temporary = target.with_name(f".tmp-{target.name}-fork")
    try:
        if fork.source.metrics.is_file():
            shutil.copyfile(fork.source.metrics, folder.metrics)
        shutil.copytree(fork.checkpoint, temporary, copy_function=_link)
        manifest = json.loads((temporary / MANIFEST).read_bytes())
        manifest |= {"mlflow_run_id": None}
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
        folder.write_fork(fork.source.root, fork.step, fork.changed)
        temporary.rename(target)
    except (OSError, shutil.Error) as error:
        raise ResumeError(
            f"--fork: {fork.checkpoint} could not be copied to {target} ({error}); make room on the disk, or "
            "fork a newer step where a run that is still on has removed this one"
        ) from error
    origin = f"{fork.source.root}@{fork.step}"
    folder.event(f"forked from {origin}: {', '.join(fork.changed) or 'nothing is changed'}")


def _checkpoint(text: str, root: Path, step: int, steps: Sequence[int]) -> Path:
    """Args: steps: of all checkpoints that the run has, also where only this one was fetched."""
    store = CheckpointStore(root)
    if step not in steps:
        near = [
            max((s for s in steps if s < step), default=None),
            min((s for s in steps if s > step), default=None),
        ]
        nearest = " and ".join(str(s) for s in near if s is not None)
        found = f"the nearest: {nearest}" if nearest else "it has none at all"
        raise ResumeError(f"--fork {text}: {root} has no checkpoint of step {step}; {found}")
    path = store.path(step)
    problem = verify(path)
    if problem is not None:
        others = ", ".join(str(s) for s in steps if s != step) or "none"
        raise ResumeError(f"--fork {text}: {path} is damaged: {problem}; the other steps: {others}")
    return path


def _refuse_fixed(text: str, changed: Sequence[tuple[str, object, object]]) -> None:
    problems = []
    for key, old, new in changed:
        why = why_fixed(key)
        if key == "discriminator.loss.type" and "airl" in (old, new):
            why = "`airl` alone has a second output, whose weights are in the checkpoint"
        if why is not None:
            problems.append(f"{key} (run: {show(old)}, now: {show(new)}: {why})")
    if problems:
        raise ConfigError(
            f"--fork {text}: cannot change {', '.join(problems)}; keep the run's values, or start a new run"
        )


def why_fixed(key: str) -> str | None:
    """Why no fork may change a key; None where one may."""
    why = next((why for fixed, why in FIXED_KEYS.items() if key.startswith(fixed)), None)
    return why or (None if key.startswith((*FORK_KEYS, *FREE_KEYS)) else "no key of a fork")


def _link(source: str, target: str) -> str:
    """A second name for a file that nobody writes again; a copy where the disk has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
