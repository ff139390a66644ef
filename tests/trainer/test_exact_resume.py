"""A resumed run's metrics equal the uninterrupted run's bit for bit (hf engine, torch AdamW).

Every case runs once without interruption. Then its folder is cut back to what kill -9 leaves behind when a
given checkpoint is the newest (later rows of metrics.jsonl remain), and the run is resumed. Actors are forks;
begun as users' are they are in test_cold_resume.py, and in `make test-matrix` for every case.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from rairl_ray import metrics as names
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.config.schema import Density, DiscriminatorLoss, RunConfig
from rairl_ray.trainer.worker_groups import cluster
from tests.faults import events
from tests.inprocess import config_of, differing, killed_after, mediocre, moved, rows_of, run

COMMON = (
    "placement.threads_per_actor=2",
    "trainer.steps=5",
    "trainer.checkpoint_every=2",
    "trainer.keep_checkpoints=9",
    "trainer.log_rollouts_every=0",
    "policy.learning_rate=0.003",
    "discriminator.learning_rate=0.003",
    # 8 problems: three to a step stop in the middle of an epoch, four to a step at its edge
    "data.limit=8",
)
MIDDLE, EDGE = "trainer.prompts_per_step=3", "trainer.prompts_per_step=4"
ONE_RANK, TWO_RANKS = "learner.replicas=1", "learner.replicas=2"
POLICY_LORA = "model.policy.lora.rank=4"
DROPOUT = "model.policy.lora.dropout=0.2"
LORA = (POLICY_LORA, DROPOUT, "model.discriminator.lora.rank=4", "model.discriminator.lora.dropout=0.2")
SCALAR = ("discriminator.head=scalar", "discriminator.loss.level=unit")
SPARSE, INTERVAL, DENSE = (f"reward.density.type={kind}" for kind in ("sparse", "interval", "dense"))
REPLAY = ("discriminator.replay.capacity=16", "discriminator.replay.share=0.5")
GATE = (
    "discriminator.warmup_gate_auroc=0.01",
    "discriminator.warmup_steps=3",
    "discriminator.warmup_max_steps=5",
)
KL = ("policy.kl_coefficient=0.05", "policy.minibatches_per_step=2")

CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "airl, implicit, full, ZeRO 1, replay, gate, KL": (
        "airl", ("learner.zero_stage=1", ONE_RANK, EDGE, *REPLAY, *GATE, *KL),
    ),
    "sft, full, ZeRO 1": ("sft", ("learner.zero_stage=1", ONE_RANK, MIDDLE)),
    "grpo, full, ZeRO 3, 2 ranks, KL": ("grpo", ("learner.zero_stage=3", TWO_RANKS, MIDDLE, *KL)),
    "grpo, LoRA, ZeRO 2, 2 ranks": ("grpo", ("learner.zero_stage=2", TWO_RANKS, EDGE, POLICY_LORA, DROPOUT)),
    "airl, scalar, intervals, LoRA, ZeRO 2, 2 ranks, replay": (
        "airl", ("learner.zero_stage=2", TWO_RANKS, MIDDLE, *SCALAR, INTERVAL, *LORA, *REPLAY),
    ),
    "airl, implicit, dense, Bradley-Terry, LoRA, ZeRO 3, 2 ranks, expert in the group": (
        "airl",
        ("learner.zero_stage=3", TWO_RANKS, EDGE, DENSE, *LORA, "advantage.expert=single",
         "discriminator.loss.type=bradley_terry"),
    ),
    "airl, scalar, sparse, full, ZeRO 3, replay, own demonstrations, shaped loss": (
        "airl",
        ("learner.zero_stage=3", ONE_RANK, MIDDLE, *SCALAR, SPARSE, *GATE, *REPLAY,
         "discriminator.loss.type=airl", "discriminator.demonstrations_per_update=3"),
    ),
    "airl, implicit, full, WGAN, ZeRO 2, 2 ranks, running ahead": (
        "airl",
        ("learner.zero_stage=2", TWO_RANKS, MIDDLE, *REPLAY, "trainer.max_staleness_steps=1",
         "discriminator.loss.type=wgan"),
    ),
    "sft, LoRA, ZeRO 2, 2 ranks": ("sft", ("learner.zero_stage=2", TWO_RANKS, EDGE, POLICY_LORA, DROPOUT)),
    "sft, full, ZeRO 3, 2 ranks": ("sft", ("learner.zero_stage=3", TWO_RANKS, MIDDLE)),
}  # fmt: skip
FAST = "airl, implicit, full, ZeRO 1, replay, gate, KL"


def cases() -> Iterator[Any]:
    """The fast case from step 2, the others from 2 and 4 in turn; `make test-matrix` has the other one."""
    others = [case for case in CASES if case != FAST]
    first = {FAST: 2} | {case: (2, 4)[place % 2] for place, case in enumerate(others)}
    for case, checkpoint in itertools.product(first, (2, 4)):
        marks = [pytest.mark.slow] if checkpoint == first[case] else [pytest.mark.slow, pytest.mark.matrix]
        fast = (case, checkpoint) == (FAST, 2)
        yield pytest.param(case, checkpoint, marks=[] if fast else marks, id=f"{case}, from {checkpoint}")


def test_the_cases_train_every_density_and_loss(tmp_path: Path) -> None:
    configs = [config_of(name, tmp_path, *COMMON, *more) for name, more in CASES.values() if name == "airl"]
    for kind, used in (
        (Density, {config.reward.density.type for config in configs}),
        (DiscriminatorLoss, {config.discriminator.loss.type for config in configs}),
    ):
        assert used == set(get_args(kind.model_fields["type"].annotation))


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cluster for all cases, and the folder where its processes would leave kernels that they compile."""
    folder = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder))
        with cluster(config_of("grpo", tmp_path_factory.mktemp("cluster"))):
            yield folder


def check_resume(case: str, checkpoint: int, folder: Path, compiled: Path) -> None:
    """Run it whole and from a checkpoint; `compiled` is what the fixture gives."""
    experiment, overrides = CASES[case]
    start = mediocre() if experiment == "grpo" else ()
    config = config_of(experiment, folder / "whole", *COMMON, *overrides, *start)
    whole = run(config)
    assert moved(whole)
    if experiment == "airl":
        trained = [row for row in whole if names.POLICY_LOSS in row]
        assert all(
            math.isfinite(row[name])
            for row in trained
            for name in (names.DISCRIMINATOR_LOSS, names.REWARD_MEAN)
        )
    # A second start in one run is work done twice, which the numbers alone would not show.
    starts = events(folder / "whole" / config.name, "workers start from")
    assert len(starts) == (experiment == "sft")
    assert not list(compiled.iterdir())
    resumed = run(killed_after(config, checkpoint, folder / "resumed"), resume=True)
    assert differing(whole, resumed) == []


@pytest.mark.parametrize(("case", "checkpoint"), cases())
def test_the_resumed_run_equals_the_uninterrupted_one(
    case: str, checkpoint: int, tmp_path: Path, compiled: Path
) -> None:
    check_resume(case, checkpoint, tmp_path, compiled)


@pytest.fixture(scope="module")
def warmed(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Five warm-up updates with fresh samples, a checkpoint after every second, two steps."""
    config = config_of(
        "airl",
        tmp_path_factory.mktemp("warm"),
        *COMMON,
        MIDDLE,
        "trainer.steps=2",
        "eval.at_start=true",
        "discriminator.warmup_steps=5",
        "discriminator.warmup_max_steps=5",
        "discriminator.warmup_pool_prompts=null",
    )
    run(config)
    return config


@pytest.mark.slow
def test_a_kill_right_after_the_warm_up(warmed: RunConfig, tmp_path: Path) -> None:
    assert differing(rows_of(warmed), run(killed_after(warmed, 0, tmp_path), resume=True)) == []


@pytest.mark.slow
def test_a_kill_after_the_final_evaluation(warmed: RunConfig, tmp_path: Path) -> None:
    """Its row is there, and the resume evaluates again."""
    assert differing(rows_of(warmed), run(killed_after(warmed, 2, tmp_path), resume=True)) == []


@pytest.mark.slow
def test_a_kill_before_the_first_checkpoint_starts_again(warmed: RunConfig, tmp_path: Path) -> None:
    assert differing(rows_of(warmed), run(killed_after(warmed, -1, tmp_path), resume=True)) == []


@pytest.mark.slow
def test_a_kill_in_the_warm_up_resumes_inside_it(
    warmed: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver ends in the first warm-up update that finds a checkpoint, which is written beside them."""
    from rairl_ray.trainer.airl import AirlStrategy

    config = warmed.model_copy(update={"output_dir": str(tmp_path)})
    update = AirlStrategy.update
    store = CheckpointStore(tmp_path / config.name)

    def interrupted(self: AirlStrategy, *args: object, **kwargs: object) -> dict[str, float]:
        if str(kwargs.get("epoch")).startswith("warmup/"):
            time.sleep(0.5)
            if store.latest_valid() is not None:
                raise RuntimeError("the driver ends here")
        return update(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(AirlStrategy, "update", interrupted)
    with pytest.raises(RuntimeError, match="ends here"):
        run(config)
    monkeypatch.undo()
    events = (tmp_path / config.name / "events.log").read_text()
    resumed = run(config, resume=True)
    later = (tmp_path / config.name / "events.log").read_text().removeprefix(events)
    assert "resumed from step-000000" in later
    assert differing(rows_of(warmed), resumed) == []


@pytest.mark.slow
def test_with_vllm_the_same_requests_are_sampled_again(tmp_path: Path) -> None:
    """The engine may round differently from run to run, so its samples are compared by what was asked."""
    config = config_of(
        "grpo", tmp_path / "whole", "trainer.steps=3", "trainer.keep_checkpoints=9", "rollout.engine=vllm",
        "rollout.cpu_cache_gib=0.25",
    )  # fmt: skip
    run(config)
    resumed = killed_after(config, 1, tmp_path / "resumed")
    for step in (2, 3):
        (Path(resumed.output_dir) / resumed.name / "rollouts" / f"step-{step:06d}.jsonl").unlink()
    run(resumed, resume=True)
    for step in (2, 3):
        asked = [requests(each, step) for each in (config, resumed)]
        assert asked[0] == asked[1] and len(asked[0]) == 16


def requests(config: RunConfig, step: int) -> list[tuple[object, ...]]:
    file = Path(config.output_dir) / config.name / "rollouts" / f"step-{step:06d}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["prompt_id"], row["generation_idx"], row["seed"], row["policy_version"]) for row in rows]
