"""`launch.py score`: a saved reward over anybody's completions, one output line per input line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rairl_ray.actors.chunks import Chunk, Line, rows_of, split
from rairl_ray.config.load import load_config
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.rows import BadRow
from rairl_ray.display import Display
from rairl_ray.errors import ConfigError, DataError
from rairl_ray.files import write_json_lines
from rairl_ray.rewards.lines import check_line
from rairl_ray.rewards.pool import score_file
from rairl_ray.rewards.source import reward_folder
from rairl_ray.trainer.outputs import at_hand
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.verbs.job import Job, file_id, remove, reward_id, sole_owner
from rairl_ray.verbs.machines import reward_pool, torch_device

LINES_PER_CHUNK = 256


def score(
    source: str, file: Path, output: Path, overrides: Sequence[str] = (), display: Display | None = None
) -> int:
    """Score the completions of a JSONL file with the reward of a run, a reward-model folder or a hub id.

    The output has the input's lines in their order, with `reward_model_score`, `unit_scores` and `unit_spans`
    added. A killed job goes on where it was when it is started again.

    Raises:
        UserError: no reward there, a bad line (all are looked at before anything starts), an output in use.
    """
    check_output(file, output)
    display = display or Display("score", 1)
    with at_hand([source], overrides, display.note) as here:
        return _scored(*reward_of(here.runs[0], here.overrides), file, output, display)


def _scored(config: RunConfig, folder: Path, file: Path, output: Path, display: Display) -> int:
    chunks = split(file, LINES_PER_CHUNK, _check(file))
    job = Job(
        output.with_name(f"{output.name}.parts"),
        {
            "reward": reward_id(folder),
            "input": file_id(file),
            "lines_per_chunk": LINES_PER_CHUNK,
            **{f"eval.{key}": getattr(config.eval, key) for key in ("selector", "discount", "tail_share")},
        },
    )
    changed = job.differences()
    if changed:
        raise ConfigError(
            f"--output {output}: {job.folder} holds parts of another job: {', '.join(changed.values())}; "
            "remove that folder or name another --output"
        )
    display.note(f"output: {output}")
    with sole_owner(output):
        job.open()
        with display, cluster(config):
            score_chunks(config, folder, file, chunks, job.folder / "scores", display)
        rows, unscored = _join(job.folder / "scores", chunks, output)
        remove(job.folder)
    display.finish(
        [
            f"{rows} lines with their rewards: {output}",
            *([f"{unscored} of them could not be scored; `error` says why"] if unscored else []),
        ]
    )
    return 0


def _join(parts: Path, chunks: Sequence[Chunk], output: Path) -> tuple[int, int]:
    """Write the parts as one file; (rows, rows without a score)."""
    unscored = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal unscored
        for row in rows_of(parts, chunks):
            unscored += row["reward_model_score"] is None
            yield row

    return write_json_lines(output, counted()), unscored


def reward_of(source: str, overrides: Sequence[str]) -> tuple[RunConfig, Path]:
    """The configuration that a reward was trained under (of a bare folder: the schema's), and its folder."""
    named = load_config(None, [text for text in overrides if text.startswith("output_dir=")])
    folder = reward_folder(source, named.output_dir)
    saved = folder.parent.parent / "config.yaml"
    return load_config(saved if saved.is_file() else None, overrides), folder


def score_chunks(
    config: RunConfig,
    folder: Path,
    file: Path,
    chunks: Sequence[Chunk],
    parts: Path,
    display: Display,
    **how: Any,
) -> None:
    """`rewards.pool.score_file` with the actors that the connected cluster has room for."""
    score_file(config, folder, file, chunks, parts, display, reward_pool(config), torch_device(config), **how)


def check_output(file: Path, output: Path) -> None:
    """Refuse an input that is not there and an output that is.

    Raises:
        UserError: one line.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file; give a JSONL file of prompts and completions")
    free_output(output)


def free_output(output: Path) -> None:
    """Make the folder of an output. Raises ConfigError where it cannot be made, or the output exists."""
    if re.match("[a-z0-9]+:/", str(output)):
        raise ConfigError(f"--output {output}: must be a file of this machine; write it here and copy it there")
    if output.exists():
        raise ConfigError(f"--output {output}: exists already; remove it or name another file")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--output {output}: its folder cannot be made ({error.strerror}); name another"
        ) from None


def _check(file: Path) -> Any:
    def check(line: Line) -> None:
        try:
            check_line(line.values)
        except BadRow as error:
            raise DataError(f"{file}:{line.number}: {error}") from None

    return check
