"""`launch.py report`: from run folders, sweeps and files to one page with its figures and tables."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
from rich.console import Console

from rairl_ray.errors import ConfigError
from rairl_ray.report import curves, overview
from rairl_ray.report.collect import Material, Run, collect
from rairl_ray.report.page import slug, write_page
from rairl_ray.report.parts import Figure, Missing, Part, Section, Table, attempt
from rairl_ray.report.style import STYLE
from rairl_ray.runfolder import RunFolder

DETAILED_RUNS = 4
"""So many runs are shown in full; of more, only the best."""


def make_report(sources: Sequence[str], output: str | None = None) -> tuple[list[Path], list[Missing]]:
    """Write the report of all sources together; (its paths, the page first; the parts that are missing).

    The folder is SOURCE/report for one folder, else runs/report, or `output`.
    Raises DataError for a source that holds nothing to report, ConfigError for a folder that cannot be written.
    """
    material = collect(sources)
    folder = Path(output) if output else _default_folder(sources)
    with matplotlib.rc_context(cast(Any, STYLE)), warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the page itself shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        sections = _sections(material)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = write_page(folder, _title(material), sections, material.notes)
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot write the report ({error.strerror}); name another folder with --output"
            ) from error
    return paths, [part for section in sections for part in section.parts if isinstance(part, Missing)]


def _default_folder(sources: Sequence[str]) -> Path:
    only = Path(sources[0])
    if not only.exists() and (Path("runs") / only).is_dir():
        only = Path("runs") / only
    return RunFolder(only).report if len(sources) == 1 and only.is_dir() else Path("runs") / "report"


def _title(material: Material) -> str:
    names = [run.label for run in material.runs] or [t.path.parent.name for t in material.transfers]
    return f"R-AIRL report: {names[0]}" if len(names) == 1 else f"R-AIRL report: {len(names)} runs"


def _sections(material: Material) -> list[Section]:
    runs = material.runs
    sections: list[Section] = []
    for run in runs:
        sections += _run_sections(run, prefix="" if len(runs) == 1 else run.label)
    return sections


def _run_sections(run: Run, prefix: str) -> list[Section]:
    evaluations = list(run.evaluations.values())
    plan: list[tuple[str, str, Callable[[], list[Part]]]] = [
        ("What was run", "Settings", lambda: overview.what_was_run(run)),
        ("Results", "All metrics", lambda: overview.headline(run)),
        ("Results", "pass@k", lambda: curves.pass_at_k_parts(evaluations)),
        ("Learning curves", "Learning curves", lambda: curves.learning_curves([run])),
    ]
    return _named(plan, prefix)


def _named(plan: Sequence[tuple[str, str, Callable[[], list[Part]]]], prefix: str) -> list[Section]:
    """Sections in the plan's order, their files named after the run or evaluation that they tell of."""
    sections: dict[str, list[Part]] = {}
    for section, title, make in plan:
        sections.setdefault(section, []).extend(_prefixed(part, prefix) for part in attempt(title, make))
    before = f"{prefix}: " if prefix else ""
    return [Section(title=before + title, parts=parts) for title, parts in sections.items()]


def _prefixed(part: Part, prefix: str) -> Part:
    if isinstance(part, Table | Figure) and prefix:
        return dataclasses.replace(part, name=f"{slug(prefix)}_{part.name}")
    return part


def show_report(paths: Sequence[Path], missing: Sequence[Missing], console: Console) -> None:
    """Print where the report lies and what it lacks."""
    console.print(f"page: {paths[0]}", markup=False, highlight=False, soft_wrap=True)
    for folder in sorted({path.parent for path in paths[1:]}):
        count = sum(path.parent == folder for path in paths[1:])
        console.print(f"  {folder}: {count} files", markup=False, highlight=False, soft_wrap=True)
    for part in missing:
        console.print(f"  missing: {part.title}: {part.reason}", markup=False, highlight=False, soft_wrap=True)
