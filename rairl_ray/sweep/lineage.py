"""Who went on as whose fork in a population (`scheduler.type: pbt`), from `lineage.jsonl` and the folders.

A line is written before the fork is made, and the fork's folder appears whole or not at all. So a line without
a folder is an exploit that a kill prevented: its member goes on from where it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rairl_ray.errors import ConfigError
from rairl_ray.files import append_line, read_json_lines
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep.file import Scheduler, SweepFile, mutated
from rairl_ray.sweep.points import FORKS, Trial, newest_folder, sweep_folder, trial_folder


@dataclass(frozen=True)
class Exploit:
    """One line of `lineage.jsonl`: a member goes on as a fork of a better one."""

    member: str
    number: int
    """The fork's folder is MEMBER/forks/NUMBER."""
    report: int
    """The report at which the member was found bad, and its value (larger is better)."""
    step: int
    score: float
    donor: str
    donor_fork: int
    """0: the donor's first folder."""
    donor_score: float
    donor_judged: int
    """The donor's report at which it was last judged."""
    from_step: int
    """Of the donor's checkpoint."""
    values: dict[str, Any]
    """Of every axis, in the fork."""

    @property
    def origin(self) -> str:
        return f"{self.donor}@{self.from_step}"

    @property
    def told(self) -> str:
        """The values in few letters."""
        return ", ".join(
            f"{key.rpartition('.')[2]}={f'{value:.4g}' if isinstance(value, float) else value}"
            for key, value in self.values.items()
        )


def check_population(file: SweepFile, planned: Sequence[Trial]) -> None:
    """Refuse axes that no fork may change, and a population of one. Raises ConfigError."""
    if file.scheduler.type != "pbt":
        return
    from rairl_ray.trainer.fork import why_fixed  # with Ray: `plan` does without for other sweeps

    problems = [
        f"scheduler.mutations: {key}: {why}; a fork cannot change it, list the axes that it can"
        for key in mutated(file)
        if (why := why_fixed(key)) is not None
    ]
    if len(planned) < 2:
        problems.append("scheduler.type=pbt: the space has one point; a population has two members or more")
    if problems:
        raise ConfigError("\n".join(problems))


def lineage_file(file: SweepFile) -> Path:
    return sweep_folder(file) / "lineage.jsonl"


def planned_exploits(file: SweepFile) -> list[Exploit]:
    """All lines, in order; also those whose fork was never made."""
    path = lineage_file(file)
    return [Exploit(**row) for row in read_json_lines(path)] if path.is_file() else []


def lineage(file: SweepFile) -> list[Exploit]:
    """The exploits that took place, in order."""
    return [row for row in planned_exploits(file) if fork_folder(file, row).is_dir()]


def write_exploit(file: SweepFile, row: Exploit) -> None:
    append_line(lineage_file(file), json.dumps(asdict(row)))


def fork_folder(file: SweepFile, row: Exploit) -> Path:
    return trial_folder(file, row.member) / FORKS / str(row.number)


def newest_exploits(file: SweepFile) -> dict[str, Exploit]:
    """Member -> its newest fork, for those that have any."""
    return {row.member: row for row in lineage(file)}


def ancestry(file: SweepFile, member: str) -> str:
    """`DONOR@STEP > DONOR@STEP`: whom a member followed, by the ids' last digits; else empty."""
    rows = [row for row in lineage(file) if row.member == member]
    return " > ".join(f"{row.donor.rpartition('-')[2]}@{row.from_step}" for row in rows)


@dataclass(frozen=True)
class Standing:
    """What Tune's PBT knows of a member."""

    score: float | None = None
    """Where it was last judged; larger is better."""
    judged: int = 0
    """The report at which its next interval begins."""
    trained: int = 0


def standing(file: SweepFile, member: str) -> Standing:
    """How a member stands, from its newest folder."""
    rows = RunFolder(newest_folder(file, member)).read_metrics()
    metric, sign = file.metrics[0], 1 if file.modes[0] == "max" else -1
    values = [(row["step"], sign * row[metric]) for row in rows if metric in row]
    return replayed(values, file.scheduler, newest_exploits(file).get(member))


def replayed(
    reports: Sequence[tuple[float, float]], settings: Scheduler, born: Exploit | None = None
) -> Standing:
    """Judge a member's reports anew, as PopulationBasedTraining has judged them.

    Args:
        reports: (step, value, larger is better) of each report in its folder, the donor's first ones included.
        born: the fork that the folder is.
    """
    found = Standing() if born is None else Standing(born.score, born.donor_judged, born.donor_judged)
    for number, (step, value) in enumerate(reports, start=1):
        inherited = born is not None and step <= born.from_step
        early = number < settings.grace or number - found.judged < settings.interval
        if not inherited and not early and math.isfinite(value):
            found = Standing(value, number, number)
    return found


def values_now(file: SweepFile, member: str, start: Mapping[str, Any]) -> dict[str, Any]:
    """A member's values: those of its newest fork, else those it started with."""
    row = newest_exploits(file).get(member)
    return dict(start if row is None else row.values)
