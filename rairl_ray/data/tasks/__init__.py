"""The registry of tasks: a new task is one file and one line here."""

from __future__ import annotations

import difflib

from rairl_ray.config.schema import Data
from rairl_ray.data.tasks.aime import AIME
from rairl_ray.data.tasks.arithmetic import ARITHMETIC
from rairl_ray.data.tasks.base import Task, TaskKind, TaskRules
from rairl_ray.data.tasks.countdown import COUNTDOWN
from rairl_ray.data.tasks.gsm8k import GSM8K
from rairl_ray.data.tasks.gsm8k_distilled import GSM8K_DISTILLED
from rairl_ray.data.tasks.jsonl import JsonlTask
from rairl_ray.data.tasks.math500 import MATH500
from rairl_ray.data.tasks.medical_o1 import MEDICAL_O1
from rairl_ray.data.tasks.medqa import MEDQA
from rairl_ray.data.tasks.medreason import MEDREASON
from rairl_ray.data.tasks.mmlu_pro import MMLU_PRO
from rairl_ray.errors import ConfigError

TASKS: dict[str, TaskKind] = {
    "aime": AIME,
    "arithmetic": ARITHMETIC,
    "countdown": COUNTDOWN,
    "gsm8k": GSM8K,
    "gsm8k_distilled": GSM8K_DISTILLED,
    "jsonl": JsonlTask(),
    "math500": MATH500,
    "medical_o1": MEDICAL_O1,
    "medqa": MEDQA,
    "medreason": MEDREASON,
    "mmlu_pro": MMLU_PRO,
}


def make_task(data: Data, seed: int = 0) -> Task:
    """The task of a configuration. Raises ConfigError for an unknown name, DataError for unusable files.

    The run's `seed` changes no problem: all seeds of an experiment share one evaluation set. It is part of
    the signature because the order of a run belongs to it (`cursor.Cursor`).
    """
    return _kind(data).make(data)


def task_rules(data: Data) -> TaskRules:
    """System prompt and grader of a task, without its data. Raises ConfigError for an unknown name."""
    return _kind(data).rules(data)


def _kind(data: Data) -> TaskKind:
    if data.task not in TASKS:
        close = difflib.get_close_matches(data.task, TASKS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(TASKS)}"
        raise ConfigError(f"data.task={data.task}: unknown task; {hint}")
    return TASKS[data.task]
