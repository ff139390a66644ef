"""The pages that promise something name tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("page", "least"), [("guarantees", 40), ("security", 8), ("reliability", 12)])
def test_every_named_test_exists(page: str, least: int) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", text)
    assert len(named) > least
    texts = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    missing = [f"{file}::{test}" for file, test in named if f"def {test}" not in texts.get(file, "")]
    assert missing == []


def marks(tree: ast.Module, name: str) -> set[str]:
    """Marks of the test of that name; without one, those that all tests of the file have."""
    of_all = [ast.unparse(node) for node in tree.body if ast.unparse(node).startswith("pytestmark")]
    found = [
        set(re.findall(r"pytest\.mark\.(\w+)", " ".join([*of_all, *map(ast.unparse, node.decorator_list)])))
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and name in ("", node.name)
    ]
    return set.intersection(*found)


def test_what_does_not_run_with_make_test_is_told() -> None:
    """A row says of its tests whether they are slow, or run in `make cluster-test` alone."""
    trees = {path.name: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py")}
    wrong = []
    for row in (ROOT / "docs" / "guarantees.md").read_text().splitlines():
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row)
        kinds = [marks(trees[file], test) for file, test in named if row.startswith("| ")]
        apart = ["cluster" in kind and "in_ci" not in kind for kind in kinds]
        slow = ["slow" in kind and "cluster" not in kind for kind in kinds]
        if any(apart) != ("`make cluster-test`" in row) or (any(slow) and "slow" not in row):
            wrong.append(row[:80])
    assert wrong == []
