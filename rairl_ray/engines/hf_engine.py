"""The transformers rollout engine: where there is no vLLM wheel, and as vLLM's independent reference.

A request's tokens come from its own random numbers (drawn from its seed before the loop, one per position),
so its companions' seeds never touch it. A batch's composition does change the padding and with it the last
bits of the logits: outputs repeat exactly for equal (seeds, weights, requests), as with vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils import logging as hf_logging

from rairl_ray.engines.rollout_engine import (
    Decode,
    EngineOptions,
    Generation,
    GenerationRequest,
    SamplingSettings,
    SyncReport,
    SyncState,
    WeightSyncError,
    check_adapter,
    check_completions,
    check_requests,
)
from rairl_ray.engines.weights import Checksum, checksum

LOGITS_PER_PASS = 2**27
"""Largest number of float32 logits (rows x positions x vocabulary) held at once while scoring: 0.5 GiB."""


class HfEngine:
    """See rollout_engine.RolloutEngine for the contract."""

    def __init__(self, options: EngineOptions, decode: Decode) -> None:
        self._options = options
        self._decode = decode
        self._state = SyncState()
        self._asleep = False
        hf_logging.disable_progress_bar()
        self._base: Any = AutoModelForCausalLM.from_pretrained(
            options.model_path,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            dtype=getattr(torch, options.dtype),
        )
        self._base.to(options.device).eval().requires_grad_(False)
        self._stops = sorted({options.eos_id, *options.stop_ids})
        self._adapted: Any = None  # the PEFT model around _base while an adapter is loaded

    @property
    def version(self) -> int | None:
        return self._state.version

    @property
    def checksum(self) -> str | None:
        return self._state.checksum

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        self._state.require()
        check_requests(requests, sampling, self._options)
        self.wake()
        by_length = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt_ids), i))
        generations: dict[int, Generation] = {}
        for start in range(0, len(by_length), self._options.max_sequences):
            indexes = by_length[start : start + self._options.max_sequences]
            batch = self._sample([requests[i] for i in indexes], sampling)
            generations |= zip(indexes, batch, strict=True)
        return [generations[i] for i in range(len(requests))]

    def _sample(self, requests: Sequence[GenerationRequest], sampling: SamplingSettings) -> list[Generation]:
        """One batch, decoded together. B rows are still running; finished ones leave when half are done."""
        device = self._options.device
        uniforms = torch.stack([_uniforms(request.seed, sampling.max_tokens) for request in requests]).to(
            device
        )
        ids_BL, mask_BL = left_padded([request.prompt_ids for request in requests], device)
        rows = torch.arange(len(requests), device=device)  # [B] request of each running row
        alive_B = torch.ones(len(requests), dtype=torch.bool, device=device)
        traces = _Traces(len(requests))
        stops = torch.tensor(self._stops, device=device)
        cache = DynamicCache()
        positions = (mask_BL.cumsum(-1) - 1).clamp(min=0)
        for step in range(sampling.max_tokens):
            logits = self._model(
                input_ids=ids_BL,
                attention_mask=mask_BL,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens_B, logprobs_B = draw(logits, uniforms[rows, step], sampling)
            traces.add(rows, alive_B, tokens_B, logprobs_B)
            alive_B = alive_B & ~torch.isin(tokens_B, stops)
            running = int(alive_B.sum())
            if running == 0:
                break
            ids_BL = tokens_B[:, None]
            positions = positions[:, -1:] + 1
            mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], dim=1)
            if running <= len(rows) // 2:
                kept = alive_B.nonzero()[:, 0]
                cache.batch_select_indices(kept)
                rows, alive_B, ids_BL = rows[kept], alive_B[kept], ids_BL[kept]
                positions, mask_BL = positions[kept], mask_BL[kept]
        return [self._generation(*trace) for trace in traces]

    def _generation(self, ids: list[int], logprobs: list[float]) -> Generation:
        return Generation(
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            text=self._decode(ids),
            finish_reason="stop" if ids[-1] in self._stops else "length",
        )

    @torch.inference_mode()
    def score_tokens(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        self._state.require()
        check_completions(prompt_ids, completion_ids, self._options)
        self.wake()
        sequences = [
            [*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)
        ]
        scores: list[list[float]] = [[] for _ in sequences]
        for indexes in self._scoring_batches([len(sequence) for sequence in sequences]):
            ids_BL, mask_BL = left_padded([sequences[i] for i in indexes], self._options.device)
            positions = (mask_BL.cumsum(-1) - 1).clamp(min=0)
            logits = self._model(input_ids=ids_BL, attention_mask=mask_BL, position_ids=positions).logits
            logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1)
            picked = logprobs.gather(-1, ids_BL[:, 1:, None])[..., 0].cpu()
            for row, index in enumerate(indexes):
                count = len(completion_ids[index])
                scores[index] = picked[row, picked.shape[1] - count :].tolist()
        return scores

    def _scoring_batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Indexes of sequences of similar length, within the budget of logits and of sequences."""
        budget = max(1, LOGITS_PER_PASS // self._base.config.vocab_size)
        batch: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            too_many = len(batch) == self._options.max_sequences
            if batch and (too_many or (len(batch) + 1) * lengths[index] > budget):
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    @property
    def _model(self) -> Any:
        return self._base if self._adapted is None else self._adapted

    def load_weights(self, chunks: Iterable[Mapping[str, Tensor]], version: int) -> SyncReport:
        started = time.perf_counter()
        self.wake()
        self._state.begin()
        self._drop_adapter()
        digest = Checksum()
        absent = set(self._base.state_dict()) - set(self._base.all_tied_weights_keys)
        for chunk in chunks:
            try:
                digest.update(chunk)
                _, unknown = self._base.load_state_dict(chunk, strict=False)
            except (RuntimeError, ValueError) as error:
                raise WeightSyncError(
                    f"policy version {version} does not fit the rollout engine's model: {error}"
                ) from error
            if unknown:
                raise WeightSyncError(
                    f"policy version {version} does not fit the rollout engine's model: "
                    f"unknown {', '.join(unknown[:5])}"
                )
            absent -= set(chunk)
        if absent and not self._options.partial_syncs:
            raise WeightSyncError(
                f"policy version {version} came without the weights of {', '.join(sorted(absent)[:5])}"
            )
        return self._state.finish(digest.hexdigest(), version, started)

    def load_adapter(
        self, tensors: Mapping[str, Tensor], adapter_config: Mapping[str, Any], version: int
    ) -> SyncReport:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        started = time.perf_counter()
        check_adapter(adapter_config, self._options)
        self.wake()
        self._state.begin()
        self._drop_adapter()
        config = LoraConfig.from_peft_type(**{**adapter_config, "inference_mode": True})
        adapted = get_peft_model(self._base, config)
        result = set_peft_model_state_dict(adapted, dict(tensors))
        self._adapted = adapted.eval()
        absent = [name for name in result.missing_keys if "lora_" in name]
        if absent or result.unexpected_keys:
            self._drop_adapter()
            raise WeightSyncError(
                f"adapter of policy version {version}: missing {', '.join(absent[:5]) or 'nothing'}, "
                f"unknown {', '.join(result.unexpected_keys[:5]) or 'nothing'}"
            )
        return self._state.finish(checksum(tensors), version, started)

    def _drop_adapter(self) -> None:
        if self._adapted is not None:
            self._base = self._adapted.unload()
            self._adapted = None

    def mark_synced(self, version: int, checksum: str | None = None) -> None:
        self._state.version, self._state.checksum = version, checksum

    def sleep(self) -> None:
        if self._options.sleep and self._options.device == "cuda":
            self._model.to("cpu")
            torch.cuda.empty_cache()
            self._asleep = True

    def wake(self) -> None:
        if self._asleep:
            self._model.to(self._options.device)
            self._asleep = False

    def close(self) -> None:
        self._state.begin()
        self._base = self._adapted = None


@dataclass
class _Traces:
    """Tokens and log-probabilities of all requests of a batch, as they come."""

    count: int
    steps: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def add(self, rows_B: Tensor, alive_B: Tensor, tokens_B: Tensor, logprobs_B: Tensor) -> None:
        self.steps.append((rows_B[alive_B], tokens_B[alive_B], logprobs_B[alive_B]))

    def __iter__(self) -> Iterator[tuple[list[int], list[float]]]:
        ids: list[list[int]] = [[] for _ in range(self.count)]
        logprobs: list[list[float]] = [[] for _ in range(self.count)]
        for step in self.steps:  # read from the device once, after the loop
            for row, token, logprob in zip(*(tensor.tolist() for tensor in step), strict=True):
                ids[row].append(token)
                logprobs[row].append(logprob)
        return iter(zip(ids, logprobs, strict=True))


def draw(logits: Tensor, uniforms_B: Tensor, sampling: SamplingSettings) -> tuple[Tensor, Tensor]:
    """One token per row of `logits` [B, V] by inverting the distribution at `uniforms_B` [B] in [0, 1).

    Returns tokens [B] and their float32 log-probabilities [B] under the sampled distribution.
    """
    logits = logits.float()
    if sampling.temperature == 0.0:
        tokens_B = logits.argmax(-1)
        return tokens_B, torch.log_softmax(logits, -1).gather(-1, tokens_B[:, None])[:, 0]
    logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        ascending, order = logits.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        outside[:, -1] = False
        logits = logits.masked_fill(outside.scatter(-1, order, outside), -torch.inf)
    logprobs = torch.log_softmax(logits, -1)
    # float64: a float32 running sum over a large vocabulary is too coarse to find rare tokens
    cumulative = logprobs.double().exp().cumsum(-1)
    threshold = uniforms_B[:, None] * cumulative[:, -1:]
    tokens_B = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return tokens_B, logprobs.gather(-1, tokens_B[:, None])[:, 0]


def left_padded(sequences: Sequence[Sequence[int]], device: str) -> tuple[Tensor, Tensor]:
    """[B, L] ids and mask, padded on the left so that all rows end together (the padding id is never read)."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[row, longest - len(sequence) :] = 1
    return ids.to(device), mask.to(device)


def _uniforms(seed: int, count: int) -> Tensor:
    """[count] float64 in [0, 1): made on the CPU, so that a seed means the same on every device."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
