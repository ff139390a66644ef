"""Which traces and which units an update of the discriminator is made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rairl_ray import metrics as names
from rairl_ray.config.schema import Density, RunConfig
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks import make_task
from rairl_ray.evaluation.rows import EvalRow
from rairl_ray.evaluation.summary import summarise
from rairl_ray.rewards.reading import TraceReader, trace_of
from rairl_ray.trainer.airl import AirlStrategy
from rairl_ray.trainer.discriminator_batch import LabelledTrace, labelled_batch
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.types import Prompt, Rollout, RolloutGroup, Trace

PROMPT = Prompt(id="p", question="1+1=?")
RENDERER = Renderer(character_tokenizer(64), "")


@pytest.mark.parametrize("edit_char", [0, 1, 3, 5])
def test_from_edit_keeps_the_edited_characters_unit_and_drops_the_one_before(
    edit_char: int,
) -> None:
    reader = TraceReader(RENDERER, Density(type="dense"), RENDERER.fingerprint)
    read = reader.read(Trace(prompt=PROMPT, text="1+1=2\n", edit_char=edit_char))
    logprobs = [np.arange(7, dtype=np.float32)]
    (sample,) = labelled_batch([LabelledTrace(read=read, positive=False, pair_id=0)], True, logprobs).samples
    kept = list(range(edit_char, 7))  # one token a character, and the end
    assert sample.unit_tokens.tolist() == sample.unit_starts.tolist() == kept
    assert sample.policy_logprobs is not None and sample.policy_logprobs.tolist() == kept
    whole = labelled_batch([LabelledTrace(read=read, positive=False, pair_id=0)], False).samples[0]
    assert len(whole.unit_tokens) == 7


def group_of(prompt: Prompt, count: int, text: str) -> RolloutGroup:
    rollouts = [
        Rollout(
            prompt_id=prompt.id, sample_index=i, text=f"{text}{i}", token_ids=(6,), logprobs=(-1.0,),
            finish_reason="length", policy_version=0, seed=0,
        )
        for i in range(count)
    ]  # fmt: skip
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))


def strategy_of(**discriminator: object) -> AirlStrategy:
    config = RunConfig.model_validate({"discriminator": discriminator})
    task = make_task(config.data, config.seed)
    reader = TraceReader(RENDERER, config.reward.density, RENDERER.fingerprint)
    nobody: Any = None
    return AirlStrategy(config, task, PromptSampler(task, 0), RENDERER, reader, nobody, nobody)


def test_the_samples_of_a_prompt_that_become_negatives_are_chosen_anew_for_every_prompt_and_update() -> None:
    strategy = strategy_of(negatives_per_prompt=2)
    groups = [group_of(Prompt(id=name, question="q"), 8, name) for name in "abcd"]
    drawn = {
        epoch: [trace.text for trace in strategy._policy_traces(groups, epoch)]
        for epoch in ("1", "2", "3", "4")
    }
    for texts in drawn.values():
        assert [text[0] for text in texts] == list("aabbccdd") and len(set(texts)) == 8
    assert drawn["1"] == [trace.text for trace in strategy._policy_traces(groups, "1")]
    places = {tuple(text[1] for text in texts[i : i + 2]) for texts in drawn.values() for i in range(0, 8, 2)}
    assert len(places) > 8, "neither always the same samples, nor the same ones of every prompt"


def test_a_problem_that_is_drawn_twice_in_a_step_gets_other_perturbed_copies_and_negatives() -> None:
    strategy = strategy_of(perturbations={"count": 3, "kinds": ["numbers"]}, negatives_per_prompt=2)
    row = strategy._task.train[0]
    long = replace(row, completion="<think>\n" + "\n".join(f"{n}+{n}={2 * n}" for n in range(10, 40)))
    groups = [group_of(row.prompt, 8, text) for text in "ab"]

    def texts(times: int) -> list[list[str]]:
        batch, dropped = strategy._batch(groups[:times], [long] * times, "step/1/0")
        experts = [RENDERER.decode(s.completion_ids) for s in batch.samples[: 4 * times]]
        assert dropped == 0 and [s.positive for s in batch.samples[: 4 * times]] == [True, *[False] * 3] * times
        return [experts[i + 1 : i + 4] for i in range(0, 4 * times, 4)]

    first, second = texts(2)
    assert [first] == texts(1), "the first keeps what it had without the second"
    assert not set(first) & set(second) and [first, second] == texts(2)
    picks = [[t.text[1] for t in strategy._policy_traces(groups, f"step/{step}/0")] for step in range(8)]
    assert any(pick[:2] != pick[2:] for pick in picks), "the second group's samples are chosen by themselves"


@pytest.mark.parametrize(("share", "replayed"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_replayed_samples_take_the_places_of_fresh_ones(share: float, replayed: int) -> None:
    strategy = strategy_of(replay={"share": share, "capacity": 50})
    old = group_of(Prompt(id="old", question="q"), 20, "old")
    strategy._replay.add([trace_of(old.prompt, rollout) for rollout in old.rollouts])
    groups = [group_of(Prompt(id=name, question="q"), 4, name) for name in "ab"]
    texts = [trace.text for trace in strategy._policy_traces(groups, "1")]
    assert len(texts) == len(set(texts)) == 8, "as many negatives as without a buffer"
    assert sum(text.startswith("old") for text in texts) == replayed


def test_intervals_of_calibration_are_over_problems_and_not_over_rows() -> None:
    """Ten equal samples of a problem say no more than one: the interval must not shrink."""

    def rows(copies: int) -> list[EvalRow]:
        random = np.random.default_rng(0)
        numbers = [(bool(random.random() < 0.5), float(random.normal())) for _ in range(30)]
        return [
            EvalRow(
                prompt_id=f"p{i}", question="q", generation="g", generation_idx=copy, answer="1",
                correct=correct, extracted="1", format_ok=True, finish_reason="stop", tokens=3,
                policy_version=0, score=score,
            )
            for i, (correct, score) in enumerate(numbers)
            for copy in range(copies)
        ]  # fmt: skip

    once, often = (summarise(rows(copies), resamples=200, key=("k",)) for copies in (1, 10))
    for name in (names.CALIBRATION_AUROC, names.CALIBRATION_BRIER, names.CALIBRATION_ECE):
        assert once[name]["high"] - once[name]["low"] > 0.05
        for side in ("value", "low", "high"):
            assert often[name][side] == pytest.approx(once[name][side]), (name, side)
