"""A line map around a policy that reads: log-probability and entropy of every token of given completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rairl_ray.actors.chunks import Line
from rairl_ray.config.schema import Model
from rairl_ray.data.batching import policy_tensors, shares
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.heads import LogprobModel
from rairl_ray.engines.models import load_causal_lm
from rairl_ray.types import PolicySample, Prompt, TokenizedTrace, Trace


class PolicyReadLines:
    """Adds `token_logprobs`, `token_entropies` (nats) and `token_char_ends` [T] to lines; no engine is needed.

    A rollout engine gives log-probabilities alone: the entropy of a token needs its whole distribution.
    """

    def __init__(
        self, policy_path: str, model: Model, device: str, system_prompt: str, system_role: Any, tokens: int
    ) -> None:
        self._renderer = Renderer(load_tokenizer(policy_path, model), system_prompt, system_role)
        self._model = (
            LogprobModel(load_causal_lm(policy_path, model, device=device, trainable=False)).eval().to(device)
        )
        self._device, self._budget = device, tokens

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """One row a line."""
        tokens = [self._renderer.tokenize(_trace(line.values), same_tokenizer=False) for line in lines]
        rows, samples = [dict(line.values) for line in lines], [_sample(trace) for trace in tokens]
        for batch in shares(samples, 1, self._budget, packed=self._model.padded_because is None)[0]:
            values = self._read([samples[index] for index in batch])
            for row, index in enumerate(batch):
                count = len(tokens[index].completion_ids)
                rows[index] |= {
                    "token_logprobs": values[0, row, :count].tolist(),
                    "token_entropies": values[1, row, :count].tolist(),
                    "token_char_ends": list(tokens[index].char_ends),
                }
        return rows

    @torch.no_grad()
    def _read(self, samples: Sequence[PolicySample]) -> np.ndarray:
        """[2, B, T]"""
        packed = self._model.padded_because is None
        batch = policy_tensors(samples, self._renderer.pad_id, packed=packed).to(self._device)
        answer = self._model(
            batch.input_ids,
            batch.attention_mask,
            batch.target_positions,
            batch.completion_ids,
            with_entropy=True,
            packing=batch.packing,
        )
        return np.asarray(answer.float().cpu().numpy())


def _sample(trace: TokenizedTrace) -> PolicySample:
    return PolicySample(
        prompt_ids=trace.prompt_ids,
        completion_ids=trace.completion_ids,
        advantages=np.zeros(len(trace.completion_ids), dtype=np.float32),
        sampling_logprobs=None,
    )


def _trace(values: dict[str, Any]) -> Trace:
    return Trace(
        prompt=Prompt(id="", question=values["prompt"]),
        text=values["generation"],
        finished=values.get("finish_reason") != "length",
    )
