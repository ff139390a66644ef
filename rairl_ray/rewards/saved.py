"""A saved reward model with its tokenizer: traces in, unit scores out, in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rairl_ray.config.schema import Density, Model, Reward
from rairl_ray.config.windows import window_of
from rairl_ray.data.batching import discriminator_tensors, shares
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.artifacts import Dtype, system_prompt_of
from rairl_ray.engines.reward_heads import RewardModel
from rairl_ray.rewards.reading import TraceReader, TraceUnits, sample_of
from rairl_ray.types import DiscriminatorSample, Trace, TraceScores


class SavedReward:
    """Scores traces as the discriminator did at the end of its training.

    Args:
        folder: with `reward.json` (rewards.source.reward_folder).
        system_prompt: for a reward model that was saved without its own.
        policy_fingerprint: of the tokenizer whose ids traces bring along; with the reward model's own tokenizer
            they are scored as they are, else their text is.
        tokens_per_micro_batch: tokens in one forward pass.
    """

    def __init__(
        self,
        folder: Path,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        system_prompt: str = "",
        policy_fingerprint: str = "",
        tokens_per_micro_batch: int = 16384,
    ) -> None:
        self._model = RewardModel.load(folder, device=device, dtype=dtype)
        settings = self._model.settings
        renderer = Renderer(
            load_tokenizer(str(folder), Model(), role="discriminator"),
            *system_prompt_of(settings, system_prompt, "auto"),
        )
        density = Density.model_validate(settings.density)
        self._reader = TraceReader(renderer, density, policy_fingerprint)
        self._budget = tokens_per_micro_batch
        window = window_of(json.loads((folder / "config.json").read_text()))
        self._window = None if window is None else window[1]
        self.version = settings.discriminator_version
        self.reward = Reward(density=density, temperature=settings.temperature, clip=settings.clip)
        """How logits become rewards (`algorithms.rewards.unit_rewards`)."""

    def score(self, traces: Sequence[Trace]) -> list[TraceScores]:
        reads = [self._reader.read(trace) for trace in traces]
        refusals = [self._refusal(read) for read in reads]
        good = [read for read, refusal in zip(reads, refusals, strict=True) if not refusal]
        logits = iter(self._logits([sample_of(read) for read in good]))
        none = np.zeros(0, dtype=np.float32)
        return [
            read.scores(none if refusal else next(logits), self.version, refusal)
            for read, refusal in zip(reads, refusals, strict=True)
        ]

    def _logits(self, samples: Sequence[DiscriminatorSample]) -> list[np.ndarray]:
        """[U] of each sample."""
        found: dict[int, np.ndarray] = {}
        pad_id, packed = self._reader.renderer.pad_id, self._model.packs
        for rows in shares(samples, 1, self._budget, packed=packed)[0]:
            values = self._model.score(discriminator_tensors([samples[r] for r in rows], pad_id, packed=packed))
            for row, logits in zip(rows, values.numpy(), strict=True):
                found[row] = logits[: len(samples[row].unit_tokens)].copy()
        return [found[row] for row in range(len(samples))]

    def _refusal(self, read: TraceUnits) -> str:
        tokens = len(read.tokens.prompt_ids) + len(read.tokens.completion_ids)
        if len(read.unit_tokens) == 0:
            return "the completion has no tokens"
        if self._window is not None and tokens > self._window:
            return f"{tokens} tokens are more than the reward model's window of {self._window}"
        return ""
