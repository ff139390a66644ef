"""What was run, and the headline numbers."""

from __future__ import annotations

from collections.abc import Sequence

from rairl_ray import metrics as names
from rairl_ray.config.described import density_name, model_name
from rairl_ray.config.load import config_hash, dump_yaml
from rairl_ray.config.schema import RunConfig
from rairl_ray.report.collect import Run
from rairl_ray.report.labels import label_of, number_of, pattern_of, rank_of
from rairl_ray.report.parts import Absent, Cell, Listing, Number, Part, Table


def what_was_run(run: Run) -> list[Part]:
    """Table of the settings that matter, and the whole configuration to unfold."""
    if run.config is None:
        raise Absent(f"{run.path} has no readable config.yaml")
    rows: list[Sequence[Cell]] = [*_settings(run.config).items(), *_measured(run)]
    table = Table(name="settings", title="Settings", columns=("setting", "value"), rows=rows)
    return [table, Listing(title="The whole configuration", text=dump_yaml(run.config))]


def _settings(config: RunConfig) -> dict[str, str]:
    learned = config.algorithm.needs.discriminator
    settings = {
        "algorithm": config.algorithm.type,
        "task": config.data.task,
        "policy": model_name(config.model.policy),
        "seed": str(config.seed),
        "steps": str(config.trainer.steps),
        "prompts a step": str(config.trainer.prompts_per_step),
    }
    if learned:
        clip = config.reward.clip
        perturbations = config.discriminator.perturbations
        settings |= {
            "discriminator": model_name(config.model.discriminator),
            "discriminator head": config.discriminator.head,
            "discriminator loss": f"{config.discriminator.loss.type}, a {config.discriminator.loss.level}",
            "reward density": density_name(config),
            "reward clip": "none" if clip is None else f"{clip[0]:g} to {clip[1]:g}",
            "perturbed negatives": f"{perturbations.count} a trace, labelled by {perturbations.label}",
            "selector": config.eval.selector,
        }
    if config.algorithm.needs.rollouts:
        settings |= {
            "samples a prompt": str(config.rollout.samples_per_prompt),
            "advantage": f"{config.advantage.type}, gamma {config.advantage.gamma:g}",
            "rollout engine": config.rollout.engine,
        }
    return settings | {"configuration hash": config_hash(config)}


def _measured(run: Run) -> list[tuple[str, Cell]]:
    seconds = sum(row.get(names.TIME_STEP, 0.0) for row in run.metrics)
    done = max((int(row["step"]) for row in run.metrics if "step" in row), default=0)
    return [
        ("steps done", str(max(0, done))),
        ("time of all steps", f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"),
    ]


def headline(run: Run) -> list[Part]:
    """Every metric of every evaluation with its interval."""
    evaluations = list(run.evaluations.values())
    if not evaluations:
        raise Absent("the run has no evaluations")
    metrics = list(dict.fromkeys(m for e in evaluations for m in e.summary if not _has_own_table(m)))
    rows: list[Sequence[Cell]] = []
    for metric in sorted(metrics, key=rank_of):
        label, kind = label_of(metric)
        entries = [e.summary.get(metric) for e in evaluations]
        label = f"{label} (%)" if kind == "percent" else label
        rows.append((label, *(number_of(metric, entry) if entry else None for entry in entries)))
    counts = [max((entry.get("n", 0) for entry in e.summary.values()), default=0) for e in evaluations]
    rows.append(("problems", *(Number(value=count, kind="count") for count in counts)))
    return [
        Table(
            name="summary",
            title="All metrics",
            columns=("metric", *(e.name for e in evaluations)),
            rows=rows,
            note="In brackets: 95% bootstrap intervals over problems.",
        )
    ]


def _has_own_table(metric: str) -> bool:
    own = (names.EVAL_RERANK_AT, names.EVAL_CATEGORY_PASS_AT_1)
    return any(pattern_of(name).match(metric) for name in own)
