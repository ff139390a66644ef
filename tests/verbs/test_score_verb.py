"""`launch.py score`: one output line a line, in training's own numbers, resumable."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rairl_ray.actors.chunks import Line
from rairl_ray.config.schema import Density, Model
from rairl_ray.data.batching import discriminator_tensors
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.reward_heads import RewardModel
from rairl_ray.errors import ConfigError, DataError, ModelError, UserError
from rairl_ray.rewards.lines import ScoreLines
from rairl_ray.rewards.reading import TraceReader, sample_of
from rairl_ray.rewards.source import reward_folder
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.types import Prompt, Trace
from rairl_ray.verbs import score as verb
from rairl_ray.verbs.score import score
from tests.finished import finished_run

ROWS = [
    {
        "id": n,
        "prompt": f"{n}+2+3+4=?",
        "completion": f"<think>\n{n}+2={n + 2}\n</think>\n<answer>\n{n}\n</answer>",
    }
    for n in range(1, 10)
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An implicit reward by steps and a scalar one by intervals, on one cluster."""
    output = tmp_path_factory.mktemp("runs")
    config = finished_run(output, "implicit")
    finished_run(
        output, "scalar", "discriminator.head=scalar", "discriminator.loss={type: bce, level: unit}",
        "reward.density={type: interval, every: 4}", "reward.temperature=2", seed=1,
    )  # fmt: skip
    with cluster(config):
        yield output


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verb, "LINES_PER_CHUNK", 4)


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def scored(runs: Path, run: str, rows: list[dict[str, Any]], *overrides: str) -> list[dict[str, Any]]:
    """What an actor does with the lines of a chunk, in this process."""
    config, folder = verb.reward_of(str(runs / run), overrides)
    return ScoreLines(folder, config.eval)([Line(number, row) for number, row in enumerate(rows, start=1)])


def by_hand(folder: Path, row: dict[str, Any]) -> np.ndarray:
    """The unit rewards of one row, alone in its batch, from the artifact and its reward.json."""
    settings = json.loads((folder / "reward.json").read_text())
    model = RewardModel.load(folder)
    renderer = Renderer(load_tokenizer(str(folder), Model()), settings["system_prompt"])
    reader = TraceReader(renderer, Density(**settings["density"]), "")
    sample = sample_of(
        reader.read(Trace(prompt=Prompt(id="x", question=row["prompt"]), text=row["completion"]))
    )
    with torch.no_grad():
        logits = model.score(discriminator_tensors([sample], renderer.pad_id))[0].numpy()
    clip = settings["clip"]
    return np.clip(logits / settings["temperature"], *clip) if clip else logits / settings["temperature"]


@pytest.mark.parametrize("run", ["implicit", "scalar"])
def test_lines_carry_the_artifacts_own_rewards(run: str, runs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert score(str(runs / run), written(tmp_path / "in.jsonl", ROWS), output) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    rows = read(output)
    assert [row["id"] for row in rows] == [row["id"] for row in ROWS]
    for row in rows:
        expected = by_hand(runs / run / "final/reward_model", row)
        assert row["unit_scores"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert row["discriminator_version"] == 7
        spans = row["unit_spans"]
        assert spans[0][0] == 0 and spans[-1][1] == len(row["completion"])
        assert all(before[1] == after[0] for before, after in pairwise(spans))
    assert len({row["reward_model_score"] for row in rows}) > 1


def test_the_selector_is_the_configurations(runs: Path) -> None:
    for selector, of in {"min": min, "last": lambda units: units[-1], "sum": sum}.items():
        for row in scored(runs, "scalar", ROWS[:3], f"eval.selector={selector}"):
            assert row["reward_model_score"] == pytest.approx(of(row["unit_scores"]))


def test_a_shuffled_file_gets_the_same_rewards(runs: Path) -> None:
    shuffled = random.Random(0).sample(ROWS, len(ROWS))
    straight = {row["id"]: row for row in scored(runs, "scalar", ROWS)}
    for row in scored(runs, "scalar", shuffled):
        assert row["unit_scores"] == pytest.approx(straight[row["id"]]["unit_scores"], abs=1e-6)


def test_public_columns_conversations_and_what_cannot_be_scored(runs: Path) -> None:
    text = ROWS[0]["completion"]
    question = ROWS[0]["prompt"]
    rows = scored(
        runs,
        "implicit",
        [
            ROWS[0],
            {"question": question, "generation": text},
            {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": text}]},
            {"prompt": [{"role": "user", "content": question}], "response": text},
            {"problem": question, "solution": "7" * 500},
            {"prompt": question, "completion": ""},
            {"prompt": question, "completion": "", "finish_reason": "length"},
        ],
    )
    assert all(row["unit_scores"] == pytest.approx(rows[0]["unit_scores"], abs=1e-6) for row in rows[:4])
    assert rows[4]["reward_model_score"] is None and "window of" in rows[4]["error"]
    assert len(rows[5]["unit_scores"]) == 1  # the end of the sequence alone
    assert rows[6]["reward_model_score"] is None and "no tokens" in rows[6]["error"]


def test_a_killed_job_goes_on_with_its_parts(runs: Path, tmp_path: Path) -> None:
    whole = scored(runs, "scalar", ROWS)
    file, output = written(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    stopped = StopAfterFirst()
    with pytest.raises(KeyboardInterrupt):
        score(str(runs / "scalar"), file, output, (), stopped)
    parts = tmp_path / "out.jsonl.parts" / "scores"
    kept = {part: part.stat().st_mtime_ns for part in parts.glob("*.jsonl")}
    assert kept and not output.exists()
    with pytest.raises(ConfigError, match=r"parts of another job: eval\.selector .then: min, now: mean."):
        score(str(runs / "scalar"), file, output, ("eval.selector=mean",))
    marked = min(kept)
    rows = read(marked)
    written(marked, [{**row, "kept": True} for row in rows])
    assert score(str(runs / "scalar"), file, output) == 0
    after = read(output)
    assert [row.pop("kept", False) for row in after] == [True] * len(rows) + [False] * (len(ROWS) - len(rows))
    assert [row["id"] for row in after] == [row["id"] for row in whole]
    for one, other in zip(after, whole, strict=True):
        assert one["unit_scores"] == pytest.approx(other["unit_scores"], abs=1e-6)


class StopAfterFirst(verb.Display):
    """Ctrl-C once the first chunk is there."""

    def __init__(self) -> None:
        super().__init__("score", 1)

    def step(self, step: int, metrics: object) -> None:  # type: ignore[override]
        if step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([ROWS[0], {"completion": "x"}], r"in\.jsonl:2: no column 'prompt' .*there are: completion"),
        ([ROWS[0], {"prompt": "x"}], r"in\.jsonl:2: no column 'generation'"),
        ([{"prompt": "x", "completion": 3}], r"in\.jsonl:1: the completion is int, not text"),
        ([{"prompt": ["x"], "completion": "y"}], r"in\.jsonl:1: column 'prompt' holds list"),
        ([{"messages": [{"role": "user", "content": "x"}]}], r"in\.jsonl:1: .* does not end with an assistant"),
        ([], r"in\.jsonl: no rows"),
    ],
)
def test_a_bad_row_is_named_before_anything_starts(
    rows: list[dict[str, Any]], said: str, runs: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=said):
        score(str(runs / "scalar"), written(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_reward_or_file_that_is_not_there_is_one_line(runs: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(ModelError, match="no reward model there"):
        score(str(tmp_path), file, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="no such file"):
        score(str(runs / "scalar"), tmp_path / "nothing.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="exists already"):
        score(str(runs / "scalar"), file, file)


def test_every_way_to_name_a_reward_finds_it(runs: Path) -> None:
    folder = (runs / "scalar/final/reward_model").resolve()
    assert reward_folder(str(runs / "scalar")) == folder
    assert reward_folder(str(folder)) == folder
    assert reward_folder(str(runs / "scalar/final")) == folder
    assert reward_folder("scalar", str(runs)) == folder
