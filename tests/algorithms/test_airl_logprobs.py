"""log pi of the `airl` loss: each unit's own tokens, one policy, one distribution, for every kind of trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rairl_ray.algorithms.discriminator_losses import DiscriminatorOutputs, airl
from rairl_ray.config.schema import Density, RunConfig
from rairl_ray.data.batching import discriminator_tensors, policy_tensors
from rairl_ray.data.rendering import Renderer
from rairl_ray.data.tasks import make_task
from rairl_ray.engines.heads import LogprobModel
from rairl_ray.rewards.reading import TraceReader, trace_of
from rairl_ray.trainer.airl import AirlStrategy
from rairl_ray.trainer.discriminator_batch import LabelledTrace, labelled_batch, segment_logprobs
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.types import DiscriminatorBatch, PolicySample, Prompt, Rollout, RolloutGroup, Trace, UpdateResult

SPLIT_CHARACTERS = "3 × 4 = 12 € ✓. Then 12+1=13."
TEMPERATURE = 0.7


def bytes_tokenizer(template: str = "") -> PreTrainedTokenizerFast:
    """Byte-level BPE over ASCII: characters of several bytes are several tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|end|>"]
    )
    backend.train_from_iterator(["plain ascii text only 1 2 3 + ="] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}>" + template,
    )  # fmt: skip


class Policy:
    """The learner's own module in this process; keeps what it was asked."""

    def __init__(self, vocabulary: int) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip
        model = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            model.lm_head.weight.mul_(20)  # far from uniform, so that a missing temperature shows
        self.reference = model
        self.module = LogprobModel(model)

    def logprobs(self, samples: Sequence[PolicySample]) -> list[np.ndarray]:
        batch = policy_tensors(samples, 0)
        with torch.no_grad():
            values = self.module(
                batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
                temperature=TEMPERATURE,
            )  # fmt: skip
        return [row[: len(s.completion_ids)].numpy() for row, s in zip(values, samples, strict=True)]

    def brute_force(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> np.ndarray:
        """[T] from the softmax over the whole vocabulary, one trace at a time, no code of ours."""
        row = torch.tensor([[*prompt_ids, *completion_ids]])
        with torch.no_grad():
            logits = self.reference.lm_head(self.reference.model(row).last_hidden_state)[0]
        distribution = torch.softmax(logits / TEMPERATURE, dim=-1)
        start = len(prompt_ids)
        return np.array([float(distribution[start + t - 1, i].log()) for t, i in enumerate(completion_ids)])


def test_with_one_tokenizer_a_unit_has_its_own_tokens_also_where_they_share_a_character() -> None:
    renderer = Renderer(bytes_tokenizer(), "")
    trace = Trace(prompt=Prompt(id="p", question="q"), text=SPLIT_CHARACTERS)
    for kind in ("dense", "interval", "partial", "sparse"):
        density = Density(type=kind, every=2)
        read = TraceReader(renderer, density, renderer.fingerprint).read(trace)
        ends = read.tokens.char_ends
        assert len(set(ends)) < len(ends), "the text must have tokens that share a character"
        logprobs = -np.arange(1, len(ends) + 1, dtype=np.float32)
        pieces = [range(a, b + 1) for a, b in zip(read.unit_starts, read.unit_tokens, strict=True)]
        expected = [sum(-(t + 1) for t in piece) for piece in pieces]
        assert segment_logprobs(read, ends, logprobs).tolist() == expected


def test_with_two_tokenizers_each_token_counts_once_in_the_unit_whose_characters_it_ends_in() -> None:
    """'so. bc': units end after 'so.' and at the end; the policy reads 'so', '. b', 'c', end."""
    renderer = Renderer(bytes_tokenizer("!"), "")
    reader = TraceReader(renderer, Density(type="partial"), "another tokenizer")
    read = reader.read(Trace(prompt=Prompt(id="p", question="q"), text="so. bc"))
    assert read.unit_char_ends.tolist() == [3, 7] and not read.policy_tokens
    assert segment_logprobs(read, [2, 5, 6, 7], [-1.0, -2.0, -4.0, -8.0]).tolist() == [-1.0, -14.0]
    nothing = reader.read(Trace(prompt=Prompt(id="p", question="q"), text="", finished=False))
    assert segment_logprobs(nothing, [0, 0], [-1.0, -2.0]).tolist() == []


@pytest.mark.parametrize("label", ["trace", "from_edit"])
@pytest.mark.parametrize("density", ["dense", "partial"])
def test_all_traces_get_log_pi_of_one_policy_over_one_distribution(label: str, density: str) -> None:
    """Right and wrong samples (`expert_and_correct`), stale and replayed ones, experts and perturbed copies.

    Samples bring log-probabilities of their own (another version's, renormalised over a nucleus): all nonsense
    here, and nowhere in the batch.
    """
    config = RunConfig.model_validate({
        "discriminator": {
            "loss": {"type": "airl"}, "positives": "expert_and_correct",
            "perturbations": {"count": 2, "label": label}, "replay": {"share": 0.5, "capacity": 8},
        },
        "reward": {"density": {"type": density}},
        "rollout": {"engine": "hf", "top_p": 0.5, "temperature": TEMPERATURE},
    })  # fmt: skip
    task, renderer = make_task(config.data, config.seed), Renderer(bytes_tokenizer(), "")
    policy, notebook = Policy(len(renderer.tokenizer)), Notes()
    reader = TraceReader(renderer, config.reward.density, renderer.fingerprint)
    sampler = PromptSampler(task, config.seed)
    strategy = AirlStrategy(config, task, sampler, renderer, reader, notebook, policy)  # type: ignore[arg-type]
    for epoch in ("first", "second"):
        groups = [group_of(renderer, prompt) for prompt in sampler.next_prompts(2)]
        experts = [sampler.demonstration(group.prompt.id) for group in groups]
        strategy.update(groups, experts, epoch)
        strategy._replay.add([trace_of(group.prompt, r) for group in groups for r in group.rollouts])
    batch = notebook.batches[-1]
    assert sum(sample.positive for sample in batch.samples) > 2, "two experts, and right samples"
    assert len({sample.pair_id for sample in batch.samples}) > 2, "replayed samples have prompts of their own"
    for sample in batch.samples:
        reference = policy.brute_force(sample.prompt_ids, sample.completion_ids)
        pieces = zip(sample.unit_starts, sample.unit_tokens, strict=True)
        expected = [reference[a : b + 1].sum() for a, b in pieces]
        assert sample.policy_logprobs is not None
        np.testing.assert_allclose(sample.policy_logprobs, expected, rtol=1e-4, atol=1e-4)


def test_the_potential_after_the_last_unit_is_zero_for_finished_and_truncated_traces_alike() -> None:
    renderer = Renderer(bytes_tokenizer(), "")
    reader = TraceReader(renderer, Density(type="partial"), renderer.fingerprint)
    prompt = Prompt(id="p", question="q")
    reads = [
        reader.read(Trace(prompt=prompt, text="1+1=2. 2+2=4. So", finished=False)),
        reader.read(Trace(prompt=prompt, text="1+1=2.", finished=True)),
    ]
    labelled = [LabelledTrace(read=read, positive=False, pair_id=0) for read in reads]
    tensors = discriminator_tensors(labelled_batch(labelled, from_edit=False).samples, 0)
    assert tensors.unit_mask.tolist() == [[True, True, True], [True, True, False]]
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    h = torch.tensor([[0.5, 0.25, 2.0], [8.0, 16.0, 99.0]])
    logits = airl(DiscriminatorOutputs(g, h), tensors.unit_mask, torch.zeros(2, 3), gamma=0.5)
    # by hand: g_u + h_{u+1} / 2 - h_u, with nothing behind the last unit
    assert logits[0].tolist() == [1 + 0.125 - 0.5, 2 + 1.0 - 0.25, 3 - 2.0]
    assert logits[1, :2].tolist() == [4 + 8.0 - 8.0, 5 - 16.0]


class Notes:
    """Stands where the discriminator's workers stand and keeps what they are given."""

    def __init__(self) -> None:
        self.batches: list[DiscriminatorBatch] = []

    def update(self, batch: DiscriminatorBatch) -> UpdateResult:
        self.batches.append(batch)
        return UpdateResult(version=1, metrics={})


def group_of(renderer: Renderer, prompt: Prompt) -> RolloutGroup:
    """A right sample, a wrong one and a truncated one, each of another policy version."""
    right = f"<think>\nso ×.\n</think>\n<answer>\n{prompt.answer}\n</answer>"
    texts = [(right, True), (right.replace(str(prompt.answer), "-77"), True), ("<think>\nnever € en", False)]
    rollouts = []
    for index, (text, finished) in enumerate(texts):
        ids = tuple(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += (renderer.eos_id,) if finished else ()
        rollouts.append(
            Rollout(
                prompt_id=prompt.id,
                sample_index=index,
                text=text,
                token_ids=ids,
                logprobs=(9.0,) * len(ids),
                finish_reason="stop" if finished else "length",
                policy_version=-index,
                seed=0,
            )
        )
    return RolloutGroup(prompt=prompt, rollouts=tuple(rollouts))
