"""`launch.py localise`: the first wrong step of each trace, read from the reward, against labels.

labelled file, or held-out experts ──ScoreLines──> unit rewards ──> step values ──> the step that is named
with one injected error              └──PolicyReadLines──> log-probabilities, entropies ──> baselines
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rairl_ray.actors.chunks import map_file, rows_of, split
from rairl_ray.actors.reading import PolicyReadLines
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.tasks import task_rules
from rairl_ray.display import Display
from rairl_ray.engines.origin import content_id
from rairl_ray.engines.sources import resolve_model
from rairl_ray.errors import ConfigError
from rairl_ray.files import write_json_lines
from rairl_ray.runfolder import RunFolder, Summary, write_summary
from rairl_ray.trainer.outputs import AtHand, at_hand
from rairl_ray.trainer.run_context import SUMMARY_COLUMNS, summary_rows
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs.job import Job, remove, reward_id, rows_id, sole_owner
from rairl_ray.verbs.localisation_cases import (
    Case,
    injected_cases,
    injected_summary,
    labelled_cases,
    policy_summary,
    readout_of,
    row_of,
    summarise,
    values_of_case,
)
from rairl_ray.verbs.machines import reward_pool, torch_device
from rairl_ray.verbs.score import LINES_PER_CHUNK, free_output, reward_of, score_chunks
from rairl_ray.verbs.target import plain_policy

SOURCE = "source.jsonl"
FILES = (".jsonl", ".json", ".parquet")


def localise(
    source: str,
    file: Path | None = None,
    *,
    output: Path | None = None,
    scores: str | None = None,
    baselines: bool = True,
    overrides: Sequence[str] = (),
    display: Display | None = None,
) -> int:
    """Name the first wrong step of each trace and say how often that is right.

    Args:
        source: run, reward-model folder or hub id; with `scores` also the labelled file itself.
        file: traces in steps with the first wrong one (evaluation.localisation_files); None: held-out experts
            of the run's task with one injected error each.
        output: a copy of the rows.
        scores: column of the file with one number a step, judged in the reward's place; no model is loaded.
        baselines: read the traces with the run's policy, too.

    Raises:
        UserError: one line, before an actor is started.
    """
    if file is None and Path(source).suffix in FILES:
        file = Path(source)
        if scores is None:
            raise ConfigError(
                f"{source}: a file alone has no reward; write `localise RUN {source}`, or --scores COLUMN"
            )
    if output is not None:
        free_output(output)
    display = display or Display("localise", 1)
    if scores is not None:
        if file is None:
            raise ConfigError(f"--scores {scores}: needs a file with that column; write `localise RUN FILE`")
        config = load_config(None, overrides)
        readout = readout_of(config)
        cases = labelled_cases(file, config, scores)
        rows = [row_of(case, None, case.step_scores, readout) for case in cases]
        summary = summarise(cases, [case.step_scores for case in cases], config)
        _show(file.name, summary, display)
    else:
        with at_hand([source], overrides, display.note) as here:
            rows = _by_reward(source, file, baselines, here, display)
    if output is not None:
        write_json_lines(output, rows)
        display.finish([f"rows: {output}"])
    return 0


def _by_reward(
    source: str, file: Path | None, baselines: bool, here: AtHand, display: Display
) -> list[dict[str, Any]]:
    config, reward = reward_of(here.runs[0], here.overrides)
    readout = readout_of(config)
    cases = injected_cases(config) if file is None else labelled_cases(file, config, None)
    root = reward.parent.parent
    in_run = (root / "config.yaml").is_file()
    folder = RunFolder(root if in_run else Path(config.output_dir) / "models" / reward.name)
    name = config.eval.name or ("localisation" if file is None else f"localisation-{file.stem}")
    target = folder.evaluations / name
    here.keep(target)
    display.note(f"evaluation folder: {target}")
    policy = folder.final_policy if in_run and baselines and folder.final_policy.is_dir() else None
    job = Job(
        target,
        {
            "reward": reward_id(reward),
            "policy": None if policy is None else content_id(str(policy)),
            "traces": rows_id(_lines(cases)),
            "lines_per_chunk": LINES_PER_CHUNK,
        },
    )
    with sole_owner(target):
        job.move_aside(display)
        job.open()
        with display, cluster(config):
            rewards = scored_units(config, reward, cases, target, display)
            read = [] if policy is None else _read_by_policy(config, policy, target, display)
        for leftover in ("scores", "policy"):
            remove(target / leftover)
        (target / SOURCE).unlink()
    values = [values_of_case(case, units) for case, units in zip(cases, rewards, strict=True)]
    summary = summarise(cases, values, config)
    if file is None:
        summary |= injected_summary(cases, rewards, read, config)
    summary |= policy_summary(cases, read, config)
    rows = [
        row_of(case, units, value, readout) for case, units, value in zip(cases, rewards, values, strict=True)
    ]
    write_json_lines(target / "localisation.jsonl", rows)
    write_summary(target / "summary.json", summary)
    _show(f"{source} on {'injected errors' if file is None else file.name}", summary, display)
    display.finish([f"rows: {target / 'localisation.jsonl'}", f"summary: {target / 'summary.json'}"])
    return rows


# --- actors ----------------------------------------------------------------------------------------


def scored_units(
    config: RunConfig, reward: Path, cases: Sequence[Case], target: Path, display: Display
) -> list[dict[str, Any]]:
    """Each case's row with the rewards of its units; parts in `target`/scores are used again."""
    source = target / SOURCE
    write_json_lines(source, _lines(cases))
    chunks, parts = split(source, LINES_PER_CHUNK), target / "scores"
    score_chunks(config, reward, source, chunks, parts, display)
    return list(rows_of(parts, chunks))


def _lines(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Rows that a reward and a policy read."""
    return [
        {
            "prompt": case.question,
            "generation": case.text,
            "finish_reason": "stop" if case.finished else "length",
        }
        for case in cases
    ]


def _read_by_policy(config: RunConfig, policy: Path, target: Path, display: Display) -> list[dict[str, Any]]:
    """Each case's row with what the run's final policy says of its tokens."""
    model = plain_policy(config.model.policy, str(policy))
    path = resolve_model(
        model, role="policy", cache_dir=Path(config.output_dir) / ".cache" / "models", seed=config.seed
    )
    source, parts = target / SOURCE, target / "policy"
    chunks = split(source, LINES_PER_CHUNK)
    display.phase("reading with the policy", len(chunks))
    arguments = {
        "policy_path": path,
        "model": model,
        "device": torch_device(config),
        "system_prompt": task_rules(config.data).system_prompt,
        "system_role": config.data.system_role,
        "tokens": config.learner.tokens_per_micro_batch,
    }
    pool = reward_pool(config)
    map_file(source, chunks, parts, PolicyReadLines, arguments, pool, lambda done: display.step(done, {}))
    return list(rows_of(parts, chunks))


def _show(title: str, summary: Summary, display: Display) -> None:
    display.table(title, summary_rows(summary), SUMMARY_COLUMNS)
