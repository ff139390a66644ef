"""What a sweep's folders say: the state of each trial, and at the end the table and the best configuration."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rairl_ray.config.load import dump_yaml, read_saved
from rairl_ray.display import Display
from rairl_ray.errors import RunFailure
from rairl_ray.files import REWARD_FILE, json_text, write_atomic
from rairl_ray.runfolder import RunFolder, read_summary
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.lineage import Exploit, ancestry, newest_exploits
from rairl_ray.sweep.points import Trial, newest_folder, stop_mark, sweep_folder, trial

STATES = FINISHED, STOPPED, UNFINISHED, NOT_STARTED = "finished", "stopped early", "unfinished", "not started"
DONE = (FINISHED, STOPPED)
"""States that a resume leaves as they are."""
SHOWN_ROWS = 20
"""Of the table at the end; table.csv has all."""


def finished(folder: RunFolder) -> bool:
    """Whether a run has ended with its final policy and evaluation, and an airl run with its reward too."""
    if not (folder.final_policy.is_dir() and (folder.evaluations / "final" / "summary.json").is_file()):
        return False
    reward = (folder.final_reward_model / REWARD_FILE).is_file()
    return reward or not read_saved(folder.config).algorithm.needs.discriminator


def trial_state(file: SweepFile, item: Trial) -> str:
    return state_of(file, item.id)


def state_of(file: SweepFile, name: str) -> str:
    """One of STATES, for a trial's id."""
    folder = RunFolder(newest_folder(file, name))
    if finished(folder):
        return FINISHED
    if stop_mark(file, name).exists():
        return STOPPED
    return UNFINISHED if folder.config.is_file() else NOT_STARTED


def final_values(folder: RunFolder) -> dict[str, float]:
    """Metric -> value of the final evaluation."""
    summary = read_summary(folder.evaluations / "final" / "summary.json")
    return {name: entry["value"] for name, entry in summary.items()}


def last_line(file: Path) -> str:
    """The last thing a run said."""
    try:
        lines = [line for line in file.read_text(errors="replace").splitlines() if line.strip()]
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    return lines[-1][:500] if lines else "nothing was printed"


def conclude(file: SweepFile, planned: Sequence[Trial], display: Display) -> int:
    """Write table.csv, summary.json and best.yaml from the trials' own folders; 1 where some did not end.

    With several metrics the best trials are a Pareto front, and best-1.yaml, best-2.yaml, ... its members.
    Raises RunFailure where no finished trial has the metric.
    """
    folder = sweep_folder(file)
    now = newest_exploits(file)
    rows = [_row(file, item, now) for item in planned]
    merits = [_merits(file, row) for row in rows]
    known = [number for number, merit in enumerate(merits) if merit is not None]
    known.sort(key=lambda number: merits[number] or (), reverse=True)
    best = known[:1]
    if len(file.metrics) > 1:
        best = [known[place] for place in front([merits[number] or () for number in known])]
        rows = [row | {"front": number in best} for number, row in enumerate(rows)]
    _write_table(folder / "table.csv", rows)
    if not best:
        raise RunFailure(_without_best(file, rows))
    states = Counter(row["state"] for row in rows)
    summary: dict[str, Any] = {"metric": file.metric, "trials": len(rows), "states": states}
    names = ["best.yaml"] if len(file.metrics) == 1 else [f"best-{n}.yaml" for n in range(1, len(best) + 1)]
    found = [rows[number] for number in best]
    summary |= {"best": found[0]} if len(file.metrics) == 1 else {"front": found}
    write_atomic(folder / "summary.json", json_text(summary, indent=1) + "\n")
    for old in folder.glob("best*.yaml"):
        old.unlink()
    for name, number in zip(names, best, strict=True):
        item = planned[number]
        config = trial(file, now[item.id].values, item.seed).config if item.id in now else item.config
        config = config.model_copy(update={"name": f"{file.name}-{name.removesuffix('.yaml')}"})
        write_atomic(folder / name, dump_yaml(config))
    if lacking := sum(row["state"] == FINISHED for row in rows) - len(known):
        display.note(f"{lacking} finished trials have no {' or no '.join(file.metrics)}")
    ordered = [rows[number] for number in known] + [r for n, r in enumerate(rows) if n not in known]
    title = f"{file.name}, the best {SHOWN_ROWS} of {len(rows)}" if len(rows) > SHOWN_ROWS else file.name
    display.table(title, ordered[:SHOWN_ROWS], ["trial", "state", *file.metrics])
    what = "best" if len(file.metrics) == 1 else "Pareto front"
    told = [
        f"{what}: {row['trial']}, as an experiment file: {folder / name}"
        for row, name in zip(found, names, strict=True)
    ]
    figures = f"figures: python launch.py report {folder}"
    display.finish([f"table: {folder / 'table.csv'}", *told[:SHOWN_ROWS], figures])
    return 0 if all(row["state"] in DONE for row in rows) else 1


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other one reaches everywhere and passes somewhere; larger is better."""
    return [
        number
        for number, point in enumerate(points)
        if not any(
            other != point and all(x >= y for x, y in zip(other, point, strict=True)) for other in points
        )
    ]


def _merits(file: SweepFile, row: dict[str, Any]) -> tuple[float, ...] | None:
    """The row's metrics, larger being better; None where it lacks one."""
    signs = [1 if mode == "max" else -1 for mode in file.modes]
    found = tuple(s * row.get(metric, math.nan) for metric, s in zip(file.metrics, signs, strict=True))
    return found if all(map(math.isfinite, found)) else None


def _write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as output:
        writer = csv.DictWriter(output, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def _row(file: SweepFile, item: Trial, now: Mapping[str, Exploit]) -> dict[str, Any]:
    """Args: now: the newest fork of each member of a population, whose values are the member's."""
    state = trial_state(file, item)
    found = final_values(RunFolder(newest_folder(file, item.id))) if state == FINISHED else {}
    values = now[item.id].values if item.id in now else item.values
    row = {"trial": item.id, "state": state, **values, "seed": item.seed}
    return row | ({"lineage": ancestry(file, item.id)} if file.scheduler.type == "pbt" else {}) | found


def _without_best(file: SweepFile, rows: Sequence[dict[str, Any]]) -> str:
    folder = sweep_folder(file)
    ended = [row for row in rows if row["state"] == FINISHED]
    if not ended:
        return f"{folder}: no trial finished; the files in {folder / 'logs'} say why"
    there = dict.fromkeys(
        key
        for row in ended
        for key, value in row.items()
        if "/" in key and isinstance(value, float) and math.isfinite(value)
    )
    asked = " and ".join(file.metrics)
    return f"{folder}: metric={asked}: no finished trial has it; there are {', '.join(there) or 'none'}"
