"""The trials of a sweep: every point of its space with every seed, all checked before one starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError
from rairl_ray.keys import keyed_random
from rairl_ray.metrics import EVAL_PASS_AT
from rairl_ray.sweep.file import Axis, SweepFile, axes

SAVED = "sweep.json"
"""The sweep as it was started, in its folder."""
SHOWN_ERRORS = 20
_NOT_PLAIN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
"""What JSON leaves as it is and a YAML reader folds or refuses."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; equal values and seed have the same id, whatever else the sweep holds."""

    id: str
    values: dict[str, Any]
    """Dotted key -> value, of the axes that count for it."""
    seed: int
    overrides: tuple[str, ...]
    """As `launch.py train` takes them."""
    config: RunConfig


def trials(sweep: SweepFile) -> list[Trial]:
    """All trials of a grid or random sweep. Raises ConfigError with one line for each bad point."""
    made: list[Trial] = []
    problems: list[str] = []
    for values in _points(sweep):
        for seed in sweep.seeds:
            try:
                made.append(trial(sweep, values, seed))
            except ConfigError as error:
                problems += [f"{_told(values)}: {line}" for line in str(error).splitlines()]
                break
    problems += dict.fromkeys(line for item in made for line in misfits(sweep, item.config))
    if problems:
        more = [f"and {len(problems) - SHOWN_ERRORS} more"] if len(problems) > SHOWN_ERRORS else []
        raise ConfigError("\n".join([*problems[:SHOWN_ERRORS], *more]))
    return made


def trial(sweep: SweepFile, values: dict[str, Any], seed: int) -> Trial:
    """One trial. Raises ConfigError where its configuration contradicts itself."""
    name = trial_id(values, seed)
    settings = {**sweep.overrides, **values}
    settings |= {"seed": seed, "output_dir": sweep.output_dir, "name": f"{sweep.name}/trials/{name}"}
    overrides = tuple(override(key, value) for key, value in settings.items())
    return Trial(name, values, seed, overrides, load_config(sweep.base, overrides))


def override(key: str, value: Any) -> str:
    """`key=value` as `launch.py train` reads it back: the value in JSON, which is YAML too."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{key}=" + _NOT_PLAIN.sub(lambda found: rf"\u{ord(found[0]):04x}", text)


def misfits(sweep: SweepFile, config: RunConfig) -> list[str]:
    """Why a run of this configuration would never report the sweep's metric; a line each."""
    found = []
    if not config.eval.at_end:
        found.append("eval.at_end=false: a sweep compares final evaluations; set eval.at_end=true")
    if sweep.scheduler.type == "asha" and not config.eval.every:
        found.append("eval.every=0: scheduler.type=asha compares evaluations during a run; set eval.every")
    size = sweep.metric.removeprefix(EVAL_PASS_AT.format(k=""))
    if size != sweep.metric and size.isdecimal() and int(size) not in {1, *config.eval.k}:
        found.append(f"metric={sweep.metric}: eval.k={list(config.eval.k)} lacks {size}; add it")
    return found


def trial_id(values: dict[str, Any], seed: int) -> str:
    """Readable and unique: the last word of each key with its value, the seed, six digits of a hash."""
    content = json.dumps([values, seed], sort_keys=True, default=str)
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]
    readable = re.sub(r"[^\w.=-]+", "-", ",".join([*words, f"seed={seed}"]))[:80].strip("-")
    return f"{readable}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"


def _points(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Different points, in the order of the file (grid) or of the draw (random)."""
    every = axes(sweep)
    seen: set[str] = set()
    for values in _grid(every) if sweep.search.type == "grid" else _draws(every, sweep):
        point = _that_count(every, values, sweep.overrides)
        content = json.dumps(point, sort_keys=True, default=str)
        if content not in seen:
            seen.add(content)
            yield point


def _grid(every: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    keys = [axis.key for axis in every]
    for values in itertools.product(*(axis.values for axis in every)):
        yield dict(zip(keys, values, strict=True))


def _draws(every: Sequence[Axis], sweep: SweepFile) -> Iterator[dict[str, Any]]:
    for number in range(sweep.trials or 0):
        random = keyed_random("sweep", sweep.search.seed, number)
        yield {axis.key: _drawn(axis, random) for axis in every}


def _drawn(axis: Axis, random: Any) -> Any:
    if axis.kind in ("grid", "choice"):
        return random.choice(axis.values)
    low, high = axis.values
    if axis.kind == "randint":
        return random.randrange(low, high)
    if axis.kind == "loguniform":
        return float(low * (high / low) ** random.random())
    return float(random.uniform(low, high))


def _that_count(every: Sequence[Axis], values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The values whose conditions are met, by an override or by another axis that itself counts."""
    by_key = {axis.key: axis for axis in every}

    def met(key: str, value: Any) -> bool:
        if key in by_key and counts(by_key[key]):
            return bool(values[key] == value)
        return key in overrides and bool(overrides[key] == value)

    def counts(axis: Axis) -> bool:
        return all(met(key, value) for key, value in axis.when)

    return {axis.key: values[axis.key] for axis in every if counts(axis)}


def _told(values: dict[str, Any]) -> str:
    return "point " + (", ".join(f"{key}={value}" for key, value in values.items()) or "(base)")


def planned(sweep: SweepFile) -> dict[str, tuple[dict[str, Any], int]]:
    """Id -> (values, seed) of all trials, without looking at their configurations."""
    return {trial_id(values, seed): (values, seed) for values in _points(sweep) for seed in sweep.seeds}


def read_sweep(folder: Path) -> SweepFile:
    """The sweep that was started in a folder, which may have been moved since, or named from elsewhere."""
    file = SweepFile.model_validate_json((folder / SAVED).read_text(encoding="utf-8"))
    output = folder.absolute().parents[len(Path(file.name).parts) - 1]
    return file.model_copy(update={"output_dir": str(output)})


def sweep_folder(sweep: SweepFile) -> Path:
    return Path(sweep.output_dir).absolute() / sweep.name


def trial_folder(sweep: SweepFile, name: str) -> Path:
    """The run folder of a trial; only the run itself makes it."""
    return sweep_folder(sweep) / "trials" / name


def trial_log(sweep: SweepFile, name: str) -> Path:
    """What a trial's processes printed, one after the other."""
    return sweep_folder(sweep) / "logs" / f"{name}.log"


def stop_mark(sweep: SweepFile, name: str) -> Path:
    """The file that says that ASHA stopped a trial."""
    return sweep_folder(sweep) / "stopped" / name
