"""The layers of the package, held with `ast`: who imports whom, who owns a heavy library, how long code is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "rairl_ray"

# A room imports rooms of lower layers only. Rooms of one layer may know each other, without a circle,
# except those in STRANGERS.
LAYERS = {
    "types": 1, "metrics": 1, "errors": 1, "keys": 1, "files": 1, "imports": 1, "provenance": 1,
    "config": 2,
    "data": 3, "algorithms": 3,
    "engines": 4,
    "actors": 5,
    "checkpoint": 6, "tracking": 6, "runfolder": 6, "display": 6,
    "storage": 6, "mirror": 6, "mirrored_files": 6,
    "evaluation": 6, "rewards": 6,
    "trainer": 7,
    "verbs": 8, "sweep": 8, "report": 8, "jobs": 8, "plan": 8, "doctor": 8, "demo": 8,
    "launch": 9,
}  # fmt: skip
STRANGERS = {frozenset({"data", "algorithms"})}

SOLE_IMPORTERS = {
    "deepspeed": {"rairl_ray.engines.deepspeed_engine"},
    "vllm": {
        "rairl_ray.engines.vllm_engine",
        "rairl_ray.engines.weight_transfer",
        "rairl_ray.engines.weight_transfer_vllm",
    },
    "mlflow": {"rairl_ray.tracking.mlflow_run"},
    "ray.tune": {
        f"rairl_ray.sweep.{module}" for module in ("population", "run", "schedulers", "search", "supervise")
    },
    "optuna": {"rairl_ray.sweep.search", "rairl_ray.report.importance"},
}
FORBIDDEN = {
    "types": {"torch", "ray", "transformers"},
    "config": {"torch", "ray", "transformers", "vllm", "deepspeed", "peft", "numpy"},
    "data": {"ray"},
    "algorithms": {"ray", "transformers", "peft"},
    "engines": {"ray"},
}

FILE_LINES = 400
FUNCTION_LINES = 60
LONG_FUNCTIONS: dict[str, str] = {}
"""`module.function` -> the reason why it is longer than FUNCTION_LINES."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {module_name(p): p for p in [*sorted((ROOT / PACKAGE).rglob("*.py")), ROOT / "launch.py"]}
ALL_CODE = {**SOURCES, **{module_name(p): p for f in ("tests", "benchmarks") for p in (ROOT / f).rglob("*.py")}}


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `tree` except those that only a type checker sees."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and is_type_checking(child.test):
            for node in child.orelse:
                yield node
                yield from running_nodes(node)
            continue
        yield child
        yield from running_nodes(child)


def imports(source: str, module: str, is_package: bool, modules: set[str]) -> set[str]:
    """Full names of imported modules, wherever the import stands. `modules` are the project's own."""
    found = set()
    for node in running_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                home = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*home, base] if base else home)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in modules or base == "torch" else base)
        elif (
            isinstance(node, ast.Call)
            and (
                (isinstance(node.func, ast.Attribute) and node.func.attr == "import_module")
                or (isinstance(node.func, ast.Name) and node.func.id in ("__import__", "import_module"))
            )
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


GRAPH = {
    name: imports(path.read_text(), name, path.name == "__init__.py", set(SOURCES))
    for name, path in SOURCES.items()
}


def room(module: str) -> str | None:
    """The room of one of the project's modules, None for others and for the package itself."""
    if module == "launch":
        return "launch"
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def uses(imported: str, library: str) -> bool:
    return imported == library or imported.startswith(f"{library}.")


def layer_faults(graph: dict[str, set[str]]) -> list[str]:
    faults = []
    for module, targets in graph.items():
        own = room(module)
        for target in sorted(targets):
            other = room(target)
            if own is None or other is None or own == other:
                continue
            if own not in LAYERS or other not in LAYERS:
                faults.append(
                    f"{module}: room {own if own not in LAYERS else other} has no layer; add it to LAYERS"
                )
            elif LAYERS[other] > LAYERS[own] or frozenset({own, other}) in STRANGERS:
                faults.append(f"{module} (layer {LAYERS[own]}) imports {target} (layer {LAYERS[other]})")
    return faults


def owner_faults(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {library}; only {', '.join(owners)} may"
        for module, targets in graph.items()
        for library, owners in SOLE_IMPORTERS.items()
        if module not in owners and any(uses(target, library) for target in targets)
    ]


def forbidden_faults(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} imports {library}"
        for module, targets in graph.items()
        for library in FORBIDDEN.get(room(module) or "", set())
        if any(uses(target, library) for target in targets)
    ]


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one module, or of one that imports itself."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [target for target in graph[start] if target in graph]
        while stack:
            node = stack.pop()
            if node not in seen:
                seen.add(node)
                stack += [target for target in graph[node] if target in graph]
        return seen

    reachable = {module: reach(module) for module in graph}
    rings = {
        frozenset(other for other in reachable[module] if module in reachable[other])
        for module in graph
        if module in reachable[module]
    }
    return sorted(sorted(ring) for ring in rings)


def test_every_room_imports_only_from_lower_layers() -> None:
    assert layer_faults(GRAPH) == []


def test_every_room_has_a_layer() -> None:
    unknown = {room(module) for module in SOURCES} - set(LAYERS) - {None}
    assert not unknown, f"add to LAYERS: {unknown}"


def test_heavy_libraries_have_one_owner() -> None:
    assert owner_faults(GRAPH) == []


def test_light_rooms_stay_light() -> None:
    assert forbidden_faults(GRAPH) == []


def test_algorithms_know_no_processes() -> None:
    for module, targets in GRAPH.items():
        if room(module) == "algorithms":
            assert not any(uses(target, "torch.distributed") for target in targets), module


def test_no_import_circles_counting_imports_inside_functions() -> None:
    assert circles(GRAPH) == []


@pytest.mark.parametrize("module", sorted(ALL_CODE))
def test_files_and_functions_are_short(module: str) -> None:
    source = ALL_CODE[module].read_text()
    assert len(source.splitlines()) <= FILE_LINES, f"{module}: split the file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            name = f"{module}.{node.name}"
            assert lines <= FUNCTION_LINES or name in LONG_FUNCTIONS, f"{name}: {lines} lines"


def test_the_allow_list_has_no_dead_names() -> None:
    defined = {
        f"{module}.{node.name}"
        for module, path in ALL_CODE.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert set(LONG_FUNCTIONS) <= defined


def test_the_package_markers_are_empty() -> None:
    for module, path in SOURCES.items():
        if path.name == "__init__.py" and module != "rairl_ray.data.tasks":
            assert path.read_text().strip() == "", module


# --- the checks themselves can fail ---------------------------------------------------------------


def test_imports_are_found_inside_functions_but_not_under_type_checking() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import mlflow\nelse:\n    import numpy\n"
        "def f():\n    from rairl_ray.data import grading\n    import torch.nn\n"
        "def g():\n    import importlib\n    importlib.import_module('vllm')\n"
        "from . import sibling\n"
    )
    modules = {"rairl_ray.data.grading", "rairl_ray.actors.sibling"}
    found = imports(source, "rairl_ray.actors.x", False, modules)
    assert {"rairl_ray.data.grading", "torch.nn", "vllm", "numpy", "rairl_ray.actors.sibling"} <= found
    assert "mlflow" not in found


@pytest.mark.parametrize(
    ("module", "target", "check"),
    [
        ("rairl_ray.config.load", "rairl_ray.trainer.loop", layer_faults),
        ("rairl_ray.data.rows", "rairl_ray.algorithms.density", layer_faults),
        ("rairl_ray.nowhere", "rairl_ray.types", layer_faults),
        ("rairl_ray.trainer.run", "launch", layer_faults),
        ("rairl_ray.engines.models", "deepspeed.zero", owner_faults),
        ("rairl_ray.report", "mlflow", owner_faults),
        ("rairl_ray.engines.models", "ray", forbidden_faults),
        ("rairl_ray.config.schema", "torch.nn", forbidden_faults),
    ],
)
def test_a_broken_rule_is_found(module: str, target: str, check: object) -> None:
    assert callable(check)
    assert len(check({module: {target}})) == 1


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": {"e"}}
    assert circles(graph) == [["a", "b", "c"], ["e"]]


UNPICKLES = {"rairl_ray.engines.zero_shards"}
"""Reads DeepSpeed's own files, which safe_files.py has searched before."""
RUNS_CODE = {"os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads", "subprocess.getoutput"}


def test_nothing_runs_a_string_or_a_foreign_pickle() -> None:
    found = []
    for path in [*sorted((ROOT / PACKAGE).rglob("*.py")), ROOT / "launch.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            loads = name == "torch.load" and given.get("weights_only") != "True"
            searched = loads and module_name(path) in UNPICKLES
            if (name in RUNS_CODE or given.get("shell") == "True" or loads) and not searched:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    assert not found, found
