"""A run folder as a trainer leaves it, and the machines that mirror it."""

from __future__ import annotations

import json
from pathlib import Path

from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.mirror import Mirror
from rairl_ray.storage import Store
from tests.trainer.test_checkpoint import save

NAME = "demo/run"
SECRET = "planted-secret-of-the-test"


def make_run(root: Path, steps: tuple[int, ...] = (2,), keep: int = 2) -> CheckpointStore:
    """A run folder as a trainer leaves it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(f"output_dir: {root.parents[1]}\nname: {NAME}\n")
    with open(root / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step}) + "\n" for step in steps)
    (root / "final" / "policy").mkdir(parents=True, exist_ok=True)
    (root / "final" / "policy" / "config.json").write_text("{}")
    (root / ".lock").write_text("process 1 on here")
    (root / "final" / ".policy-x1").mkdir(exist_ok=True)
    (root / "final" / ".policy-x1" / "model.safetensors").write_text("half")
    (root / "checkpoints" / ".tmp-step-000009-aa").mkdir(parents=True, exist_ok=True)
    (root / "checkpoints" / ".tmp-step-000009-aa" / "half").write_text("half")
    store = CheckpointStore(root, keep)
    for step in steps:
        save(store, step)
    return store


class Machine:
    """A staging folder and what mirrors it."""

    def __init__(self, uri: str, staging: Path) -> None:
        self.store, self.warnings = Store(uri), list[str]()
        self.mirror = Mirror(self.store, staging, [NAME], self.warnings.append)
        self.mirror.look()
        self.folder = staging / NAME

    def there(self) -> dict[str, int]:
        return {name: facts.size for name, facts in self.store.names(NAME).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") or part == "latest" for part in path.parts[len(folder.parts) :])
    }
