"""What an implicit head's reference says of a trace is asked once a step, for updates and scores."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rairl_ray.actors import discriminator
from rairl_ray.actors.discriminator import DiscriminatorActor, DiscriminatorWorkers
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import discriminator_tensors
from rairl_ray.engines.heads import ImplicitModel
from rairl_ray.types import DiscriminatorBatch, DiscriminatorSample


def sample(prompt: int, *completion: int) -> DiscriminatorSample:
    ends = np.arange(len(completion))
    return DiscriminatorSample(
        prompt_ids=(prompt, prompt + 1),
        completion_ids=completion,
        unit_tokens=ends,
        unit_starts=ends,
        positive=completion[0] == 1,
        pair_id=prompt,
    )


class Engine:
    """The module in this process; notes the traces whose reference it is asked for."""

    def __init__(self, module: ImplicitModel) -> None:
        self.module = module
        self.asked: list[int] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def infer(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("reference"):
            self.asked.append(len(args[0]))
        return self.module(*args, **kwargs)

    def update(self, losses: list[Any]) -> dict[str, float]:
        for loss in losses:
            loss().backward()
        return {"grad_norm": 0.0, "learning_rate": 0.0, "loss": 0.0}


class Group(DiscriminatorWorkers):
    """One rank in this process."""

    def call(self, phase: str, deadline: float, verb: Any, ranks: int | None = None) -> list[Any]:
        verbs = ("update", "score", "reference")
        actor = SimpleNamespace(**{n: SimpleNamespace(remote=getattr(self.actor, n)) for n in verbs})
        return [verb(actor, 0)]

    def __len__(self) -> int:
        return 1


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(
        discriminator,
        "put_shards",
        lambda parts: [[[[samples[i] for i in part] for part in plan[0]] for samples, plan in parts]],
    )
    config = RunConfig.model_validate(
        {"discriminator": {"head": "implicit", "beta": 0.5}, "learner": {"tokens_per_micro_batch": 12}}
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, attn_implementation="sdpa"))
    module = ImplicitModel(model, 0.5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    found = Group([], config)
    found.actor = DiscriminatorActor(0, config, "nowhere", 0, "cpu")  # type: ignore[attr-defined]
    found.actor._engine, found.actor.packed = Engine(module), True  # type: ignore[attr-defined]
    return found


EXPERT, COPY, DRAWN, OTHER = sample(1, 1, 5, 6), sample(1, 2, 5, 7), sample(1, 3, 8), sample(9, 4, 4, 4, 4)


def batch(*samples: DiscriminatorSample) -> DiscriminatorBatch:
    units = [sum(len(s.unit_tokens) for s in samples if s.positive is side) for side in (True, False)]
    traces = [sum(s.positive is side for s in samples) for side in (True, False)]
    return DiscriminatorBatch(
        samples=samples, positive_units=units[0], negative_units=units[1], positive_traces=traces[0],
        negative_traces=traces[1], pairs=0,
    )  # fmt: skip


def test_each_trace_is_asked_once_a_step(group: Any) -> None:
    asked = group.actor.engine.asked
    group.update(batch(EXPERT, COPY, DRAWN, EXPERT))
    assert sum(asked) == 3
    group.update(batch(EXPERT, DRAWN))
    group.score([DRAWN, OTHER])
    assert sum(asked) == 4
    group.forget_references()
    group.score([DRAWN])
    assert sum(asked) == 5


def test_values_and_gradients_are_those_of_a_reference_asked_on_the_spot(group: Any) -> None:
    samples, module = [EXPERT, COPY, DRAWN, OTHER], group.actor.engine.module
    found, _ = group.score(samples)
    rows = discriminator_tensors(samples, 0)
    assert rows.reference_logprobs is None
    values = module(rows.input_ids, rows.attention_mask, rows.target_positions, rows.completion_ids)
    for row, each in enumerate(samples):
        assert found[row] == pytest.approx(values[row, : len(each.completion_ids)].tolist(), abs=1e-5)
    assert max(abs(logits).max() for logits in found) > 0.1

    group.update(batch(*samples))
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    group._with_references = lambda samples: samples
    group.update(batch(*samples))
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)
