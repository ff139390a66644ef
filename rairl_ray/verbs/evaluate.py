"""`launch.py evaluate`: samples or given completions, graded, scored and summarised, resumable throughout.

    generate, aime:  problems ────SampleLines──> samples/ ─┐
    pregenerated_*:  eval.input ──LogprobLines─> samples/ ─┤ (what is given already is not computed again)
                                                           └─ScoreLines─> scores/ ─grade─> rows.jsonl ─> summary

Each arrow is a pool of actors over a file (actors/chunks.py): a killed evaluation continues where it was, and
no sample that was paid for is drawn again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rairl_ray.actors.chunks import map_file, rows_of, split
from rairl_ray.actors.sampling import LogprobLines, SampleLines
from rairl_ray.algorithms.rewards import selected_score
from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.data.prompt_length import fit_prompt_length
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import make_task, task_rules
from rairl_ray.data.tasks.base import Task
from rairl_ray.display import Display
from rairl_ray.engines.origin import content_id
from rairl_ray.engines.sources import resolve_model
from rairl_ray.errors import ConfigError
from rairl_ray.evaluation.rows import EvalRow, read_numbers, read_rows, write_rows
from rairl_ray.evaluation.summary import summarise_as
from rairl_ray.files import stream_json_lines, write_json_lines
from rairl_ray.rewards.lines import brings_reward
from rairl_ray.runfolder import write_summary
from rairl_ray.trainer.outputs import at_hand
from rairl_ray.trainer.run_context import SUMMARY_COLUMNS, summary_rows
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.types import Prompt, Trace
from rairl_ray.verbs.given import given_rows
from rairl_ray.verbs.grading import graded
from rairl_ray.verbs.job import Job, file_id, remove, reward_id, rows_id, sole_owner
from rairl_ray.verbs.machines import engine_pool, torch_device
from rairl_ray.verbs.score import LINES_PER_CHUNK, score_chunks
from rairl_ray.verbs.target import Target, find_target

SELECTOR = "selector"
PREGENERATED = ("pregenerated_policy", "pregenerated_policy_and_reward")
SOURCE, SAMPLES = "source.jsonl", "samples.jsonl"
"""Files of an unfinished evaluation: what it begins with, and what the policy said."""


def evaluate(text: str, overrides: Sequence[str] = (), display: Display | None = None) -> int:
    """Evaluate a model: what `text` may be is in `target.find_target`, how in the section `eval`.

    Leaves evaluations/NAME/rows.jsonl (one generation a line) and summary.json in the target's folder.

    Raises:
        UserError: one line, before an actor is started.
    """
    display = display or Display("evaluate", 1)
    with at_hand([text], overrides, display.note) as here:
        target = _with_mode(find_target(here.runs[0], _of_target(here.overrides)), here.overrides)
        evaluation = Evaluation(target, display)
        if not target.is_run:
            here.keep(target.folder.root)
        here.keep(evaluation.folder)
        return _evaluated(text, evaluation, target, display)


def _evaluated(text: str, evaluation: Evaluation, target: Target, display: Display) -> int:
    display.note(f"evaluation folder: {evaluation.folder}")
    summary = summarise_as(target.config, evaluation.rows())
    write_summary(evaluation.folder / "summary.json", summary)
    display.table(text, summary_rows(summary), SUMMARY_COLUMNS)
    display.finish(
        [f"rows: {evaluation.folder / 'rows.jsonl'}", f"summary: {evaluation.folder / 'summary.json'}"]
    )
    return 0


def _of_target(overrides: Sequence[str]) -> list[str]:
    """The overrides that speak of the run or model: in mode `aime` the keys of `data` speak of AIME."""
    aime = load_config(None, [text for text in overrides if text.startswith("eval.mode=")]).eval.mode == "aime"
    return [text for text in overrides if not (aime and text.startswith("data."))]


def _with_mode(target: Target, overrides: Sequence[str]) -> Target:
    """The target with what `eval.mode` implies.

    Raises:
        ConfigError: an input that the mode needs, or does not read.
    """
    config = target.config
    if config.eval.mode in PREGENERATED and config.eval.input is None:
        raise ConfigError(f"eval.mode={config.eval.mode}: reads given completions; set eval.input=FILE.jsonl")
    if config.eval.mode not in PREGENERATED and config.eval.input is not None:
        raise ConfigError(
            f"eval.input={config.eval.input}: eval.mode={config.eval.mode} samples its own completions; set "
            "eval.mode=pregenerated_policy"
        )
    if config.eval.mode == "aime" and config.data.task != "aime":
        # The run's own data keys (path, fields) are those of its training task; the command line's are meant.
        meant = [text for text in overrides if text.startswith("data.")]
        kept = f"data.max_prompt_tokens={config.data.max_prompt_tokens}"
        data = load_config(None, [kept, *meant, "data.task=aime"]).data
        config = config.model_copy(update={"data": data})
    return Target(config, target.folder, target.reward, target.policy_version)


class Evaluation:
    """One evaluation folder on its way to rows.jsonl."""

    def __init__(self, target: Target, display: Display) -> None:
        config = target.config
        self._target, self._config, self._display = target, config, display
        self._rules = task_rules(config.data)
        cache = Path(config.output_dir) / ".cache" / "models"
        self._policy = resolve_model(config.model.policy, role="policy", cache_dir=cache, seed=config.seed)
        self._given = config.eval.mode in PREGENERATED
        self._task: Task | None = None if self._given else self._fitting_task()
        self.folder = target.folder.evaluations / (config.eval.name or self._name())

    def _name(self) -> str:
        """The mode, and the file that was given."""
        mode = self._config.eval.mode
        return f"{mode}-{Path(self._config.eval.input).stem}" if self._config.eval.input else mode

    def _fitting_task(self) -> Task:
        """The task with the problems whose prompts fit (`data.on_bad_row` says what becomes of others)."""
        config = self._config
        task = make_task(config.data, config.seed)
        limit, on_bad_row = config.data.max_prompt_tokens, config.data.on_bad_row
        return replace(task, eval=fit_prompt_length(task.eval, self._renderer, limit, on_bad_row))

    @cached_property
    def _renderer(self) -> Renderer:
        """How the policy reads prompts."""
        tokenizer = load_tokenizer(self._policy, self._config.model.policy)
        return Renderer(tokenizer, self._rules.system_prompt, self._config.data.system_role)

    def _settings(self, source: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Everything that rows.jsonl depends on."""
        config, reward = self._config, self._target.reward
        template = config.model.policy.chat_template
        settings: dict[str, Any] = {
            "mode": config.eval.mode,
            "policy": content_id(self._policy, config.model.policy.revision),
            "chat_template": None if template is None else file_id(Path(template)),
            "reward": None if reward is None else reward_id(reward),
            "task": [config.data.task, config.data.grader],
            "source": rows_id(source),
            "system_prompt": [self._rules.system_prompt, config.data.system_role],
            "max_prompt_tokens": config.data.max_prompt_tokens,
            "max_completion_tokens": config.rollout.max_completion_tokens,
            "engine": config.rollout.engine,
            "dtype": config.model.policy.dtype,
            "lines_per_chunk": self._lines_per_chunk(),
            SELECTOR: [config.eval.selector, config.eval.discount, config.eval.tail_share],
        }
        if self._given:
            return settings
        return settings | {
            "samples_per_prompt": config.eval.samples_per_prompt,
            "temperature": config.eval.temperature,
            "top_p": config.eval.top_p,
            "seed": config.seed,
        }

    def _input(self) -> Path:
        file = Path(self._config.eval.input or "").expanduser()
        if not file.is_file():
            raise ConfigError(f"eval.input={file}: no such file; give a JSONL file of completions")
        return file

    def rows(self) -> list[EvalRow]:
        """Make what is missing of rows.jsonl and read its numbers."""
        target = self.folder / "rows.jsonl"
        source = self._source()
        job = Job(self.folder, self._settings(source))
        with sole_owner(self.folder):
            changed = set(job.differences())
            if changed <= {SELECTOR} and target.is_file():
                self._display.note("all rows are there from an earlier evaluation of these settings")
                if changed:
                    write_rows(target, map(self._selected, read_rows(target)))
                    job.open()
                return read_numbers(target)
            job.move_aside(self._display)
            job.open()
            if not self._target.folder.config.is_file():
                self._target.folder.write_config(dump_yaml(self._config))
            self._make(source, target)
        return read_numbers(target)

    def _selected(self, row: EvalRow) -> EvalRow:
        """The row under another selector."""
        units = row.unit_scores
        return replace(row, score=selected_score(np.asarray(units), self._config.eval)) if units else row

    def _make(self, source: Sequence[dict[str, Any]], target: Path) -> None:
        write_json_lines(self.folder / SOURCE, source)
        with self._display:
            rows = self._through_actors(source)
            self._display.phase("grading")
            version = self._target.policy_version
            grader, completed = self._rules.grader, self._renderer.completed
            write_rows(target, graded(rows, grader, self._config.eval, version, completed))
        for leftover in ("samples", "scores"):
            remove(self.folder / leftover)
        for leftover in (SOURCE, SAMPLES):
            (self.folder / leftover).unlink(missing_ok=True)

    def _source(self) -> list[dict[str, Any]]:
        """Rows to begin with: problems, or given completions."""
        if self._given:
            renderer = self._renderer

            def tokens(question: str, completion: str) -> int:
                trace = Trace(prompt=Prompt(id="", question=question), text=completion)
                return len(renderer.tokenize(trace, same_tokenizer=True).completion_ids)

            return given_rows(self._input(), self._config, tokens)
        assert self._task is not None
        return [
            {
                "prompt_id": item.prompt.id,
                "question": item.prompt.question,
                "answer": item.prompt.answer,
                "metadata": item.prompt.metadata,
            }
            for item in self._task.eval[: self._config.eval.prompts]
        ]

    def _through_actors(self, source: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Rows with generations, log-probabilities and rewards; what all rows have already is not asked for."""
        mode, reward = self._config.eval.mode, self._target.reward
        with_policy = not self._given or (
            mode == "pregenerated_policy" and not all("policy_logprobs" in row for row in source)
        )
        scored = self._given and all(brings_reward(row) for row in source)
        if mode == "pregenerated_policy_and_reward" and not scored and reward is None:
            raise ConfigError(
                f"eval.input={self._config.eval.input}: some rows have no reward_model_score, and no reward is "
                "named; set eval.reward=RUN, or eval.mode=pregenerated_policy"
            )
        if not with_policy and (scored or reward is None):
            return iter(source)
        with cluster(self._config):
            file = self.folder / SOURCE
            if with_policy:
                file = self._with_policy(file)
            if scored or reward is None:
                return stream_json_lines(file)
            return self._with_reward(file, reward)

    def _with_policy(self, source: Path) -> Path:
        """Samples of the problems, or log-probabilities of the completions, in a file."""
        config, parts = self._config, self.folder / "samples"
        target = self.folder / SAMPLES
        chunks = split(source, self._lines_per_chunk())
        arguments = {
            "config": config,
            "policy_path": self._policy,
            "device": torch_device(config),
            "system_prompt": self._rules.system_prompt,
        }
        make = LogprobLines if self._given else SampleLines
        self._display.phase("log-probabilities of the policy" if self._given else "sampling", len(chunks))
        pool = engine_pool(config)
        map_file(source, chunks, parts, make, arguments, pool, lambda done: self._display.step(done, {}))
        write_json_lines(target, rows_of(parts, chunks))
        return target

    def _with_reward(self, source: Path, reward: Path) -> Iterator[dict[str, Any]]:
        chunks, parts = split(source, LINES_PER_CHUNK), self.folder / "scores"
        fingerprint = "" if self._given else self._renderer.fingerprint
        how = {"policy_fingerprint": fingerprint, "keep_given": self._given}
        score_chunks(self._config, reward, source, chunks, parts, self._display, **how)
        return rows_of(parts, chunks)

    def _lines_per_chunk(self) -> int:
        """Enough requests to keep an engine full, few enough that a kill costs little."""
        config = self._config
        per_line = 1 if self._given else config.eval.samples_per_prompt
        return max(1, 4 * config.rollout.max_sequences // per_line)
