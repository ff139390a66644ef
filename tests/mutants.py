"""A small mutation pass (`make mutants`): one change a mutant, and the tests that import its file must notice.

    python tests/mutants.py [MINUTES] [SEED]

Mutants are drawn at random (keyed by SEED) from `algorithms/`, `evaluation/` and `data/grading.py` until the
time is over, in a copy of the tree. Those that live are printed; docs/mutants.md says why the known ones do.
Each runs in a child that was forked behind the heavy imports: a mutant costs its tests and nothing else.
"""

from __future__ import annotations

import ast
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("rairl_ray/algorithms", "rairl_ray/evaluation", "rairl_ray/data/grading.py")
HEAVY = ("torch", "transformers", "numpy", "sympy", "hypothesis", "pytest", "scipy.stats", "sklearn.metrics")
SLOW_TESTS = re.compile(r"import (ray|subprocess)\b|tests\.(runs|inprocess|sweeps|finished|ray_cluster)\b")
"""Tests that start processes: what they prove of these files, the others do."""
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.Add: ast.Sub,
    ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
BASELINE_SECONDS = 90


def mutants(source: str) -> Iterator[tuple[int, str, str]]:
    """Line, what was changed, and the whole changed source, of every mutant."""
    sites = sum(1 for _ in _sites(ast.parse(source)))
    for number in range(sites):
        tree = ast.parse(source)
        node, change = list(_sites(tree))[number]
        yield node.lineno, change(), ast.unparse(ast.fix_missing_locations(tree))


def _sites(tree: ast.AST) -> Iterator[tuple]:
    """Each place that can be changed, and the function that changes it and says how."""
    notes = {id(n) for a in ast.walk(tree) for n in ast.walk(getattr(a, "annotation", None) or ast.Pass())}
    for node in ast.walk(tree):
        if id(node) in notes:
            continue
        if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
            yield node, lambda node=node: _swap(node.ops, 0)
        elif isinstance(node, ast.BoolOp | ast.BinOp) and type(node.op) in SWAPS:
            yield node, lambda node=node: _swap(node.__dict__, "op")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, lambda node=node: _constant(node)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield node, lambda node=node: _drop_not(node)


def _swap(holder: list | dict, key: int | str) -> str:
    old = holder[key]
    holder[key] = SWAPS[type(old)]()
    return f"{type(old).__name__} -> {type(holder[key]).__name__}"


def _constant(node: ast.Constant) -> str:
    old = node.value
    node.value = (not old) if isinstance(old, bool) else old + 1
    return f"{old} -> {node.value}"


def _drop_not(node: ast.UnaryOp) -> str:
    node.op, node.operand = ast.Not(), ast.UnaryOp(op=ast.Not(), operand=node.operand)
    return "not dropped"


def tests_of(module: str, tree: Path) -> list[str]:
    """Test files that import the module and start no processes; where none does, those of its importers."""
    folder = tree / "tests"
    found = [f for f in _importers(module, folder.rglob("test_*.py")) if not SLOW_TESTS.search(f.read_text())]
    if found:
        return [str(file) for file in found]
    near = (tree / Path(*module.split("."))).parent
    users = [f"{module.rpartition('.')[0]}.{file.stem}" for file in _importers(module, near.glob("*.py"))]
    return sorted({test for user in users for test in tests_of(user, tree)})


def _importers(module: str, files: Iterable[Path]) -> list[Path]:
    package, _, name = module.rpartition(".")
    wanted = re.compile(rf"from {re.escape(module)} import|from {re.escape(package)} import [^\n]*\b{name}\b")
    return [file for file in sorted(files) if wanted.search(file.read_text())]


def passes(tree: Path, tests: list[str], seconds: float) -> bool:
    """Whether all tests pass in time, in a forked child."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        sys.path[:] = [
            str(tree),
            *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests")),
        ]
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        arguments = [
            "-x",
            "-q",
            "-m",
            "not slow and not gpu",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            *tests,
        ]
        code = 1
        try:
            code = int(importlib.import_module("pytest").main(["--hypothesis-seed=0", *arguments]))
        finally:
            os._exit(code)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def copy(target: Path) -> None:
    """The tracked files of this checkout, without what git ignores."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def drawn(tree: Path, seed: int) -> list[tuple[Path, int, str, str, list[str], float]]:
    """All mutants of all files that have tests, in random order, with their tests and a deadline."""
    found = []
    for place in PLACES:
        files = sorted((tree / place).glob("*.py")) if (tree / place).is_dir() else [tree / place]
        for file in files:
            name = ".".join(file.relative_to(tree).with_suffix("").parts)
            if file.name == "__init__.py":
                continue
            tests, started = tests_of(name, tree), time.monotonic()
            if not tests or not passes(tree, tests, BASELINE_SECONDS):
                print(f"{name}: left out ({'its tests fail unchanged or take long' if tests else 'no tests'})")
                continue
            deadline = 10 + 3 * (time.monotonic() - started)
            found += [
                (file, line, what, text, tests, deadline) for line, what, text in mutants(file.read_text())
            ]
    random.Random(seed).shuffle(found)
    return found


def main(minutes: float, seed: int) -> None:
    sys.dont_write_bytecode = True  # two versions of a file may be of one size and one second
    for name in HEAVY:
        importlib.import_module(name)
    end = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copy(tree)
        everything, tried, alive = drawn(tree, seed), 0, 0
        for file, line, what, text, tests, deadline in everything:
            if time.monotonic() > end:
                break
            before = file.read_text()
            file.write_text(text)
            lives = passes(tree, tests, deadline)
            file.write_text(before)
            tried, alive = tried + 1, alive + lives
            if lives:
                code = before.splitlines()[line - 1].strip()
                print(f"alive: {file.relative_to(tree)}:{line}: {what}: {code}", flush=True)
        print(f"{tried} of {len(everything)} mutants tried, {tried - alive} noticed, {alive} alive")


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
