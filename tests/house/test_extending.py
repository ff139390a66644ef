"""Tables of variants: each is held to the schema at import, and every example of docs/extending.md works."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from rairl_ray.config import machine_schema, schema, variants
from rairl_ray.sweep import file as sweep_file

ROOT = Path(__file__).resolve().parents[2]

TABLES = [
    ("rairl_ray.algorithms.density.DENSITIES", schema.Density, "type"),
    ("rairl_ray.algorithms.advantages.ADVANTAGES", schema.Advantage, "type"),
    ("rairl_ray.algorithms.discriminator_losses.LOSSES", schema.DiscriminatorLoss, "type"),
    ("rairl_ray.algorithms.policy_losses.AGGREGATIONS", schema.Policy, "aggregation"),
    ("rairl_ray.algorithms.rewards.SELECTORS", machine_schema.Eval, "selector"),
    ("rairl_ray.algorithms.negatives.KINDS", schema.Perturbations, "kinds"),
    ("rairl_ray.data.grading._EQUAL", schema.Data, "grader"),
    ("rairl_ray.evaluation.localisation.READOUTS", machine_schema.Eval, "localisation_readout"),
    ("rairl_ray.engines.optimizer.SCHEDULES", schema.Optimizer, "schedule"),
    ("rairl_ray.engines.reward_heads.HEADS", schema.Discriminator, "head"),
    ("rairl_ray.actors.rollout_actor.ENGINES", machine_schema.Rollout, "engine"),
    ("rairl_ray.rewards.grade.VALUES", schema.Reward, "type"),
    ("rairl_ray.sweep.points.SEARCHES", sweep_file.Search, "type"),
    ("rairl_ray.sweep.schedulers.SCHEDULERS", sweep_file.Scheduler, "type"),
    ("rairl_ray.trainer.run.ALGORITHMS", schema.Algorithm, "type"),
]
"""Mathematics and machines: table, section and field whose values are its keys."""
NEEDS = {
    "ALGORITHMS": "Algorithm.type",
    "ENGINES": "Rollout.engine",
    "DENSITIES": "Density.type",
    "LOSSES": "DiscriminatorLoss.type",
    "HEADS": "Discriminator.head",
    "ADVANTAGES": "Advantage.type",
    "ERRORS": "Perturbations.kinds",
}
"""Tables of config/variants.py."""


def imported_anew(module: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A second copy of a module, which the rest of the process does not see."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, copy)
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize(("table", "section", "key"), TABLES)
def test_a_value_that_only_the_schema_knows_is_refused_at_import(
    table: str, section: Any, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = table.rpartition(".")[0]
    importlib.import_module(module)
    imported_anew(module, monkeypatch)
    field = section.model_fields[key]
    known = sorted(variants.choices(field.annotation))
    monkeypatch.setattr(field, "annotation", Literal[*known, "unheard_of"])
    said = f"{table} has no entry 'unheard_of', which {section.__name__}.{key} allows"
    with pytest.raises(ImportError, match=re.escape(said)):
        imported_anew(module, monkeypatch)
    monkeypatch.setattr(field, "annotation", Literal[*known[1:]])
    said = f"{table} has an entry {known[0]!r}, which {section.__name__}.{key} does not allow"
    with pytest.raises(ImportError, match=re.escape(said)):
        imported_anew(module, monkeypatch)


@pytest.mark.parametrize(("table", "field"), NEEDS.items())
def test_a_value_without_needs_is_refused_at_import(
    table: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (name, _), *others = getattr(variants, table).items()
    monkeypatch.setattr(variants, table, dict(others))
    said = f"rairl_ray.config.variants.{table} has no entry {name!r}, which {field} allows"
    with pytest.raises(ImportError, match=re.escape(said)):
        imported_anew("rairl_ray.config.schema", monkeypatch)


def test_every_table_is_in_these_tests() -> None:
    call = re.compile(r'^(?:variants\.)?complete\(f?"(?:\{__name__\}|[\w.]+)\.(\w+)"', re.M)
    held = [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), name)
        for path in (ROOT / "rairl_ray").rglob("*.py")
        for name in call.findall(path.read_text())
    ]
    here = [table.rpartition(".")[::2] for table, _, _ in TABLES]
    assert sorted(held) == sorted([*here, *(("rairl_ray.config.schema", name) for name in NEEDS)])


def test_nobody_asks_for_a_variant_by_its_name() -> None:
    """What a variant needs stands in its entry; a comparison would take a new one for one of the others."""
    fields = r"(?:algorithm|loss|density|advantage)\.type|rollout\.engine|discriminator\.head|\.aggregation"
    asked = re.compile(rf"(?:{fields}) (?:==|!=|in|not in) [(\[\"']")
    for path in (ROOT / "rairl_ray").rglob("*.py"):
        assert not asked.search(path.read_text()), path


# --- docs/extending.md -------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = {
    title: (diff, python)
    for title, diff, python in re.findall(
        r"^## (.+?)\n.*?```diff\n(.*?)```\n+```python\n(.*?)```", PAGE, re.M | re.S
    )
}
RUN = """
import json, sys, traceback
results = {}
for title, code in json.load(sys.stdin).items():
    try:
        exec(compile(code, title, "exec"), {})
        results[title] = ""
    except BaseException:
        results[title] = traceback.format_exc()
print(json.dumps(results))
"""


def edited(folder: Path, diff: str) -> None:
    """Apply an edit of the page: lines with `-` go, lines with `+` come, where the plain lines are."""
    for file, lines in re.findall(r"^(\S+\.py)\n((?:[ +-].*\n|\n)*)", diff, re.M):
        path = folder / file
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        before, after = (
            "".join(line[1:] for line in lines.splitlines(keepends=True) if line[0] in f" {sign}")
            for sign in "-+"
        )
        assert text.count(before) == 1, f"{file}: {before!r} stands {text.count(before)} times"
        path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What went wrong with each example, in one process with a copy of the package that has all edits."""
    folder = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "rairl_ray", folder / "rairl_ray", ignore=ignored)
    for diff, _ in EXAMPLES.values():
        edited(folder, diff)
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps({title: python for title, (_, python) in EXAMPLES.items()}),
        capture_output=True, text=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_the_page_has_an_example_of_each_kind() -> None:
    words = ("density", "loss", "advantage", "data set", "engine", "metric")
    assert len(EXAMPLES) == PAGE.count("\n## ") == len(words)
    assert all(word in title for word, title in zip(words, EXAMPLES, strict=True))


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_ten_lines_and_works(title: str, results: dict[str, str]) -> None:
    assert not results[title], results[title]
    assert 1 <= len(re.findall(r"^\+.", EXAMPLES[title][0], re.M)) <= 10


@pytest.mark.parametrize("table", [*(table for table, _, _ in TABLES), *(f"variants.{name}" for name in NEEDS)])
def test_the_page_names_every_table(table: str) -> None:
    module, _, name = table.rpartition(".")
    if not name.startswith("_"):
        file = module.removeprefix("rairl_ray.").replace(".", "/") + ".py"
        assert f"`{name}`" in PAGE and f"{file}`" in PAGE
