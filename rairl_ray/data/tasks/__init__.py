"""The registry of tasks: a new task is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from rairl_ray.config.schema import Data
from rairl_ray.data.tasks.arithmetic import make_arithmetic
from rairl_ray.data.tasks.base import Task
from rairl_ray.data.tasks.countdown import make_countdown
from rairl_ray.data.tasks.gsm8k import make_gsm8k
from rairl_ray.data.tasks.jsonl import make_jsonl
from rairl_ray.errors import ConfigError

TASKS: dict[str, Callable[[Data], Task]] = {
    "arithmetic": make_arithmetic,
    "countdown": make_countdown,
    "gsm8k": make_gsm8k,
    "jsonl": make_jsonl,
}


def make_task(data: Data, seed: int = 0) -> Task:
    """The task of a configuration. Raises ConfigError for an unknown name, DataError for unusable files.

    The run's `seed` changes no problem: all seeds of an experiment share one evaluation set. It is part of
    the signature because the order of a run belongs to it (`cursor.Cursor`).
    """
    if data.task not in TASKS:
        close = difflib.get_close_matches(data.task, TASKS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(TASKS)}"
        raise ConfigError(f"data.task={data.task}: unknown task; {hint}")
    return TASKS[data.task](data)
