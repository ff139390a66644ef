"""GRPO: the official reward against a written-out reference, advantages and loss against TRL's formulas."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rairl_ray.algorithms.advantages import advantages
from rairl_ray.algorithms.policy_losses import policy_loss
from rairl_ray.config.schema import Advantage, Data, Policy, Reward
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.completion_format import TAGS, format_completion
from rairl_ray.data.grading import Grade, extract_answer, grade_answer
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks import make_task
from rairl_ray.data.verifiable_rewards import NAMES, verifiable_rewards
from rairl_ray.metrics import REWARD_MEAN, REWARD_OUTCOME, REWARD_VERIFIABLE, PhaseTimer
from rairl_ray.trainer.grpo import GrpoStrategy
from rairl_ray.types import Rollout, RolloutGroup

GOOD = format_completion("9+9=18", "18")

# completion -> (format count, soft, strict, integer, correctness), worked out by hand for the gold answer 18
COMPLETIONS: list[tuple[str, tuple[float, float, float, float, float]]] = [
    (GOOD, (0.5, 0.5, 0.5, 0.5, 2.0)),
    (format_completion("", "18"), (0.5, 0.5, 0.5, 0.5, 2.0)),
    (format_completion("a\nb\n\nc", "18"), (0.5, 0.5, 0.5, 0.5, 2.0)),
    (format_completion("x", "19"), (0.5, 0.5, 0.5, 0.5, 0.0)),
    (format_completion("x", "-18"), (0.5, 0.5, 0.5, 0.5, 0.0)),
    (format_completion("x", "18.0"), (0.5, 0.5, 0.5, 0.5, 2.0)),
    (format_completion("x", "18 apples"), (0.5, 0.5, 0.5, 0.5, 2.0)),
    (format_completion("x", "1,800"), (0.5, 0.5, 0.5, 0.5, 0.0)),
    (format_completion("x", "18.5"), (0.5, 0.5, 0.5, 0.0, 0.0)),
    (format_completion("x", "1/3"), (0.5, 0.5, 0.5, 0.0, 0.0)),
    (format_completion("x", "18 or 19"), (0.5, 0.5, 0.5, 0.0, 0.0)),
    (format_completion("x", "eighteen"), (0.5, 0.5, 0.5, 0.5, 2.0)),
    (format_completion("x", "very many"), (0.5, 0.5, 0.5, 0.0, 0.0)),
    (format_completion("x", ""), (0.5, 0.5, 0.5, 0.0, 0.0)),
    (GOOD + "\n", (0.499, 0.5, 0.0, 0.5, 2.0)),
    (GOOD + " I am sure.", (0.489, 0.5, 0.0, 0.5, 2.0)),
    ("So:\n" + GOOD, (0.5, 0.5, 0.0, 0.5, 2.0)),
    ("", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("18", (0.0, 0.0, 0.0, 0.0, 0.0)),
    ("it is \\boxed{18}", (0.0, 0.0, 0.0, 0.5, 2.0)),
    ("steps\n#### 18", (0.0, 0.0, 0.0, 0.5, 2.0)),
    ("<think>x</think><answer>18</answer>", (0.0, 0.5, 0.0, 0.5, 2.0)),
    ("<think>\nx</think>\n<answer>18</answer>", (0.125, 0.5, 0.0, 0.5, 2.0)),
    ("<think>\nx\n</think>\n\n<answer>\n18\n</answer>", (0.5, 0.5, 0.0, 0.5, 2.0)),
    ("<think>\nx\n</think> so <answer>\n18\n</answer>", (0.25, 0.0, 0.0, 0.5, 2.0)),
    ("<think>\nx\n</think>\n", (0.25, 0.0, 0.0, 0.0, 0.0)),
    ("<think>\nx\n</think>\n<answer>\n18", (0.375, 0.0, 0.0, 0.0, 0.0)),
    ("\n<answer>\n18\n</answer>", (0.25, 0.0, 0.0, 0.5, 2.0)),
    ("\n<answer>\n18\n</answer>\n</think>\n<think>\n", (0.25 + 0.25 - 0.018, 0.0, 0.0, 0.5, 2.0)),
    (GOOD + "\n" + GOOD, (0.0, 0.5, 0.0, 0.5, 2.0)),
    (GOOD + "\n" + format_completion("y", "19"), (0.0, 0.5, 0.0, 0.0, 0.0)),
    ("<think>\n<think>\nx\n</think>\n<answer>\n18\n</answer>", (0.375, 0.5, 0.0, 0.5, 2.0)),
    ("<think>\nx\n</think>\n<answer>\n18\n</answer>" + "!" * 1000, (-0.5, 0.5, 0.0, 0.5, 2.0)),
    ("<THINK>\nx\n</THINK>\n<answer>\n18\n</answer>", (0.25, 0.0, 0.0, 0.5, 2.0)),
]  # fmt: skip


def reference(text: str, gold: str) -> list[float]:
    """The demo's functions as their description has them, tag by tag, with plain regular expressions."""
    count = 0.0
    for tag in ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"):
        if len(text.split(tag)) == 2:
            count += 0.125
            if tag == "\n</answer>":
                count -= 0.001 * len(text.split(tag)[1])
    soft = re.search(r"<think>.*?</think>\s*<answer>.*?</answer>", text, re.DOTALL)
    strict = re.fullmatch(r"<think>\n(?:.+?\n)?</think>\n<answer>\n.*?\n</answer>", text, re.DOTALL)
    once = all(len(text.split(tag)) == 2 for tag in TAGS)
    verdict = grade_answer(text, gold, "number")
    whole = verdict.answer is not None and verdict.answer.removeprefix("-").isdigit()
    return [count, 0.5 * bool(soft), 0.5 * bool(strict and once), 0.5 * whole, 2.0 * verdict.correct]


def test_there_are_enough_completions() -> None:
    assert len({text for text, _ in COMPLETIONS}) == len(COMPLETIONS) >= 25


@pytest.mark.parametrize(("text", "expected"), COMPLETIONS)
def test_official_reward_by_hand_and_by_reference(text: str, expected: tuple[float, ...]) -> None:
    found = verifiable_rewards(grade_answer(text, "18", "number"), text)
    assert tuple(found) == NAMES
    assert list(found.values()) == pytest.approx(expected, abs=1e-9)
    assert list(found.values()) == pytest.approx(reference(text, "18"), abs=1e-9)


pieces = st.sampled_from(
    [*TAGS, "\n", " ", "18", "x", "<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>"]
)


@given(st.lists(pieces, max_size=14).map("".join))
def test_official_reward_of_any_sequence_of_tags(text: str) -> None:
    found = verifiable_rewards(grade_answer(text, "18", "number"), text)
    assert list(found.values()) == pytest.approx(reference(text, "18"), abs=1e-9)


@pytest.mark.parametrize("piece", [*TAGS, "\n", "<think></think>", "</think><answer>", "</think> \n", "a"])
def test_the_reward_of_a_megabyte_is_linear(piece: str) -> None:
    text = piece * (1_000_000 // len(piece))
    start = time.process_time()
    verifiable_rewards(Grade(False, extract_answer(text), False), text)
    assert time.process_time() - start < 5


# --- the strategy ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "values"), [("correctness", [1.0, 0.0, 0.0]), ("official", [4.0, 2.0, 0.0])])
def test_the_strategy_rewards_every_token_of_a_trace(kind: str, values: list[float]) -> None:
    task = make_task(Data(limit=1, eval_limit=1))
    renderer = Renderer(character_tokenizer(512), "", "auto")
    prompt = task.train[0].prompt
    texts = [format_completion("x", prompt.answer or ""), format_completion("x", "-1"), "no"]
    rollouts = []
    for index, text in enumerate(texts):
        ids = (
            *renderer.tokenizer(text, add_special_tokens=False)["input_ids"],
            renderer.tokenizer.eos_token_id,
        )
        rollouts.append(
            Rollout(prompt_id=prompt.id, sample_index=index, text=text, token_ids=ids, seed=0,
                    logprobs=(-1.0,) * len(ids), finish_reason="stop", policy_version=3)
        )  # fmt: skip
    # clip and temperature are those of learned logits, which the files of R-AIRL runs set
    strategy = GrpoStrategy(task, renderer, Reward(type=kind, clip=(-5.0, 0.0), temperature=2.0))
    groups = [RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))]
    assert strategy.learn(groups, 1, PhaseTimer()) == {}
    [traces], found = strategy.score(groups, PhaseTimer())
    for trace, value in zip(traces, values, strict=True):
        assert set(trace.token_rewards.tolist()) == {value} == {trace.last_unit_reward}
    assert found[REWARD_MEAN] == pytest.approx(sum(values) / 3)
    assert found[REWARD_OUTCOME] == pytest.approx(1 / 3)
    assert found[REWARD_VERIFIABLE.format(name="correctness")] == pytest.approx(2 / 3)
    assert found[REWARD_VERIFIABLE.format(name="strict_format")] == pytest.approx(1 / 3)


# --- TRL's GRPO, from its documentation --------------------------------------------------------------


def trl_loss(
    logps: Tensor, old: Tensor, ref: Tensor, sampling: Tensor, rewards_PG: Tensor, mask: Tensor, kind: str,
    low: float, high: float, beta: float, cap: float, max_length: int,
) -> Tensor:  # fmt: skip
    mean = rewards_PG.mean(dim=1).repeat_interleave(rewards_PG.shape[1])
    std = rewards_PG.std(dim=1).repeat_interleave(rewards_PG.shape[1])
    advantage = ((rewards_PG.view(-1) - mean) / (std + 1e-4)).unsqueeze(1)
    coef_1 = torch.exp(logps - old)
    coef_2 = torch.clamp(coef_1, 1 - low, 1 + high)
    per_token = -torch.min(coef_1 * advantage, coef_2 * advantage)
    per_token = per_token * torch.clamp(torch.exp(old - sampling), max=cap)
    per_token = per_token + beta * (torch.exp(ref - logps) - (ref - logps) - 1)
    if kind == "grpo":
        return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
    if kind == "bnpo":
        return (per_token * mask).sum() / mask.sum().clamp(min=1.0)
    return (per_token * mask).sum() / (per_token.size(0) * max_length)


@pytest.mark.parametrize(
    ("aggregation", "kind"), [("sequence_mean", "grpo"), ("token_mean", "bnpo"), ("constant", "dr_grpo")]
)
@pytest.mark.parametrize("seed", range(5))
def test_from_rewards_to_gradients_as_trl(aggregation: str, kind: str, seed: int) -> None:
    problems, group, width = 4, 6, 9
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(problems * group, width, generator=generator)

    base = -torch.rand(problems * group, width, generator=generator) * 3
    logps = (base + noise(0.3)).requires_grad_()
    old, ref, sampling = base + noise(0.2), base + noise(0.3), base + noise(0.3)
    lengths = torch.randint(1, width + 1, (problems * group,), generator=generator)
    mask = torch.arange(width) < lengths[:, None]
    rewards_PG = torch.randint(0, 9, (problems, group), generator=generator) / 2
    expected = trl_loss(
        logps, old, ref, sampling, rewards_PG, mask.float(), kind, 0.2, 0.28, 0.04, 2.0, max_length=width
    )
    advantages_BT = torch.zeros(problems * group, width)
    for p in range(problems):
        tokens = lengths[p * group : (p + 1) * group].tolist()
        traces = [np.full(n, float(r), dtype=np.float32) for n, r in zip(tokens, rewards_PG[p], strict=True)]
        ours = advantages(traces, rewards_PG[p].numpy(), Advantage(type="sequence"))
        for g, values in enumerate(ours):
            advantages_BT[p * group + g, : len(values)] = torch.from_numpy(values)
    loss, _ = policy_loss(
        logps, old, sampling, advantages_BT, mask, ref, torch.zeros(problems * group, dtype=torch.bool),
        Policy(aggregation=aggregation, clip_low=0.2, clip_high=0.28, kl_coefficient=0.04, tis_cap=2.0),
        total_tokens=int(lengths.sum()), total_samples=problems * group, max_completion_tokens=width,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    (wanted,) = torch.autograd.grad(expected, logps)
    (found,) = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
