"""From paths to what they hold: runs with their evaluations, sweeps, single files, transfer matrices."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rairl_ray.config.load import read_saved
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import DataError, UserError
from rairl_ray.evaluation.rows import EvalRow, read_rows
from rairl_ray.evaluation.summary import summarise
from rairl_ray.files import read_json_lines
from rairl_ray.metrics import CALIBRATION_AUROC, DISCRIMINATOR_AUROC
from rairl_ray.report.parts import Absent
from rairl_ray.runfolder import TRANSFER_PREFIX, RunFolder, Summary, read_summary
from rairl_ray.sweep.file import SweepFile
from rairl_ray.sweep.points import SAVED, newest_run, read_sweep

ROWS, SUMMARY, LOCALISATION, TRANSFER = "rows.jsonl", "summary.json", "localisation.jsonl", "transfer.json"


@dataclass(frozen=True, kw_only=True)
class LocalisedTrace:
    """A line of localisation.jsonl: a trace, its first wrong step and the step that the reward names."""

    prompt_id: str
    question: str
    text: str
    step_char_ends: Sequence[int]
    unit_char_ends: Sequence[int]
    unit_scores: Sequence[float | None]
    first_error_step: int | None
    """-1 for a right trace; None for an error behind the steps (in the answer), or without a label."""
    predicted_step: int | None
    """-1 where none is named; None where the reward could not score the trace."""
    edit_char: int | None = None


@dataclass(kw_only=True)
class Evaluation:
    """One folder of evaluations/, read when asked; raises Absent or DataError for what cannot be read."""

    name: str
    rows_path: Path | None = None
    summary_path: Path | None = None
    localisation_path: Path | None = None

    @cached_property
    def rows(self) -> list[EvalRow]:
        if self.rows_path is None:
            raise Absent(f"evaluation {self.name} has no {ROWS}")
        rows = read_rows(self.rows_path)
        if not rows:
            raise Absent(f"{self.rows_path} has no rows")
        return rows

    @cached_property
    def summary(self) -> Summary:
        """As it was written; from the rows where only those are given.

        `discriminator/auroc`, the curve's name for `calibration/auroc`, is left out beside it.
        """
        if self.summary_path is not None:
            found = read_summary(self.summary_path)
            twice = CALIBRATION_AUROC in found
            return {name: entry for name, entry in found.items() if not (twice and name == DISCRIMINATOR_AUROC)}
        most = max((row.generation_idx for row in self.rows), default=0) + 1
        try:
            return summarise(self.rows, k=[k for k in (1, 3, 5, 10) if k <= most])
        except ValueError as error:
            raise DataError(f"{self.rows_path}: {error}; give each sample its own generation_idx") from error

    @cached_property
    def localised(self) -> list[LocalisedTrace]:
        if self.localisation_path is None:
            raise Absent(f"evaluation {self.name} has no {LOCALISATION}; launch.py localise makes one")
        traces = []
        for number, row in enumerate(read_json_lines(self.localisation_path), start=1):
            try:
                traces.append(LocalisedTrace(**{key: row[key] for key in _TRACE_KEYS if key in row}))
            except TypeError as error:
                missing = str(error).split(": ")[-1]
                raise DataError(
                    f"{self.localisation_path}: row {number} lacks {missing}; localise again"
                ) from error
        if not traces:
            raise Absent(f"{self.localisation_path} has no rows")
        return traces


_TRACE_KEYS = tuple(LocalisedTrace.__dataclass_fields__)


@dataclass(kw_only=True)
class Run:
    """A run folder, or evaluation files that belong to none."""

    label: str
    path: Path
    config: RunConfig | None = None
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @property
    def main(self) -> Evaluation:
        """The evaluation that stands for the run where it is one among several."""
        if not self.evaluations:
            raise Absent(f"{self.label} has no evaluations")
        return max(self.evaluations.values(), key=lambda e: (e.name == "final", e.name != "start"))


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Every policy under every reward (transfer.json)."""

    path: Path
    policies: Sequence[str]
    rewards: Sequence[str]
    cells: dict[tuple[str, str], Summary]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep's settings and those of its trials that have a folder."""

    path: Path
    file: SweepFile
    runs: dict[str, Run]
    """Trial id -> its run."""


@dataclass(kw_only=True)
class Material:
    """All that one report is made of."""

    runs: list[Run] = field(default_factory=list)
    sweeps: list[Sweep] = field(default_factory=list)
    transfers: list[Transfer] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was found and could not be read."""


def collect(sources: Sequence[str]) -> Material:
    """Read what the paths name. Raises DataError for one that holds nothing to report."""
    material = Material()
    for source in sources:
        path = Path(source)
        if not path.exists() and (Path("runs") / source).is_dir():
            path = Path("runs") / source
        if path.is_dir():
            _folder(path, material)
        elif path.is_file():
            _file(path, material)
        else:
            raise DataError(
                f"{source}: no such file or folder; name a run folder, a sweep, a {ROWS} or a {SUMMARY}"
            )
    _unique_labels(material.runs)
    return material


def _folder(path: Path, material: Material) -> None:
    trials = path / "trials"
    if trials.is_dir():
        folders = sorted(p for p in trials.iterdir() if p.is_dir())
        runs = [folder for folder in folders if _is_run(folder)]
        material.notes += [f"{folder}: has no run yet" for folder in folders if folder not in runs]
        found = {folder.name: _run(newest_run(folder), folder.name, material.notes) for folder in runs}
        material.runs += found.values()
        if (path / SAVED).is_file():
            try:
                material.sweeps.append(Sweep(path=path, file=read_sweep(path), runs=found))
            except ValueError as error:
                material.notes.append(f"{path / SAVED}: cannot be read ({str(error).splitlines()[0]})")
        origins = {str(fork["run"]) for run in found.values() if (fork := RunFolder(run.path).read_fork())}
        if material.sweeps and material.sweeps[-1].file.fork:
            material.runs += [_run(Path(run), "", material.notes) for run in origins if _is_run(Path(run))]
        if not runs:
            raise DataError(f"{path}: a sweep whose trials/ holds no run folder; let a trial start first")
    elif _is_run(path):
        material.runs.append(_run(path, "", material.notes))
    elif (path / TRANSFER).is_file():
        material.transfers.append(_transfer(path / TRANSFER))
    elif (path / ROWS).is_file() or (path / SUMMARY).is_file() or (path / LOCALISATION).is_file():
        evaluation = _evaluation(path, path.name)
        material.runs.append(Run(label=path.name, path=path, evaluations={evaluation.name: evaluation}))
    else:
        raise DataError(
            f"{path}: holds nothing to report; looked for a run (config.yaml, metrics.jsonl, evaluations/), "
            f"a sweep (trials/), {TRANSFER}, {ROWS}, {SUMMARY}"
        )


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return folder.config.is_file() or folder.metrics.is_file() or folder.evaluations.is_dir()


def _run(path: Path, label: str, notes: list[str]) -> Run:
    folder = RunFolder(path)
    config = None
    if folder.config.is_file():
        try:
            config = read_saved(folder.config)
        except UserError as error:
            notes.append(str(error).splitlines()[0])
    else:
        notes.append(f"{path}: has no config.yaml")
    names = {p.parent for file in (ROWS, SUMMARY, LOCALISATION) for p in folder.evaluations.rglob(file)}
    own = [p for p in names if not p.name.startswith(TRANSFER_PREFIX)]
    found = [_evaluation(p, p.relative_to(folder.evaluations).as_posix()) for p in own]
    found.sort(key=lambda e: (e.name != "start", e.name != "final", e.name))
    return Run(
        label=label or (config.name if config else path.resolve().name),
        path=path,
        config=config,
        metrics=folder.read_metrics(),
        evaluations={evaluation.name: evaluation for evaluation in found},
    )


def _evaluation(folder: Path, name: str) -> Evaluation:
    def where(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    return Evaluation(
        name=name, rows_path=where(ROWS), summary_path=where(SUMMARY), localisation_path=where(LOCALISATION)
    )


def _file(path: Path, material: Material) -> None:
    if path.suffix == ".json":
        if isinstance(_json(path).get("cells"), list):
            material.transfers.append(_transfer(path))
            return
        evaluation = Evaluation(name=path.parent.name or path.stem, summary_path=path)
        _ = evaluation.summary
    elif path.suffix == ".jsonl":
        first = next(iter(read_json_lines(path)), {})
        name = path.parent.name if path.name in (ROWS, LOCALISATION) else path.stem
        if "step_char_ends" in first:
            evaluation = Evaluation(name=name or path.stem, localisation_path=path)
        else:
            evaluation = Evaluation(name=name or path.stem, rows_path=path)
            try:
                _ = evaluation.rows
            except Absent as error:
                raise DataError(f"{error}; evaluate the run first") from None
    else:
        raise DataError(f"{path}: is neither .jsonl (rows) nor .json (a summary or a transfer matrix)")
    label = "/".join(path.absolute().parts[-3:-1]) if path.name in (ROWS, SUMMARY, LOCALISATION) else path.stem
    material.runs.append(Run(label=label, path=path, evaluations={evaluation.name: evaluation}))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: is not JSON ({error}); remove or repair it") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: is not a JSON object; name a {SUMMARY} or a {TRANSFER}")
    return value


def _transfer(path: Path) -> Transfer:
    value = _json(path)
    try:
        cells = {
            (str(cell["policy"]), str(cell["reward"])): {
                metric: {part: math.nan if x is None else float(x) for part, x in entry.items()}
                for metric, entry in cell["metrics"].items()
            }
            for cell in value["cells"]
        }
        policies, rewards = [str(x) for x in value["policies"]], [str(x) for x in value["rewards"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{path}: is no transfer matrix ({type(error).__name__}: {error}); transfer again"
        ) from error
    return Transfer(path=path, policies=policies, rewards=rewards, cells=cells)


def _unique_labels(runs: list[Run]) -> None:
    """Tell runs of one name apart by their folders, then by numbers."""
    for choose in (lambda run, _: f"{run.path.absolute().parent.name}/{run.path.name}", _numbered):
        labels = [run.label for run in runs]
        for index, run in enumerate(runs):
            if labels.count(run.label) > 1:
                run.label = choose(run, labels[:index].count(run.label))


def _numbered(run: Run, before: int) -> str:
    return f"{run.label} ({before + 1})"
