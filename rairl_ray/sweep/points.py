"""The trials of a sweep: every point of its space with every seed, all checked before one starts."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rairl_ray.config.load import config_hash, load_config, warm_start_chain
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.variants import complete
from rairl_ray.errors import ConfigError
from rairl_ray.files import read_json_lines
from rairl_ray.keys import keyed_random
from rairl_ray.metrics import EVAL_PASS_AT
from rairl_ray.sweep.file import BASE, LISTS, Axis, Search, SweepFile, axes

SAVED = "sweep.json"
"""The sweep as it was started, in its folder."""
FORKS = "forks"
"""Below the folder of a population's member: 1, 2, ..., each a run of its own."""
SHOWN_ERRORS = 20
EXAMPLES = 20
"""Random points that are looked at before optuna draws one."""
LARGE = 10_000
"""Points of a space that nobody counts."""
_NOT_PLAIN = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")
"""What JSON leaves as it is and a YAML reader folds or refuses."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep; equal values and seed have the same id, whatever else the sweep holds."""

    id: str
    values: dict[str, Any]
    """Dotted key -> value, of the axes that count for it."""
    seed: int
    base: str
    """Its experiment file; empty for a fork."""
    overrides: tuple[str, ...]
    """As `launch.py train` takes them."""
    config: RunConfig


@dataclass(frozen=True)
class Drawn:
    """One line of a sweep's `points.jsonl`: what optuna drew."""

    values: dict[str, Any]
    refused: str | None
    """Why nothing runs there."""


def trials(sweep: SweepFile) -> list[Trial]:
    """All trials of a grid or random sweep; of an optuna sweep those that were drawn so far.

    Raises ConfigError with one line for each bad point.
    """
    made, problems = _good(sweep, _points(sweep))
    if problems:
        more = [f"and {len(problems) - SHOWN_ERRORS} more"] if len(problems) > SHOWN_ERRORS else []
        raise ConfigError("\n".join([*problems[:SHOWN_ERRORS], *more]))
    return made


def examples(sweep: SweepFile) -> list[Trial]:
    """Good trials at a few random points of a space that optuna searches.

    Raises ConfigError where it has none, or fewer points than are asked for.
    """
    every, points = axes(sweep), _draws(axes(sweep), sweep, EXAMPLES)
    if all(axis.kind in LISTS for axis in every) and math.prod(len(axis.values) for axis in every) < LARGE:
        whole = list(_different(every, sweep, _grid(every)))
        if len(whole) < (sweep.trials or 0):
            raise ConfigError(
                f"trials={sweep.trials}: the space has {len(whole)} different points; "
                "ask for fewer, or use search.type=grid"
            )
    made, problems = _good(sweep, _different(every, sweep, points))
    if not made:
        raise ConfigError("\n".join(["space: no good point among those tried", *problems[:SHOWN_ERRORS]]))
    return made


def _good(sweep: SweepFile, points: Iterable[dict[str, Any]]) -> tuple[list[Trial], list[str]]:
    """The good points' trials, and what is wrong with the others: a line each, said once."""
    made: list[Trial] = []
    problems: list[str] = []
    for values in points:
        try:
            found = at_point(sweep, values)
        except ConfigError as error:
            problems += [f"{_told(values)}: {line}" for line in str(error).splitlines()]
            continue
        missing = [line for item in found for line in misfits(sweep, item.config)]
        problems += [line for line in dict.fromkeys(missing) if line not in problems]
        made += [] if missing else found
    return made, problems


def at_point(sweep: SweepFile, values: dict[str, Any]) -> list[Trial]:
    """The trials of one point, one a seed. Raises ConfigError where their configuration contradicts itself."""
    return [trial(sweep, values, seed) for seed in sweep.seeds]


def trial(sweep: SweepFile, values: dict[str, Any], seed: int) -> Trial:
    """One trial. Raises ConfigError where its configuration contradicts itself."""
    name = trial_id(values, seed)
    settings = {**sweep.overrides, **{key: value for key, value in values.items() if key != BASE}}
    settings |= {"output_dir": sweep.output_dir, "name": f"{sweep.name}/trials/{name}"}
    settings |= {} if sweep.address is None else {"cluster.address": sweep.address}
    settings |= {} if sweep.fork else {"seed": seed}
    overrides = tuple(override(key, value) for key, value in settings.items())
    if sweep.fork:
        from rairl_ray.trainer.fork import fork_of  # imports torch, which `--status` does without

        config = fork_of(sweep.fork, overrides).config
        return Trial(name, values, config.seed, "", overrides, config)
    base = sweep.bases[values[BASE]] if BASE in values else str(sweep.base)
    return Trial(name, values, seed, base, overrides, load_config(base, overrides))


def override(key: str, value: Any) -> str:
    """`key=value` as `launch.py train` reads it back: the value in JSON, which is YAML too."""
    text = json.dumps(value, ensure_ascii=False)
    return f"{key}=" + _NOT_PLAIN.sub(lambda found: rf"\u{ord(found[0]):04x}", text)


def warm_start(sweep: SweepFile, item: Trial) -> RunConfig | None:
    """What a trial starts from, in a folder of the sweep that all trials with the same warm start share."""
    if item.config.warm_start is None:
        return None
    earlier = warm_start_chain(item.config)[0]
    name = f"{sweep.name}/warm_starts/{Path(item.config.warm_start).stem}-{config_hash(earlier)}"
    return earlier.model_copy(update={"name": name})


def started_with(sweep: SweepFile, item: Trial) -> tuple[str, ...]:
    """The trial's overrides with its warm start as the policy to start from."""
    earlier = warm_start(sweep, item)
    if earlier is None:
        return item.overrides
    path = f"{_above(sweep)}/{earlier.name}/final/policy"
    settings = {"warm_start": None, "model.policy.path": path, "model.policy.build": None}
    return (*item.overrides, *(override(key, value) for key, value in settings.items()))


def misfits(sweep: SweepFile, config: RunConfig) -> list[str]:
    """Why a run of this configuration cannot be a trial of the sweep; a line each."""
    found = []
    if config.rollout.elastic:
        most = config.rollout.most_replicas
        found.append(
            "rollout.replicas: trials share the cluster by fixed sizes, so none may grow; write a number, such "
            f"as overrides: {{rollout.replicas: {most}}}"
        )
    if not config.eval.at_end:
        found.append("eval.at_end=false: a sweep compares final evaluations; set eval.at_end=true")
    kind = sweep.scheduler.type
    if kind != "none" and not config.eval.every:
        found.append(f"eval.every=0: scheduler.type={kind} compares evaluations during a run; set eval.every")
    if kind == "pbt" and not config.trainer.checkpoint_every:
        found.append("trainer.checkpoint_every=0: scheduler.type=pbt forks checkpoints; set it to eval.every")
    for metric in sweep.metrics:
        size = metric.removeprefix(EVAL_PASS_AT.format(k=""))
        if size != metric and size.isdecimal() and int(size) not in {1, *config.eval.k}:
            found.append(f"metric={metric}: eval.k={list(config.eval.k)} lacks {size}; add it")
    return found


def trial_id(values: dict[str, Any], seed: int) -> str:
    """Readable and unique: the last word of each key with its value, the seed, six digits of a hash."""
    content = json.dumps([values, seed], sort_keys=True, default=str)
    words = [f"{key.rpartition('.')[2]}={value}" for key, value in values.items()]
    readable = re.sub(r"[^\w.=-]+", "-", ",".join([*words, f"seed={seed}"]))[:80].strip("-")
    return f"{readable}-{hashlib.sha256(content.encode()).hexdigest()[:6]}"


def _points(sweep: SweepFile) -> Iterator[dict[str, Any]]:
    """Different points, in the order of the file (grid) or of the draw."""
    yield from SEARCHES[sweep.search.type](sweep, axes(sweep))


SEARCHES: dict[str, Callable[[SweepFile, Sequence[Axis]], Iterator[dict[str, Any]]]] = {
    "grid": lambda sweep, every: _different(every, sweep, _grid(every)),
    "random": lambda sweep, every: _different(every, sweep, _draws(every, sweep, sweep.trials or 0)),
    "optuna": lambda sweep, every: itertools.islice(
        (row.values for row in drawn(sweep) if row.refused is None), sweep.trials
    ),
}
complete(f"{__name__}.SEARCHES", SEARCHES, Search, "type")


def _different(
    every: Sequence[Axis], sweep: SweepFile, found: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each point once, without the axes that do not count in it."""
    seen: set[str] = set()
    for values in found:
        point = that_count(every, sweep.overrides, lambda axis, values=values: values[axis.key])  # type: ignore[misc]
        content = json.dumps(point, sort_keys=True, default=str)
        if content not in seen:
            seen.add(content)
            yield point


def drawn(sweep: SweepFile) -> list[Drawn]:
    """What optuna has drawn in this sweep, in order."""
    file = drawn_file(sweep)
    return [Drawn(**row) for row in read_json_lines(file)] if file.is_file() else []


def _grid(every: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    keys = [axis.key for axis in every]
    for values in itertools.product(*(axis.values for axis in every)):
        yield dict(zip(keys, values, strict=True))


def _draws(every: Sequence[Axis], sweep: SweepFile, count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        random = keyed_random("sweep", sweep.search.seed, number)
        yield {axis.key: drawn_value(axis, random) for axis in every}


def drawn_value(axis: Axis, random: Any) -> Any:
    """One value of an axis. `random`: what draws, such as the module of that name."""
    if axis.kind in ("grid", "choice"):
        return random.choice(axis.values)
    low, high = axis.values
    if axis.kind == "randint":
        return random.randrange(low, high)
    if axis.kind == "loguniform":
        return float(low * (high / low) ** random.random())
    return float(random.uniform(low, high))


def that_count(
    every: Sequence[Axis], overrides: dict[str, Any], value_of: Callable[[Axis], Any]
) -> dict[str, Any]:
    """The values whose conditions are met, by an override or by another axis that itself counts.

    Args:
        value_of: asked once for each axis that counts, after those that its conditions name, and for no other.
    """
    by_key = {axis.key: axis for axis in every}
    values: dict[str, Any] = {}

    def value(axis: Axis) -> Any:
        if axis.key not in values:
            values[axis.key] = value_of(axis)
        return values[axis.key]

    def met(key: str, wanted: Any) -> bool:
        if key in by_key and counts(by_key[key]):
            return bool(value(by_key[key]) == wanted)
        return key in overrides and bool(overrides[key] == wanted)

    def counts(axis: Axis) -> bool:
        return all(met(key, wanted) for key, wanted in axis.when)

    return {axis.key: value(axis) for axis in every if counts(axis)}


def _told(values: dict[str, Any]) -> str:
    return "point " + (", ".join(f"{key}={value}" for key, value in values.items()) or "(base)")


def to_draw(sweep: SweepFile) -> int:
    """How many trials optuna has still to draw."""
    if sweep.search.type != "optuna":
        return 0
    kept = sum(row.refused is None for row in drawn(sweep))
    return max(0, (sweep.trials or 0) - kept) * len(sweep.seeds)


def planned(sweep: SweepFile) -> dict[str, tuple[dict[str, Any], int]]:
    """Id -> (values, seed) of all trials, without looking at their configurations."""
    return {trial_id(values, seed): (values, seed) for values in _points(sweep) for seed in sweep.seeds}


def read_sweep(folder: Path) -> SweepFile:
    """The sweep that was started in a folder, which may have been moved since, or named from elsewhere."""
    file = SweepFile.model_validate_json((folder / SAVED).read_text(encoding="utf-8"))
    output = folder.absolute().parents[len(Path(file.name).parts) - 1]
    return file.model_copy(update={"output_dir": str(output)})


def sweep_folder(sweep: SweepFile) -> Path:
    """On this machine; the staging folder's of a remote `output_dir`."""
    if "://" in sweep.output_dir:
        from rairl_ray.storage import local_folder  # pyarrow, which others do without

        return local_folder(sweep.output_dir) / sweep.name
    return Path(sweep.output_dir).absolute() / sweep.name


def _above(sweep: SweepFile) -> str:
    """What stands before a run's name wherever a trial may run."""
    remote = "://" in sweep.output_dir
    return sweep.output_dir.partition("?")[0].rstrip("/") if remote else str(Path(sweep.output_dir).absolute())


def trial_folder(sweep: SweepFile, name: str) -> Path:
    """The run folder in which a trial starts; only the run itself makes it."""
    return sweep_folder(sweep) / "trials" / name


def newest_run(root: Path) -> Path:
    """Where a trial's run goes on: the newest fork below its folder (population.py), else the folder itself."""
    forks = [int(path.name) for path in (root / FORKS).glob("[0-9]*")]
    return root / FORKS / str(max(forks)) if forks else root


def newest_folder(sweep: SweepFile, name: str) -> Path:
    """`newest_run` of a trial, by its id."""
    root = trial_folder(sweep, name)
    return newest_run(root) if sweep.scheduler.type == "pbt" else root


def trial_log(sweep: SweepFile, name: str) -> Path:
    """What a trial's processes printed, one after the other."""
    return sweep_folder(sweep) / "logs" / f"{name}.log"


def drawn_file(sweep: SweepFile) -> Path:
    """The points that optuna drew, a line each, in order."""
    return sweep_folder(sweep) / "points.jsonl"


def stop_mark(sweep: SweepFile, name: str) -> Path:
    """The file that says that a scheduler stopped a trial."""
    return sweep_folder(sweep) / "stopped" / name
