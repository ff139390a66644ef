"""The main job, `make demo`: SFT warm start, R-AIRL, the same compute spent on more SFT, one table.

Usage: python experiments/demo/run.py [key.sub=value ...]     overrides for all three runs, such as seed=3
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

from rich.console import Console

import launch  # noqa: F401  (quiets the libraries before they are imported)
from rairl_ray import metrics as names
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.display import Display
from rairl_ray.errors import UserError
from rairl_ray.runfolder import RunFolder, Summary, read_summary
from rairl_ray.trainer.run import train
from rairl_ray.trainer.worker_groups import cluster

HERE = Path(__file__).parent

ROWS = {
    names.EVAL_PASS_AT_1: "pass@1",
    names.EVAL_RERANK_AT_1: "best of 8 by the reward",
    names.EVAL_RANDOM_AT_1: "random choice of 8",
    names.DISCRIMINATOR_AUROC: "AUROC right/wrong",
    names.LOCALISATION_STEP_ACCURACY: "wrong step found",
    names.LOCALISATION_CHANCE: "by chance",
}

GAPS = {names.SYNC_LOGPROB_GAP: "gap after sync", names.ROLLOUT_LOGPROB_GAP: "gap on samples"}


def main(overrides: list[str]) -> int:
    if importlib.util.find_spec("vllm") is None:
        overrides = ["rollout.engine=hf", *overrides]
    sft = load_config(HERE / "sft.yaml", overrides)
    airl = load_config(HERE / "airl.yaml", overrides)
    with cluster(sft):  # one Ray cluster for the three runs
        for config in (sft, airl):
            if code := train(config):
                return code
        steps = equal_compute_steps(folder(sft), folder(airl))
        longer = load_config(HERE / "sft_longer.yaml", [*overrides, f"trainer.steps={steps}"])
        if code := train(longer):
            return code
    summaries = {
        "untrained": evaluation(sft, "start"),
        "sft": evaluation(sft, "final"),
        "sft_longer": evaluation(longer, "final"),
        "airl": evaluation(airl, "final"),
    }
    target = folder(sft).root.parent / "summary.json"
    target.write_text(json.dumps(summaries, indent=1) + "\n")
    report(summaries, target, airl, steps)
    return 0


def folder(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.output_dir) / config.name)


def evaluation(config: RunConfig, name: str) -> Summary:
    return read_summary(folder(config).evaluations / name / "summary.json")


def equal_compute_steps(sft: RunFolder, airl: RunFolder) -> int:
    """SFT updates that fit into the wall time which the R-AIRL run spent in policy updates."""
    budget = sum(row.get(names.TIME_POLICY, 0.0) for row in airl.read_metrics())
    # The first update carries one-off costs of the libraries.
    updates = [row[names.TIME_POLICY] for row in sft.read_metrics() if names.TIME_POLICY in row][1:]
    return max(1, round(budget / (sum(updates) / len(updates))))


def report(summaries: dict[str, Summary], target: Path, airl: RunConfig, steps: int) -> None:
    """The table, the verdict as found, and where to look next."""
    display = Display("demo", 1)
    rows = [
        {"run": run, **{title: cell(summary, name) for name, title in ROWS.items()}}
        for run, summary in summaries.items()
    ]
    for row in rows:
        if row["run"] == "airl":
            row |= gaps(folder(airl))
    display.table(
        "held-out problems, 95% intervals over problems", rows, ["run", *ROWS.values(), *GAPS.values()]
    )
    display.note(f"sft_longer: {steps} more updates, the wall time of R-AIRL's policy updates")
    for line in verdict(summaries):
        display.note(line)
    display.finish(
        [
            f"all numbers: {target}",
            f"samples with their rewards: {folder(airl).evaluations / 'final' / 'rows.jsonl'}",
            f"runs in MLflow: mlflow ui --backend-store-uri sqlite:///{Path(airl.output_dir) / 'mlflow.db'}",
            "another density: python launch.py train experiments/demo/airl.yaml reward.density.type=dense",
        ]
    )


def gaps(run: RunFolder) -> dict[str, str]:
    """Mean |difference| a token between learner and rollout engine, in the worst step."""
    rows = run.read_metrics()
    worst = {name: max((row[name] for row in rows if name in row), default=math.nan) for name in GAPS}
    return {title: f"{worst[name]:.1e}" for name, title in GAPS.items()}


def cell(summary: Summary, name: str) -> str:
    """`57.3 [54.1, 60.2]` in percent; AUROC as it is."""
    if name not in summary:
        return ""
    entry, scale = summary[name], 1 if name == names.DISCRIMINATOR_AUROC else 100
    digits = 3 if scale == 1 else 1
    value, low, high = (
        f"{scale * entry.get(part, float('nan')):.{digits}f}" for part in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def verdict(summaries: dict[str, Summary]) -> list[str]:
    """Where the method wins and where it does not, as found."""
    pass_at_1 = {run: 100 * summary[names.EVAL_PASS_AT_1]["value"] for run, summary in summaries.items()}
    airl = summaries["airl"]
    found = [
        ("R-AIRL against its warm start", pass_at_1["airl"] - pass_at_1["sft"], "pass@1 points"),
        ("R-AIRL against more SFT", pass_at_1["airl"] - pass_at_1["sft_longer"], "pass@1 points"),
    ]
    for better, worse, text in (
        (names.EVAL_RERANK_AT_1, names.EVAL_RANDOM_AT_1, "reranking by the reward against random choice"),
        (names.LOCALISATION_STEP_ACCURACY, names.LOCALISATION_CHANCE, "finding the wrong step against chance"),
    ):
        found.append((text, 100 * (airl[better]["value"] - airl[worse]["value"]), "points"))
    return [f"{'wins ' if gain > 0 else 'loses'}  {text}: {gain:+.1f} {unit}" for text, gain, unit in found]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        Console(stderr=True).print(f"demo: error: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
