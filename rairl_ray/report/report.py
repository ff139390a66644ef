"""`launch.py report`: from run folders, sweeps and files to one page with its figures and tables."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import matplotlib
from rich.console import Console

from rairl_ray.errors import ConfigError
from rairl_ray.mirrored_files import but_weights
from rairl_ray.report import (
    calibration,
    categories,
    comparison,
    coordinates,
    curves,
    forks,
    front,
    heatmap,
    importance,
    learning,
    lineage,
    localisation,
    overview,
    reranking,
    sweeps,
    tasks,
)
from rairl_ray.report.collect import Evaluation, Material, Run, Sweep, collect
from rairl_ray.report.labels import label_of
from rairl_ray.report.page import slug, write_page
from rairl_ray.report.parts import Figure, Missing, Part, Section, Table, attempt
from rairl_ray.report.style import STYLE
from rairl_ray.report.transfer import transfer_parts
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.outputs import Places

Plan = list[tuple[str, str, Callable[[], list[Part]]]]
"""(section, title, what makes its parts), in the page's order."""

DETAILED_RUNS = 4
"""So many runs are shown in full; of more, only the best."""


def make_report(sources: Sequence[str], output: str | None = None) -> tuple[list[Path], list[Missing]]:
    """Write the report of all sources together; (its paths, the page first; the parts that are missing).

    The folder is SOURCE/report for one folder, else runs/report, or `output`.
    Raises DataError for a source that holds nothing to report, ConfigError for a folder that cannot be written.
    """
    places = Places("runs", partial(print, file=sys.stderr))
    sources = [places.fetched(source, but_weights, inner=True) for source in sources]
    material = collect(sources)
    folder = Path(output) if output else _default_folder(sources)
    with matplotlib.rc_context(cast(Any, STYLE)), warnings.catch_warnings():
        # Scripts that the font lacks are drawn as boxes; the page itself shows them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        sections = all_sections(material)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths = write_page(folder, _title(material), sections, material.notes)
        except OSError as error:
            raise ConfigError(
                f"{folder}: cannot write the report ({error.strerror}); name another folder with --output"
            ) from error
    places.send(folder)
    missing = [
        dataclasses.replace(part, title=f"{section.title}: {part.title}")
        for section in sections
        for part in section.parts
        if isinstance(part, Missing)
    ]
    return paths, missing


def _default_folder(sources: Sequence[str]) -> Path:
    only = Path(sources[0])
    if not only.exists() and (Path("runs") / only).is_dir():
        only = Path("runs") / only
    return RunFolder(only).report if len(sources) == 1 and only.is_dir() else Path("runs") / "report"


def _title(material: Material) -> str:
    names = [run.label for run in material.runs] or [t.path.parent.name for t in material.transfers]
    return f"R-AIRL report: {names[0]}" if len(names) == 1 else f"R-AIRL report: {len(names)} runs"


def all_sections(material: Material) -> list[Section]:
    """Comparison first, then each run in full (of many runs the best), then the transfer matrices."""
    runs = material.runs
    sections: list[Section] = []
    for sweep in material.sweeps:
        sections += _named(_sweep_plan(sweep), sweep.file.name if len(material.sweeps) > 1 else "")
    if len(runs) > 1:
        metric = material.sweeps[0].file.metrics[0] if material.sweeps else None
        sections += _named(_comparison_plan(runs, metric), "")
    shown = runs if len(runs) <= DETAILED_RUNS else [_best(runs)]
    for run in shown:
        sections += _named(_run_plan(run, alone=len(runs) == 1), "" if len(runs) == 1 else run.label)
    if len(shown) < len(runs):
        rest = f"In full: {shown[0].label}, the run of highest pass@1. For another: launch.py report RUN."
        sections = [
            dataclasses.replace(s, intro=rest if s.title == "Comparison" else s.intro) for s in sections
        ]
    for transfer in material.transfers:
        prefix = transfer.path.parent.name if len(material.transfers) > 1 else ""
        plan: Plan = [("Transfer", "Transfer matrix", partial(transfer_parts, transfer))]
        sections += _named(plan, prefix)
    return sections


def _best(runs: Sequence[Run]) -> Run:
    return comparison.best_first([comparison.group_of([run]) for run in runs])[0].runs[0]


def _sweep_plan(sweep: Sweep) -> Plan:
    best = ("Best configuration", "Best configuration", lambda: sweeps.best_parts(sweep))
    plan: Plan = [best]
    views = sweep.file.by_metric()
    if len(views) > 1:
        plan = [("Pareto front", "Pareto front", lambda: front.front_parts(sweep))]
    for view in views:
        seen = dataclasses.replace(sweep, file=view)
        of = f" ({label_of(view.metrics[0])[0]})" if len(views) > 1 else ""
        plan += [
            ("Axes" + of, "Effect of each axis", partial(sweeps.effect_parts, seen)),
            ("Axes" + of, "All points", partial(coordinates.parallel_coordinates, seen)),
            ("Importance" + of, "Importance of axes", partial(importance.importance_parts, seen)),
        ]
    if sweep.file.scheduler.type == "pbt":
        plan += [("Lineage", "Who went on as whose fork", lambda: lineage.lineage_parts(sweep))]
    return [*plan, ("Cost", "Cost of each trial", lambda: sweeps.cost_parts(sweep))]


def _comparison_plan(runs: Sequence[Run], metric: str | None) -> Plan:
    def families() -> list[learning.Family]:
        groups = comparison.grouped(runs)
        groups = comparison.best_first(groups) if len(groups) > learning.LINES else groups
        return [(group.label, group.runs) for group in groups]

    return [
        ("Comparison", "Every run", lambda: comparison.run_table(runs)),
        ("Comparison", "Runs over seeds", lambda: comparison.seed_table(runs)),
        ("Density", "Reward density", lambda: comparison.density_parts(runs)),
        ("Density", "Density by dataset", lambda: tasks.density_by_task(runs, metric)),
        ("Forks", "Forks against their runs", lambda: forks.fork_parts(runs)),
        ("Ablation", "Ablation", lambda: comparison.ablation_parts(runs)),
        ("Learning curves", "Learning curves", lambda: learning.learning_curves(families())),
    ]


def _run_plan(run: Run, *, alone: bool) -> Plan:
    evaluations = list(run.evaluations.values())
    plan: Plan = [
        ("What was run", "Settings", lambda: overview.what_was_run(run)),
        ("Results", "All metrics", lambda: overview.headline(run)),
        ("Results", "pass@k", lambda: curves.pass_at_k_parts(evaluations)),
    ]
    if alone:
        plan.append(
            ("Learning curves", "Learning curves", lambda: learning.learning_curves([(run.label, [run])]))
        )
    # The start is the policy before training: it has its numbers above, and no figures of its own.
    detailed = [e for e in evaluations if e.name != "start"] or evaluations
    for evaluation in detailed:
        plan += _evaluation_plan(run, evaluation, f" ({evaluation.name})" if len(detailed) > 1 else "")
    return plan


def _evaluation_plan(run: Run, evaluation: Evaluation, of: str) -> Plan:
    gamma = run.config.eval.discount if run.config else heatmap.GAMMA
    parts: list[tuple[str, str, Callable[[Evaluation], list[Part]]]] = [
        ("Reranking", "One answer from all samples", reranking.reranking_table),
        ("Reranking", "Reranking curves", reranking.reranking_figures),
        ("Reranking", "Reward-weighted pass@k, by selector", reranking.selector_table),
        ("Calibration", "Calibration", calibration.calibration_table),
        ("Calibration", "Reliability diagram", calibration.reliability_diagram),
        ("Calibration", "Scores of right and wrong samples", calibration.score_histogram),
        ("Calibration", "What goes along with what", calibration.correlation_matrix),
        ("Localisation", "Localisation of the first error", localisation.localisation_table),
        ("Localisation", "Traces with their error", localisation.localisation_details),
        ("Categories", "pass@1 by category", categories.category_parts),
        ("Samples", "Best and worst samples", lambda e: heatmap.samples_parts(e, gamma)),
    ]
    return [(section + of, title, partial(make, evaluation)) for section, title, make in parts]


def _named(plan: Plan, prefix: str) -> list[Section]:
    """Sections in the plan's order, their files named after the run or evaluation that they tell of."""
    sections: dict[str, list[Part]] = {}
    for section, title, make in plan:
        _, bracket, evaluation = section.partition(" (")
        files = f"{prefix} {evaluation}" if bracket else prefix
        sections.setdefault(section, []).extend(_prefixed(part, files) for part in attempt(title, make))
    before = f"{prefix}: " if prefix else ""
    return [Section(title=before + title, parts=parts) for title, parts in sections.items()]


def _prefixed(part: Part, prefix: str) -> Part:
    if isinstance(part, Table | Figure) and prefix.strip():
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
