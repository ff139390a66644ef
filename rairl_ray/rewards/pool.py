"""A saved reward model as a pool of actors over a file: what the verbs score with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rairl_ray.actors.chunks import Chunk, Pool, map_file
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.tasks import task_rules
from rairl_ray.display import Display
from rairl_ray.rewards.lines import ScoreLines


def score_file(
    config: RunConfig,
    folder: Path,
    file: Path,
    chunks: Sequence[Chunk],
    parts: Path,
    display: Display,
    pool: Pool,
    device: Literal["cpu", "cuda"],
    *,
    policy_fingerprint: str = "",
    keep_given: bool = False,
) -> None:
    """Score a file's chunks on the connected cluster with the reward in `folder` (`source.reward_folder`).

    Args:
        parts: where each chunk leaves its rows; those that are there are not made again.
        policy_fingerprint: of the tokenizer whose `token_ids` the lines bring (`saved.SavedReward`).
        keep_given: leave alone the lines that bring a reward.
    """
    display.phase("scoring", len(chunks))
    arguments = {
        "folder": folder,
        "selector": config.eval,
        "device": device,
        "system_prompt": task_rules(config.data).system_prompt,
        "policy_fingerprint": policy_fingerprint,
        "keep_given": keep_given,
        "tokens_per_micro_batch": config.learner.tokens_per_micro_batch,
    }
    map_file(file, chunks, parts, ScoreLines, arguments, pool, lambda done: display.step(done, {}))
