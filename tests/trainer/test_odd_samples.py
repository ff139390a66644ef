"""What a collapsed policy writes: no tokens, no units, special tokens alone, through the whole step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rairl_ray import metrics as names
from rairl_ray.algorithms.policy_losses import policy_loss
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import policy_tensors
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks import make_task
from rairl_ray.engines.heads import LogprobModel
from rairl_ray.evaluation.rows import read_rows, write_rows
from rairl_ray.evaluation.summary import summarise
from rairl_ray.metrics import PhaseTimer
from rairl_ray.rewards.reading import TraceReader
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.airl import AirlStrategy
from rairl_ray.trainer.evaluator import Evaluator
from rairl_ray.trainer.loop import policy_batches
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.types import (
    DiscriminatorBatch,
    DiscriminatorSample,
    Prompt,
    RewardedTrace,
    Rollout,
    RolloutGroup,
    UpdateResult,
)

ORDINARY, SPECIAL, EMPTY = range(3)


class Judge:
    """Stands where the discriminator's workers stand; a unit's logit is its place."""

    version = 0

    def update(self, batch: DiscriminatorBatch) -> UpdateResult:
        assert all(len(sample.unit_tokens) for sample in batch.samples)
        return UpdateResult(version=1, metrics={})

    def score(self, samples: list[DiscriminatorSample]) -> tuple[list[np.ndarray], int]:
        assert all(len(sample.unit_tokens) for sample in samples)
        return [np.arange(len(sample.unit_tokens), dtype=np.float32) for sample in samples], 1

    def forget_references(self) -> None:
        """It has none."""


def group_of(renderer: Renderer, prompt: Prompt, *kinds: int) -> RolloutGroup:
    """Truncated samples of the kinds above."""
    user = renderer.tokenizer.convert_tokens_to_ids("<|user|>")
    ids = {
        ORDINARY: tuple(renderer.tokenizer("1+1=2\n2+2=", add_special_tokens=False)["input_ids"]),
        SPECIAL: (user,) * 8,
        EMPTY: (),
    }
    rollouts = [
        Rollout(
            prompt_id=prompt.id, sample_index=index, text=renderer.decode(ids[kind]), token_ids=ids[kind],
            logprobs=(-1.0,) * len(ids[kind]), finish_reason="length", policy_version=0, seed=0,
        )
        for index, kind in enumerate(kinds)
    ]  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def strategy_of(config: RunConfig, one_tokenizer: bool) -> tuple[AirlStrategy, PromptSampler, Renderer]:
    other = character_tokenizer(64)
    other.chat_template += "" if one_tokenizer else " "
    task, renderer = make_task(config.data, 0), Renderer(character_tokenizer(64), "")
    reader = TraceReader(Renderer(other, ""), config.reward.density, renderer.fingerprint)
    sampler, nobody = PromptSampler(task, 0), None
    args: Any = (config, task, sampler, renderer, reader, Judge(), nobody)
    return AirlStrategy(*args), sampler, renderer


def rewards_of(
    strategy: AirlStrategy, groups: list[RolloutGroup], step: int = 1
) -> tuple[list[list[RewardedTrace]], dict[str, float]]:
    """The reward's part of a step."""
    metrics = strategy.learn(groups, step, PhaseTimer())
    rewarded, measured = strategy.score(groups, PhaseTimer())
    return rewarded, metrics | measured


@pytest.mark.parametrize("density", ["sparse", "interval", "partial", "dense"])
@pytest.mark.parametrize("advantage", ["sequence", "discounted", "loo"])
def test_they_teach_the_policy_nothing_and_change_nothing_for_the_others(density: str, advantage: str) -> None:
    config = RunConfig.model_validate({
        "reward": {"density": {"type": density}, "rescore": True}, "advantage": {"type": advantage},
        "rollout": {"engine": "hf"},
    })  # fmt: skip
    strategy, sampler, renderer = strategy_of(config, one_tokenizer=False)
    prompt, alone = sampler.next_prompts(2)
    odd = group_of(renderer, alone, SPECIAL, EMPTY)
    groups = [group_of(renderer, prompt, ORDINARY, SPECIAL, EMPTY, ORDINARY), odd]
    rewarded, metrics = rewards_of(strategy, groups)
    assert metrics[names.REWARD_UNSCORED] == 4
    assert math.isfinite(metrics[names.REWARD_MEAN]) and math.isfinite(metrics[names.REWARD_STD])
    (batch,) = policy_batches(rewarded, config, 1)
    assert [len(sample.advantages) for sample in batch.samples][:4] == [
        len(r.token_ids) for r in groups[0].rollouts
    ]
    for index in (1, 2, 4, 5):
        assert not batch.samples[index].advantages.any()
    pair = rewards_of(strategy, [group_of(renderer, prompt, ORDINARY, ORDINARY)], 2)[0]
    (without,) = policy_batches(pair, config, 1)
    for a, b in zip((batch.samples[0], batch.samples[3]), without.samples, strict=True):
        assert a.advantages.tolist() == b.advantages.tolist()


def test_with_one_tokenizer_special_tokens_have_units_like_any_other_token() -> None:
    strategy, sampler, renderer = strategy_of(RunConfig(), one_tokenizer=True)
    groups = [group_of(renderer, sampler.next_prompts(1)[0], SPECIAL, EMPTY)]
    rewarded, metrics = rewards_of(strategy, groups)
    assert metrics[names.REWARD_UNSCORED] == 1
    assert np.isfinite(rewarded[0][0].token_rewards).all() and len(rewarded[0][0].token_rewards) == 8


@pytest.mark.parametrize("kinds", [(ORDINARY, EMPTY), (EMPTY, EMPTY), (SPECIAL, EMPTY)])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean", "constant"])
def test_the_policys_loss_of_a_batch_with_them_is_finite(kinds: tuple[int, ...], aggregation: str) -> None:
    config = RunConfig.model_validate({"policy": {"aggregation": aggregation}})
    strategy, sampler, renderer = strategy_of(config, one_tokenizer=False)
    rewarded, _ = rewards_of(strategy, [group_of(renderer, sampler.next_prompts(1)[0], *kinds)])
    (batch,) = policy_batches(rewarded, config, 1)
    tensors = policy_tensors(batch.samples, renderer.pad_id)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LogprobModel(LlamaForCausalLM(LlamaConfig(vocab_size=len(renderer.tokenizer), **sizes)))
    logprobs = model(
        tensors.input_ids, tensors.attention_mask, tensors.target_positions, tensors.completion_ids
    )
    loss, _ = policy_loss(
        logprobs, None, tensors.sampling_logprobs, tensors.advantages, tensors.completion_mask, None,
        tensors.expert, config.policy, total_tokens=batch.total_tokens, total_samples=batch.total_samples,
        max_completion_tokens=64,
    )  # fmt: skip
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in gradients)


def test_they_are_evaluated_and_logged(tmp_path: Path) -> None:
    config = RunConfig()
    strategy, sampler, renderer = strategy_of(config, one_tokenizer=False)
    task = make_task(config.data, 0)
    nobody: Any = SimpleNamespace()
    groups = [
        group_of(renderer, p, *kinds)
        for p, kinds in zip(sampler.next_prompts(2), [(ORDINARY, SPECIAL, EMPTY), (EMPTY,) * 3], strict=True)
    ]
    evaluator = Evaluator(config, task, nobody, strategy.scorer)
    rows = evaluator.rows(groups)
    assert [row.score is None for row in rows] == [False, True, True, True, True, True]
    assert math.isnan(evaluator.separation(groups))
    write_rows(tmp_path / "rows.jsonl", rows)
    assert [row.score for row in read_rows(tmp_path / "rows.jsonl")] == [row.score for row in rows]
    summary = summarise(rows, k=[1], resamples=10)
    assert summary[names.EVAL_PASS_AT_1]["value"] == 0.0
    assert math.isfinite(summary[names.EVAL_RERANK_AT_1]["value"])
    _, metrics = rewards_of(strategy, groups[1:])
    folder = RunFolder(tmp_path)
    folder.append_metrics(1, metrics)
    assert json.loads((tmp_path / "metrics.jsonl").read_text())[names.REWARD_UNSCORED] == 3
