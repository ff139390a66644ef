"""The sweep file: a base experiment, axes, seeds, how to search, when to stop; checked before a start."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError

from rairl_ray.config.key_names import known_keys, nearest_key
from rairl_ray.config.load import read_override
from rairl_ray.config.rules import show
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.section import NonNegativeInt, Section
from rairl_ray.config.yamlfile import Document, read_document
from rairl_ray.errors import ConfigError
from rairl_ray.metrics import EVAL_PASS_AT_1

BASE = "base"
"""Key of the axis that several bases make."""
LISTS = ("grid", "choice")
RANGES = ("uniform", "loguniform", "randint")
KINDS = ", ".join(LISTS + RANGES)


SCHEDULER_KEYS = {
    "none": (),
    "asha": ("grace", "reduction", "longest"),
    "hyperband": ("grace", "reduction", "longest", "brackets"),
    "median": ("grace", "min_samples"),
    "pbt": ("grace", "interval", "quantile", "resample", "factors", "mutations"),
}
"""Keys of `scheduler` that each type reads."""


class Search(Section):
    type: Literal["grid", "random", "optuna"] = "grid"
    """`optuna`: TPE draws each point from what the points before it reached."""
    seed: NonNegativeInt = 0
    """Keys what `random` and `optuna` draw."""


class Scheduler(Section):
    type: Literal["none", "asha", "hyperband", "median", "pbt"] = "none"
    """`hyperband`: ASHA with several `brackets`. `median` stops a trial whose best report is worse than the
    median of the others' mean reports so far. `pbt`: population-based training; bad members go on as forks of
    good ones."""
    grace: PositiveInt = 1
    """Reports of a trial before it may be stopped, or forked (`pbt`)."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """`asha`, `hyperband`: one of so many goes on at each rung."""
    longest: PositiveInt = 100
    """`asha`, `hyperband`: number of reports at which comparing ends; who got there runs to the end."""
    brackets: Annotated[int, Field(ge=2)] = 3
    """`hyperband`: so many ways to begin: bracket s compares from report grace * reduction^s on."""
    min_samples: PositiveInt = 3
    """`median`: so many other trials must have come as far before one is stopped."""
    interval: PositiveInt = 1
    """`pbt`: a member is judged at each such report."""
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    """`pbt`: this share of the members is bad, and as large a one good."""
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """`pbt`: how likely a fork draws a value anew instead of moving the donor's."""
    factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.8, 1.2)
    """`pbt`: what a fork multiplies the donor's value of a range by; of a list it takes a neighbour."""
    mutations: tuple[str, ...] | None = None
    """`pbt`: the axes whose values a fork changes; the others are the donor's. None: all axes."""


class Failures(Section):
    max_per_trial: NonNegativeInt = 1


class Budget(Section):
    hours: PositiveFloat | None = None
    """No trial starts, and those that run are stopped, after so many hours of wall time."""
    gpu_hours: PositiveFloat | None = None
    """The same once running trials have held GPUs for so long: GPUs of each placement times wall time, over all
    processes that have worked on the sweep."""


class SweepFile(Section):
    """One sweep. Axes (`space`) are checked by `axes`."""

    name: str
    """Folder below `output_dir`."""
    base: str | tuple[str, ...] = ()
    """Experiment file of every trial, relative to the sweep file; several, or a pattern such as `a/*.yaml`,
    are the first axis, `base`, whose values are FOLDER/NAME."""
    fork: str | None = None
    """RUN@STEP instead of a base: every trial goes on from this checkpoint with its own values, under the run's
    seed (trainer/fork.py)."""
    output_dir: str = "runs"
    address: str | None = None
    """Ray cluster to join, as `cluster.address`; None: what `base` says."""
    space: dict[str, Any] = Field(default_factory=dict)
    """Dotted key -> a list of values, {grid|choice: [...]} or {uniform|loguniform|randint: [low, high]}; with
    `when: {key: value}` the axis counts only in trials with that value."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Dotted key -> value for every trial."""
    seeds: tuple[NonNegativeInt, ...] = (0,)
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    metric: str | tuple[str, ...] = EVAL_PASS_AT_1
    """Of the final evaluation's summary (and of metrics.jsonl, for a scheduler). Several: the result is a
    Pareto front."""
    mode: Literal["max", "min"] | tuple[Literal["max", "min"], ...] = "max"
    """Of each metric."""
    trials: PositiveInt | None = None
    """`random`, `optuna`: points to draw."""
    max_concurrent: PositiveInt | None = None
    """None: as many as the cluster holds."""
    failures: Failures = Failures()
    budget: Budget = Budget()

    @property
    def bases(self) -> dict[str, str]:
        """FOLDER/NAME -> path of each base."""
        paths = (self.base,) if isinstance(self.base, str) else self.base
        return {f"{Path(path).parent.name}/{Path(path).stem}": path for path in paths}

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,) if isinstance(self.metric, str) else self.metric

    @property
    def modes(self) -> tuple[Literal["max", "min"], ...]:
        return (self.mode,) if isinstance(self.mode, str) else self.mode

    def by_metric(self) -> list[SweepFile]:
        """The sweep as each of its metrics alone sees it."""
        pairs = zip(self.metrics, self.modes, strict=True)
        return [self.model_copy(update={"metric": metric, "mode": mode}) for metric, mode in pairs]


@dataclass(frozen=True)
class Axis:
    """One dimension of the space."""

    key: str
    kind: Literal["grid", "choice", "uniform", "loguniform", "randint"]
    values: tuple[Any, ...]
    """The values of a list, or (low, high)."""
    when: tuple[tuple[str, Any], ...] = ()
    """(key, value) pairs that a trial must have for the axis to count."""


def load_sweep(path: str, changes: Sequence[str] = ()) -> SweepFile:
    """Read and check one sweep file; its `base` comes out as absolute paths.

    Args:
        changes: `key=value` texts that stand over the file: its own keys (`output_dir`, `budget.hours`), and
            any key of an experiment for the section `overrides`.

    Raises:
        ConfigError: one line an error, with file, line, key and remedy.
    """
    document = _changed(read_document(Path(path), path), changes)
    try:
        sweep = SweepFile.model_validate_json(json.dumps(document.data, default=str), strict=True)
    except ValidationError as error:
        raise ConfigError("\n".join(_said(document, dict(item)) for item in error.errors())) from None
    if bool(sweep.base) == (sweep.fork is not None):
        raise ConfigError(f"{document.name}: needs `base`, experiment files, or `fork`, RUN@STEP: one of them")
    if "://" in sweep.output_dir and sweep.scheduler.type == "pbt":
        told = f"output_dir={show(sweep.output_dir)}: scheduler.type=pbt forks members from folder to folder"
        raise ConfigError(f"{document.origin('output_dir')}: {told}; give a folder that all nodes share")
    if sweep.fork is not None and sweep.seeds != (0,):
        place = document.origin("seeds")
        raise ConfigError(f"{place}: seeds={list(sweep.seeds)}: a fork has its run's seed; take seeds out")
    sweep = sweep.model_copy(update={"base": () if sweep.fork else _bases(Path(path).parent, document, sweep)})
    problems = [*_key_problems(document, sweep), *_axis_problems(document, sweep)]
    if problems:
        raise ConfigError("\n".join(problems))
    return sweep


def _bases(folder: Path, document: Document, sweep: SweepFile) -> str | tuple[str, ...]:
    """The base, or bases, as absolute paths. Raises ConfigError for one that is not there, or is twice."""
    place = document.origin("base")
    found: list[str] = []
    for text in (sweep.base,) if isinstance(sweep.base, str) else sweep.base:
        names = sorted(glob.glob(text, root_dir=folder)) if glob.has_magic(text) else [text]
        paths = [(folder / name).resolve() for name in names]
        if not paths or not all(path.is_file() for path in paths):
            raise ConfigError(f"{place}: base={text}: no such experiment file {(folder / text).resolve()}")
        found += map(str, paths)
    if isinstance(sweep.base, str) and not glob.has_magic(sweep.base):
        return found[0]
    if not found or len(sweep.model_copy(update={"base": tuple(found)}).bases) < len(found):
        raise ConfigError(f"{place}: base: needs experiment files, each FOLDER/NAME once: {', '.join(found)}")
    return tuple(found)


def _changed(document: Document, changes: Sequence[str]) -> Document:
    data, lines = dict(document.data), dict(document.lines)
    for text in changes:
        key, value = read_override(text)
        first, _, rest = key.partition(".")
        if first not in SweepFile.model_fields:
            if key not in known_keys():
                raise ConfigError(f"command line: {text}: unknown; nearest: {nearest_key(key)}")
            first, rest = "overrides", key
        if rest:
            data[first] = {**(data.get(first) or {}), rest: value}
        else:
            data[first] = value
        lines.pop(f"{first}.{rest}" if rest else first, None)
    return Document(document.name, data, lines)


def is_sweep(path: str) -> bool:
    """Whether a YAML file is a sweep: it has keys of one, which no experiment has."""
    if not Path(path).is_file():
        return False
    own = set(SweepFile.model_fields) - set(RunConfig.model_fields) - {"base"}
    return bool(own & set(read_document(Path(path), path).data))


def axes(sweep: SweepFile) -> list[Axis]:
    """The axes in the file's order. Raises ConfigError for one that is not understood."""
    bases = [] if isinstance(sweep.base, str) or not sweep.base else [Axis(BASE, "grid", tuple(sweep.bases))]
    return [*bases, *(_axis(key, value) for key, value in sweep.space.items())]


def _axis(key: str, value: Any) -> Axis:
    if isinstance(value, list):
        value = {"grid": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"space.{key}={value}: must be a list of values, or one of {KINDS}")
    kinds = [kind for kind in value if kind != "when"]
    if len(kinds) != 1 or kinds[0] not in LISTS + RANGES:
        raise ConfigError(f"space.{key}: has {', '.join(map(str, kinds)) or 'nothing'}; write one of {KINDS}")
    kind, values = kinds[0], value[kinds[0]]
    if not isinstance(values, list) or not values:
        raise ConfigError(f"space.{key}: {kind} needs a list with at least one value")
    if kind in RANGES:
        numbers = len(values) == 2 and all(
            isinstance(v, int | float) and not isinstance(v, bool) for v in values
        )
        if not numbers or not values[0] < values[1] or (kind == "loguniform" and values[0] <= 0):
            raise ConfigError(f"space.{key}: {kind}={values}: must be [low, high] with low < high")
        if kind == "randint" and not all(isinstance(v, int) for v in values):
            raise ConfigError(f"space.{key}: randint={values}: must be whole numbers; or use uniform")
    when = value.get("when", {})
    if not isinstance(when, Mapping):
        raise ConfigError(f"space.{key}: when={when}: must be a mapping of another key to its value")
    return Axis(key, kind, tuple(values), tuple(when.items()))


def _key_problems(document: Document, sweep: SweepFile) -> list[str]:
    known = set(known_keys())
    named = [("space", key) for key in sweep.space] + [("overrides", key) for key in sweep.overrides]
    problems = [
        f"{document.origin(f'{section}.{key}')}: {section}.{key}: unknown; nearest: {nearest_key(key)}"
        for section, key in named
        if key not in known
    ]
    owned = {"seed": "seeds", "name": "name", "output_dir": "output_dir", "cluster.address": "address"}
    return problems + [
        f"{document.origin(f'{section}.{key}')}: {section}.{key}: is the sweep's own; use {owned[key]}"
        for section, key in named
        if key in owned
    ]


def _axis_problems(document: Document, sweep: SweepFile) -> list[str]:
    problems, keys = [], set(sweep.space) | set(sweep.overrides)
    keys |= set() if isinstance(sweep.base, str) else {BASE}
    if len(set(sweep.seeds)) < len(sweep.seeds) or not sweep.seeds:
        wrong = f"seeds={list(sweep.seeds)}: must be one or more numbers, all different"
        problems.append(f"{document.origin('seeds')}: {wrong}")
    if sweep.search.type != "grid" and sweep.trials is None:
        problems.append(f"{document.origin('search')}: search.type={sweep.search.type}: needs trials: N")
    problems += [*_metric_problems(document, sweep), *_scheduler_problems(document, sweep.scheduler)]
    problems += _population_problems(document, sweep) if sweep.scheduler.type == "pbt" else []
    for key, value in sweep.space.items():
        place = document.origin(f"space.{key}")
        try:
            axis = _axis(key, value)
        except ConfigError as error:
            problems.append(f"{place}: {error}")
            continue
        if sweep.search.type == "grid" and axis.kind in RANGES:
            problems.append(
                f"{place}: space.{key}: {axis.kind} has no grid; list values, or search.type=random or optuna"
            )
        for condition, _ in axis.when:
            if condition == key or condition not in keys:
                problems.append(f"{place}: space.{key}: when {condition}: is no other axis or override")
    return problems or _circles(document, sweep)


def _metric_problems(document: Document, sweep: SweepFile) -> list[str]:
    names, kind = sweep.metrics, sweep.scheduler.type
    if isinstance(sweep.metric, tuple) and (len(names) < 2 or len(set(names)) < len(names)):
        return [
            f"{document.origin('metric')}: metric={list(names)}: a list must have two different names or more"
        ]
    if isinstance(sweep.metric, str) != isinstance(sweep.mode, str) or len(names) != len(sweep.modes):
        told = f"metric={_listed(sweep.metric)}, mode={_listed(sweep.mode)}"
        return [f"{document.origin('mode')}: {told}: give each metric its mode, such as mode: [max, min]"]
    if len(names) > 1 and kind != "none":
        said = f"scheduler.type={kind}: compares trials by one metric, but metric={list(names)}"
        return [f"{document.origin('scheduler')}: {said}; name one, or take scheduler.type=none"]
    return []


def mutated(sweep: SweepFile) -> tuple[str, ...]:
    """`pbt`: the axes whose values a fork changes."""
    chosen = sweep.scheduler.mutations
    return tuple(sweep.space) if chosen is None else chosen


def _population_problems(document: Document, sweep: SweepFile) -> list[str]:
    """What a population cannot be: each member goes on from any other's checkpoint."""
    place, told = document.origin("scheduler.mutations"), "scheduler.type=pbt"
    if sweep.search.type == "optuna":
        line = f"{told}: search.type=optuna draws from what has ended, and members start together"
        return [f"{document.origin('search.type')}: {line}; take random or grid"]
    if len(sweep.seeds) > 1:
        line = f"{told}: seeds={list(sweep.seeds)}: a fork has its donor's seed; give one, and a sweep to each"
        return [f"{document.origin('seeds')}: {line}"]
    if not mutated(sweep):
        return [f"{document.origin('space')}: {told}: no axis whose values a fork could change; give space one"]
    if sweep.search.type == "random" and sweep.trials == 1:
        return [f"{document.origin('trials')}: {told}: trials=1: a population has two members or more"]
    problems = []
    for key in mutated(sweep):
        if key not in sweep.space:
            axes_are = ", ".join(sweep.space) or "none"
            problems.append(f"{place}: scheduler.mutations: {key} is no axis; the axes are {axes_are}")
    for key, value in sweep.space.items():
        conditions = value.get("when") if isinstance(value, Mapping) else None
        changing = [name for name in conditions or {} if name in mutated(sweep)]
        if conditions and (key in mutated(sweep) or changing):
            line = (
                f"space.{key}: {told} changes it or what its `when` names; take `when` out, or narrow mutations"
            )
            problems.append(f"{document.origin(f'space.{key}')}: {line}")
    return problems


def _listed(value: str | tuple[str, ...]) -> str | list[str]:
    return value if isinstance(value, str) else list(value)


def _scheduler_problems(document: Document, settings: Scheduler) -> list[str]:
    read, problems = SCHEDULER_KEYS[settings.type], []
    for key in document.data.get("scheduler") or {}:
        if key != "type" and key not in read:
            reads = f"has the keys {', '.join(read)}" if read else "has no keys"
            place = document.origin(f"scheduler.{key}")
            problems.append(f"{place}: scheduler.{key}: type={settings.type} {reads}; take it out")
    if settings.type in ("asha", "hyperband"):
        last = settings.brackets - 1 if settings.type == "hyperband" else 0
        first = settings.grace * settings.reduction**last
        if first > settings.longest:
            begins = f", and grace * reduction^{last} reports, where bracket {last} begins," if last else ""
            problems.append(
                f"{document.origin('scheduler.grace')}: scheduler.grace={settings.grace}: it{begins} "
                f"must be at most longest={settings.longest}"
            )
    return problems


def _circles(document: Document, sweep: SweepFile) -> list[str]:
    """Axes whose conditions lead back to themselves: nothing decides whether they count."""
    below = {axis.key: [key for key, _ in axis.when] for axis in axes(sweep)}
    problems = []
    for key in below:
        reached, ahead = set[str](), list(below[key])
        while ahead:
            other = ahead.pop()
            if other not in reached:
                reached.add(other)
                ahead += below.get(other, [])
        if key in reached:
            place = document.origin(f"space.{key}")
            problems.append(f"{place}: space.{key}: its `when` leads back to itself; remove one")
    return problems


def _said(document: Document, item: dict[str, Any]) -> str:
    key = ".".join(str(part) for part in item["loc"])
    reason = str(item["msg"]).replace("Input should be", "must be")
    if item["type"] == "extra_forbidden":
        reason = f"unknown key; a sweep file has {', '.join(SweepFile.model_fields)}"
    if key == "search.type" and item["input"] == "pbt":
        reason = (
            "pbt is a scheduler: write scheduler.type=pbt; search.type (random or grid) is where members start"
        )
    return f"{document.origin(key)}: {key}: {reason}"
