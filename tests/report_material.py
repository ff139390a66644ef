"""Small run folders with known numbers, written as runs write them, for the tests of the report."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.evaluation.rows import EvalRow, write_rows
from rairl_ray.evaluation.summary import summarise
from rairl_ray.runfolder import RunFolder, write_summary

ROOT = Path(__file__).resolve().parents[1]
HOSTILE = "<script>alert('x')</script> \u202egnp.exe \x1b[31m\x00 مرحبا </span><img src=x onerror=alert(1)>"


def make_rows(problems: int = 6, samples: int = 4, *, text: str = "", shift: float = 0.0) -> list[EvalRow]:
    """The first p % (samples + 1) samples of problem p are right and score 1 more than the wrong ones."""
    rows = []
    for problem in range(problems):
        for index in range(samples):
            correct = index < problem % (samples + 1)
            generation = text or f"<think>\n{problem}+{index}=7\nso 7\n</think>\n<answer>\n{index}\n</answer>"
            ends = np.linspace(5, len(generation), 4).astype(int).tolist()
            units = [shift + correct + 0.1 * unit - 0.5 + 0.01 * problem for unit in range(4)]
            row = EvalRow(
                prompt_id=f"p/{problem}", question=f"{problem} and {index}?", generation=generation,
                generation_idx=index, answer="0", correct=correct, extracted=str(index if not correct else 0),
                format_ok=index != 3, finish_reason="stop", tokens=20 + index, policy_version=3,
                discriminator_version=4, unit_scores=units, unit_char_ends=ends, score=float(np.mean(units)),
                policy_logprobs=[-0.5 - 0.1 * index] * 3, verifiable_rewards={"format": float(index != 3)},
                metadata={"category": ("law", "physics")[problem % 2]},
            )  # fmt: skip
            rows.append(row)
    return rows


def make_run(folder: Path, *overrides: str, rows: list[EvalRow] | None = None, steps: int = 5) -> RunFolder:
    """A run of experiments/demo/airl.yaml with one evaluation, `final`."""
    run = RunFolder(folder)
    run.create()
    config = load_config(ROOT / "experiments" / "demo" / "airl.yaml", [f"name={folder.name}", *overrides])
    run.write_config(dump_yaml(config))
    for step in range(-2, steps + 1):
        learned = {"reward/mean": 0.1 * step, "eval/pass_at_1": 0.1 * step} if step > 0 else {}
        run.append_metrics(step, {"discriminator/loss": 0.7 - 0.01 * step, "time/step": 30.0, **learned})
    add_evaluation(run, "final", make_rows() if rows is None else rows)
    return run


def add_evaluation(run: RunFolder, name: str, rows: list[EvalRow]) -> None:
    folder = run.evaluation(name)
    write_rows(folder / "rows.jsonl", rows)
    write_summary(folder / "summary.json", summarise(rows, k=(1, 2, 4), resamples=100, key=("test",)))


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def localised_rows() -> list[dict[str, object]]:
    """Traces of three steps, as `localise` writes them: the named step is right in the first three of four.

    Then a right trace, one with its error in the answer, and one that could not be scored.
    """
    text = "<think>\n1+1=2\n2+2=5\n5+1=6\n</think>\n<answer>\n6\n</answer>"
    ends = [14, 20, 26]
    rows = []
    for index, (error, named) in enumerate([(1, 1), (1, 1), (2, 2), (1, 0), (-1, 0)]):
        row = {
            "prompt_id": f"trace/{index}", "question": "1+1+2+1=?", "text": text, "step_char_ends": ends,
            "unit_char_ends": [*ends, len(text), len(text)], "unit_scores": [0.5, -1.25, 0.25, None, 0.125],
            "first_error_step": error, "predicted_step": named, "edit_char": 18 if error == 1 else None,
        }  # fmt: skip
        rows.append(row)
    unscored = {"unit_char_ends": None, "unit_scores": None, "predicted_step": None, "error": "too long"}
    rows.append({**rows[0], "first_error_step": None, "edit_char": 44})
    rows.append({**rows[0], **unscored})
    return rows
