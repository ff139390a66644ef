"""The 17 defects of the official code (docs/method.md 8), each as a test that fails where ours has it.

The learners' and engines' parts in the step are replaced by a notebook here: what the strategy sends to the
discriminator is looked at, and nothing is learned.
"""

from __future__ import annotations

import ast
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rairl_ray.algorithms.advantages import advantages
from rairl_ray.algorithms.density import backfill, step_ends, unit_starts, unit_tokens
from rairl_ray.algorithms.discriminator_losses import (
    DiscriminatorOutputs,
    Totals,
    discriminator_loss,
    gradient_penalty,
)
from rairl_ray.algorithms.negatives import perturb
from rairl_ray.algorithms.policy_losses import policy_loss
from rairl_ray.config.rules import check
from rairl_ray.config.schema import Advantage, Density, DiscriminatorLoss, Policy, RunConfig
from rairl_ray.data.batching import discriminator_tensors, policy_tensors
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.grading import grade_answer
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks import make_task
from rairl_ray.errors import ConfigError
from rairl_ray.evaluation.passing import random_at_1
from rairl_ray.metrics import PhaseTimer
from rairl_ray.rewards.reading import TraceReader
from rairl_ray.trainer.airl import AirlStrategy
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.types import (
    Demonstration,
    DiscriminatorBatch,
    DiscriminatorSample,
    PolicySample,
    Prompt,
    Rollout,
    RolloutGroup,
    Trace,
    UpdateResult,
)

SYSTEM_PROMPT = "Think first."
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}[{{ m.role }}]\n\n{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)


def word_tokenizer(template: str = CHATML) -> PreTrainedTokenizerFast:
    """A second, different tokenizer: words, numbers and single other characters."""
    words = ["<eos>", "<pad>", "?", *"0123456789+-*/=<>|_[]().,:\n ", "10", "12", "17", "think", "answer"]
    words += ["im", "start", "end", "system", "user", "assistant", "Think", "first", "What", "is"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-zA-Z]+|1[027]|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Notebook:
    """Stands where the discriminator's workers stand and writes down what it is given."""

    def __init__(self) -> None:
        self.version = 0
        self.batches: list[DiscriminatorBatch] = []
        self.scored: list[DiscriminatorSample] = []

    def update(self, batch: DiscriminatorBatch) -> UpdateResult:
        self.batches.append(batch)
        self.version += 1
        return UpdateResult(version=self.version, metrics={})

    def score(self, samples: list[DiscriminatorSample]) -> tuple[list[np.ndarray], int]:
        self.scored += samples
        return [np.zeros(len(sample.unit_tokens), dtype=np.float32) for sample in samples], self.version


def one_step(config: RunConfig, prompts: int = 4, samples: int = 3) -> tuple[Notebook, list[Demonstration]]:
    """One adversarial step on the arithmetic task; sample 0 of each group is cut off at the length limit."""
    task = make_task(config.data, config.seed)
    renderer = Renderer(character_tokenizer(256), SYSTEM_PROMPT)
    reader = TraceReader(renderer, config.reward.density, renderer.fingerprint)
    notebook, sampler = Notebook(), PromptSampler(task, config.seed)
    nobody: Any = None
    strategy = AirlStrategy(config, task, sampler, renderer, reader, notebook, nobody)  # type: ignore[arg-type]
    groups = [
        RolloutGroup(prompt=p, rollouts=tuple(sampled(renderer, p, i, cut=i == 0) for i in range(samples)))
        for p in sampler.next_prompts(prompts)
    ]
    strategy.learn(groups, 1, PhaseTimer())
    strategy.score(groups, PhaseTimer())
    return notebook, [sampler.demonstration(group.prompt.id) for group in groups]


def sampled(renderer: Renderer, prompt: Prompt, index: int, *, cut: bool) -> Rollout:
    text = f"<think>\n1+{index}={1 + index}" + ("" if cut else "\n</think>\n<answer>\n7\n</answer>")
    ids = tuple(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    ids += () if cut else (renderer.eos_id,)
    return Rollout(
        prompt_id=prompt.id, sample_index=index, text=text, token_ids=ids, logprobs=(-0.1,) * len(ids),
        finish_reason="length" if cut else "stop", policy_version=0, seed=0,
    )  # fmt: skip


def airl(**discriminator: object) -> RunConfig:
    return RunConfig.model_validate({"discriminator": discriminator, "rollout": {"engine": "hf"}})


def totals(positive: torch.Tensor, units: int) -> Totals:
    """Every trace has `units` units."""
    ones, zeros = int(positive.sum()), int((~positive).sum())
    return Totals(
        positive_units=ones * units, negative_units=zeros * units,
        positive_traces=ones, negative_traces=zeros, pairs=0,
    )  # fmt: skip


def bce_of(logits: torch.Tensor, positive: torch.Tensor, counts: Totals, **config: Any) -> torch.Tensor:
    mask = torch.ones_like(logits, dtype=torch.bool)
    return discriminator_loss(
        DiscriminatorOutputs(logits), mask, positive, torch.zeros(len(positive)), None, counts,
        DiscriminatorLoss(**config),
    )[0]  # fmt: skip


def test_01_perturbed_negatives_stay_under_their_own_prompt_and_none_is_lost() -> None:
    notebook, experts = one_step(airl(perturbations={"count": 2}))
    renderer = Renderer(character_tokenizer(256), SYSTEM_PROMPT)
    prompt_of = [renderer.prompt_ids(expert.prompt) for expert in experts]
    (batch,) = notebook.batches
    assert len(set(prompt_of)) == 4
    for sample in batch.samples:
        assert sample.prompt_ids == prompt_of[sample.pair_id]
    for pair, expert in enumerate(experts):
        own = [s for s in batch.samples if s.pair_id == pair]
        assert [renderer.decode(s.completion_ids) for s in own if s.positive] == [expert.completion]
        assert len(own) == 1 + 2 + 3, "the expert, both perturbed copies and the policy's three samples"


def test_02_no_perturbation_leaves_the_expert_as_it_was() -> None:
    task = make_task(RunConfig().data, 0)
    for index in range(150):
        expert = task.train[index]
        for kind in ("operator", "numbers", "propagated_error", "answer", "swap_answer"):
            copies, _ = perturb(expert, count=2, kinds=[kind], key=(0, expert.prompt.id, 0))
            for copy in copies:
                assert copy.text != expert.completion
                if kind in ("propagated_error", "answer", "swap_answer"):
                    assert not task.grade(expert.prompt, copy.text).correct


def test_03_class_balance_is_not_an_accident_of_the_split() -> None:
    logits = torch.tensor([[3.0, 1.0], [-1.0, 0.5], [0.2, -2.0], [1.0, 1.0], [-3.0, 0.0]])
    positive = torch.tensor([True, False, False, False, False])
    counts = totals(positive, 2)
    whole = bce_of(logits, positive, counts)
    without_positives = bce_of(logits[1:], positive[1:], counts)
    assert torch.isfinite(without_positives)
    assert float(whole) == pytest.approx(float(bce_of(logits[:1], positive[:1], counts) + without_positives))
    at_zero = torch.zeros_like(logits, requires_grad=True)
    (gradient,) = torch.autograd.grad(bce_of(at_zero, positive, counts, label_smoothing=0.0), at_zero)
    assert float(gradient[0].sum()) == pytest.approx(-float(gradient[1:].sum())), "both halves pull alike"


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_04_the_loss_is_not_scaled_by_the_micro_batch(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator)
    positive = torch.tensor([True, False] * 3)
    counts = totals(positive, 3)
    parts = sum(float(bce_of(logits[i : i + size], positive[i : i + size], counts)) for i in range(0, 6, size))
    assert parts == pytest.approx(float(bce_of(logits, positive, counts)), rel=1e-5)


@pytest.mark.parametrize("updates", [0, 1, 3])
def test_05_updates_per_step_are_updates_in_each_step(updates: int) -> None:
    notebook, _ = one_step(airl(updates_per_policy_step=updates))
    assert len(notebook.batches) == updates
    assert notebook.version == updates


def test_06_training_and_scoring_read_the_same_tokens_to_the_end() -> None:
    notebook, _ = one_step(airl(perturbations={"count": 0}))
    (batch,) = notebook.batches
    trained = [s for s in batch.samples if not s.positive]
    assert [s.completion_ids for s in trained] == [s.completion_ids for s in notebook.scored]
    assert [s.unit_tokens.tolist() for s in trained] == [s.unit_tokens.tolist() for s in notebook.scored]
    renderer = Renderer(character_tokenizer(64), SYSTEM_PROMPT)
    long = "<think>\n" + "1+1=2\n" * 2000 + "</think>\n<answer>\n2\n</answer>"
    tokens = renderer.tokenize(Trace(prompt=Prompt(id="p", question="?"), text=long), same_tokenizer=True)
    assert renderer.decode(tokens.completion_ids) == long, "the answer of a long trace is never cut off"


def test_07_rewards_and_tokens_stay_aligned_under_padding_templates_and_two_tokenizers() -> None:
    policy = Renderer(character_tokenizer(256), SYSTEM_PROMPT)
    prompt = Prompt(id="p", question="What is 3+7=?")
    texts = ["<think>\n3+7=10\n10+2=12\n</think>\n<answer>\n12\n</answer>", "<think>\n3+7=12\n"]
    for template in (CHATML, LLAMA):
        discriminator = Renderer(word_tokenizer(template), SYSTEM_PROMPT)
        samples = []
        for text, finished in zip(texts, (True, False), strict=True):
            trace = Trace(prompt=prompt, text=text, finished=finished)
            theirs = discriminator.tokenize(trace, same_tokenizer=False)
            ours = policy.tokenize(trace, same_tokenizer=True)
            units = unit_tokens(text, theirs.char_ends, Density(type="partial"))
            unit_ends = np.asarray(theirs.char_ends)[units]
            # A unit's reward is its own place in the text, so that a shift by one token would show.
            got = backfill(unit_ends, unit_ends.astype(np.float32), ours.char_ends)
            ends = sorted({*step_ends(text), len(text) + finished})
            for end, value in zip(ours.char_ends, got, strict=True):
                assert value == next(e for e in ends if e >= end)
            samples.append(
                DiscriminatorSample(
                    prompt_ids=theirs.prompt_ids, completion_ids=theirs.completion_ids, unit_tokens=units,
                    unit_starts=unit_starts(units), positive=False, pair_id=0,
                )
            )  # fmt: skip
        batch = discriminator_tensors(samples, discriminator.pad_id)
        for row, sample in enumerate(samples):
            read = batch.input_ids[row, batch.unit_positions[row, batch.unit_mask[row]]]
            assert read.tolist() == [sample.completion_ids[u] for u in sample.unit_tokens]
            real = len(sample.prompt_ids) + len(sample.completion_ids)
            assert batch.attention_mask[row].tolist() == [1] * real + [0] * (batch.input_ids.shape[1] - real)


def test_08_an_advantage_of_exactly_zero_is_data_not_padding() -> None:
    values = advantages(
        [np.array([1.0, 1.0]), np.array([3.0, 3.0]), np.array([2.0, 2.0, 2.0])],
        np.array([1.0, 3.0, 2.0]),
        Advantage(type="sequence"),
    )
    assert values[2].tolist() == [0.0, 0.0, 0.0]
    samples = [
        PolicySample(
            prompt_ids=(1,), completion_ids=(2,) * len(v), advantages=v,
            sampling_logprobs=np.full(len(v), -1.0, dtype=np.float32),
        )
        for v in values
    ]  # fmt: skip
    batch = policy_tensors(samples, 0)
    assert batch.completion_mask.sum(1).tolist() == [2, 2, 3]
    logprobs = torch.full(batch.completion_mask.shape, -1.0, requires_grad=True)
    loss, sums = policy_loss(
        logprobs, None, batch.sampling_logprobs, batch.advantages, batch.completion_mask,
        torch.full_like(logprobs, -2.0), batch.expert, Policy(kl_coefficient=1.0, aggregation="token_mean"),
        total_tokens=7, total_samples=3, max_completion_tokens=8,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert int(sums["policy/tokens"]) == 7
    assert (gradient[2] != 0).all(), "its tokens still feel the KL term"


def test_09_discounting_a_long_trace_does_not_overflow() -> None:
    length, gamma = 5000, 0.9
    config = Advantage(type="discounted", gamma=gamma, normalise=False, scale=False)
    (values,) = advantages([np.ones(length, dtype=np.float32)], np.ones(1), config)
    assert np.isfinite(values).all()
    left = np.arange(length, 0, -1)
    np.testing.assert_allclose(values, (1 - gamma**left) / (1 - gamma), rtol=1e-6)


def test_10_wgan_ignores_label_smoothing_and_is_bounded_by_its_control() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(8, 1, 4, generator=generator)
    positive = torch.tensor([True, False] * 4)
    counts = totals(positive, 1)

    def trained(penalty: float, steps: int = 400) -> float:
        weight = torch.zeros(4, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            x = embeddings.clone().requires_grad_()
            logits = x @ weight
            loss = bce_of(logits, positive, counts, type="wgan")
            mask = torch.ones_like(logits)
            loss = loss + penalty * gradient_penalty(
                logits, x, mask, positive, positive_traces=counts.positive_traces
            )
            loss.backward()
            optimizer.step()
        return float(weight.detach().norm())

    smoothed, plain = (
        bce_of(embeddings[:, :, 0], positive, counts, type="wgan", label_smoothing=eps) for eps in (0.3, 0.0)
    )
    assert torch.equal(smoothed, plain)
    assert trained(0.0, 800) > 1.9 * trained(0.0, 400), "without a control the critic grows for ever"
    gap = embeddings[positive].mean(0) - embeddings[~positive].mean(0)
    assert trained(2.0) == pytest.approx(float(gap.norm()) / 4, rel=1e-3), "the penalty's optimum"
    with pytest.raises(ConfigError, match="unbounded"):
        check(airl(loss={"type": "wgan"}))


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_11_no_header_token_is_a_response_token_under_any_template(template: str) -> None:
    renderer = Renderer(word_tokenizer(template), SYSTEM_PROMPT)
    text = "<think>\n3+7=10\n</think>\n<answer>\n10\n</answer>"
    trace = Trace(prompt=Prompt(id="p", question="What is 3+7=?"), text=text)
    tokens = renderer.tokenize(trace, same_tokenizer=False)
    assert renderer.decode(tokens.completion_ids) == text
    header = "<|im_start|>assistant\n" if template is CHATML else "[assistant]\n\n"
    assert renderer.decode(tokens.prompt_ids).endswith(header), "the whole header belongs to the prompt"
    units = unit_tokens(text, tokens.char_ends, Density(type="dense"))
    assert len(units) == len(tokens.completion_ids)


def test_12_perturbations_know_nothing_of_the_global_random_state() -> None:
    expert = make_task(RunConfig().data, 0).train[0]
    kinds = RunConfig().discriminator.perturbations.kinds
    found = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        before = random.getstate()
        found.append(perturb(expert, count=4, kinds=kinds, key=(0, expert.prompt.id, 0)))
        assert random.getstate() == before
    assert found[0] == found[1]
    assert found[0] != perturb(expert, count=4, kinds=kinds, key=(0, expert.prompt.id, 1))


def test_13_only_finished_traces_end_in_eos_and_experts_have_no_second_one() -> None:
    notebook, _ = one_step(airl(perturbations={"count": 1}))
    eos = Renderer(character_tokenizer(256), SYSTEM_PROMPT).eos_id
    truncated = 0
    for sample in [*notebook.batches[0].samples, *notebook.scored]:
        finished = sample.completion_ids[-1] == eos
        assert sample.completion_ids.count(eos) == int(finished)
        truncated += not finished
        assert finished or not sample.positive
    assert truncated == 4 + 4, "the cut sample of each group, in training and in scoring"


def test_14_the_interval_is_counted_from_the_completion_in_training_and_scoring() -> None:
    config = airl(perturbations={"count": 0}).model_copy(
        update={"reward": RunConfig().reward.model_copy(update={"density": Density(type="interval", every=4)})}
    )
    notebook, _ = one_step(config)
    for sample in [*notebook.batches[0].samples, *notebook.scored]:
        count = len(sample.completion_ids)
        assert sample.unit_tokens.tolist() == [t for t in range(count) if t % 4 == 3 or t == count - 1]
    renderer = Renderer(character_tokenizer(256), SYSTEM_PROMPT)
    reader = TraceReader(renderer, Density(type="interval", every=4), renderer.fingerprint)
    text = "<think>\n1+2=3\n</think>"
    reads = [reader.read(Trace(prompt=Prompt(id="p", question="?" * n), text=text)) for n in range(1, 9)]
    assert len({len(read.tokens.prompt_ids) for read in reads}) == 8
    assert len({tuple(read.unit_tokens) for read in reads}) == 1, "no phase from the prompt's length"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [("18", "18.0"), ("1200", "1,200"), ("5", "$5"), ("5", "5 dollars"), ("-3", "-3.00"), ("0.5", "1/2")],
)
def test_15_answers_match_by_value_not_by_string(gold: str, answer: str) -> None:
    def graded(text: str) -> bool:
        return grade_answer(f"<think>\nx\n</think>\n<answer>\n{text}\n</answer>", gold, "number").correct

    assert graded(answer)
    assert not graded("17")
    assert not graded("-" + gold.lstrip("-") if not gold.startswith("-") else gold[1:])


def test_16_random_reranking_is_an_expectation_not_the_last_sample() -> None:
    correct = np.array([[True, True, False, False], [False, False, False, True]])
    assert random_at_1(correct).tolist() == [0.5, 0.25]
    assert random_at_1(correct[:, ::-1]).tolist() == [0.5, 0.25]


def test_17_model_text_is_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    task = make_task(RunConfig.model_validate({"data": {"task": "countdown"}}).data, 0)
    for attack in (f"__import__('pathlib').Path({str(proof)!r}).touch()", f"open({str(proof)!r}, 'w')"):
        text = f"<think>\nx\n</think>\n<answer>\n{attack}\n</answer>"
        assert not task.grade(task.train[0].prompt, text).correct
        assert not proof.exists()
    root = Path(__file__).resolve().parents[2]
    for file in [root / "launch.py", *(root / "rairl_ray").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, f"{file}:{node.lineno}"
