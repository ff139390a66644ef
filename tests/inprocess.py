"""Whole runs inside the test's own process, on one Ray cluster for all of them: seconds less a run."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.metrics import MEASURES_MACHINE
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.run import run as trainer_run
from tests.runs import ROOT, TINY, TINY_AIRL


def config_of(experiment: str, output: Path, *overrides: str) -> RunConfig:
    """A demo experiment (`airl`, `grpo`, `sft`) made tiny."""
    tiny = TINY_AIRL if experiment == "airl" else TINY
    return load_config(
        ROOT / "experiments" / "demo" / f"{experiment}.yaml",
        [
            *tiny,
            *([] if experiment == "sft" else ["warm_start=null"]),
            "eval.prompts=4",
            "eval.samples_per_prompt=2",
            "eval.k=[1]",
            "eval.localisation_traces=4",
            "tracking.uri=none",
            # room for two runs at once on two cores
            "placement.cpus_per_actor=0.25",
            f"output_dir={output}",
            *overrides,
        ],
    )


@functools.cache
def mediocre() -> tuple[str, str]:
    """Overrides that start from a policy which is right now and then: without that grpo has nothing to learn.

    SFT on the eight problems of `data.limit=8`, stopped early; once for all tests of a session.
    """
    output = Path(os.environ.get("RAIRL_WARM") or tempfile.mkdtemp(prefix="rairl-mediocre-"))
    if "RAIRL_WARM" not in os.environ:
        atexit.register(shutil.rmtree, output, ignore_errors=True)
    schooling = ("trainer.steps=300", "trainer.prompts_per_step=8", "trainer.checkpoint_every=0")
    config = config_of("sft", output, "data.limit=8", *schooling)
    made = output / config.name / "final" / "policy"
    with open(output / "mediocre.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            run(config)
    return f"model.policy.path={made}", "model.policy.build=null"


def moved(rows: Sequence[dict[str, float]]) -> bool:
    """Whether most steps had a gradient: equal runs of a policy that never moves prove nothing."""
    norms = [row["policy/grad_norm"] for row in rows if "policy/grad_norm" in row]
    return 2 * sum(norm > 0 for norm in norms) > len(norms)


def run(config: RunConfig, resume: bool = False) -> list[dict[str, float]]:
    """Train and return `rows_of`."""
    logged: list[int] = []
    ended = trainer_run(
        config, resume=config.name if resume else None, sinks=[lambda step, _: logged.append(step)]
    )
    rows = rows_of(config)
    assert ended.status == "finished" and (ended.folder.root / "final" / "policy").is_dir()
    assert rows[-1]["step"] in logged, "the last row was told to the sink as well"
    return rows


def rows_of(config: RunConfig) -> list[dict[str, float]]:
    return rows_in(RunFolder(Path(config.output_dir) / config.name))


def rows_in(folder: RunFolder) -> list[dict[str, float]]:
    """The rows of metrics.jsonl without what measures the machine."""
    return [
        {name: value for name, value in row.items() if not name.startswith(MEASURES_MACHINE)}
        for row in folder.read_metrics()
    ]


def differing(one: Sequence[dict[str, float]], other: Sequence[dict[str, float]]) -> list[str]:
    """Every metric that is not the same float in both, as readable lines; NaN equals NaN."""
    found = [] if len(one) == len(other) else [f"{len(one)} rows against {len(other)}"]
    for a, b in zip(one, other, strict=False):
        for name in sorted({*a, *b}):
            if repr(a.get(name)) != repr(b.get(name)):
                found.append(f"step {a.get('step')}: {name}: {a.get(name)!r} != {b.get(name)!r}")
    return found


def killed_after(config: RunConfig, checkpoint: int, output: Path) -> RunConfig:
    """The run as kill -9 leaves it when `checkpoint` is its newest one: later rows of metrics remain.

    The folder is copied to `output`; returns the configuration that resumes the copy.
    """
    target = output / config.name
    shutil.copytree(Path(config.output_dir) / config.name, target, symlinks=True)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > checkpoint:
            shutil.rmtree(folder)
    shutil.rmtree(target / "final", ignore_errors=True)
    return config.model_copy(update={"output_dir": str(output)})
