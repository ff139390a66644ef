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
from rairl_ray.rewards.reading import ReadTrace, TraceReader, sample_of
from rairl_ray.types import Trace, TraceScores


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

    def score(self, traces: Sequence[Trace]) -> list[TraceScores | str]:
        """Unit logits of each trace, or what stands in the way of scoring it."""
        reads = [self._reader.read(trace) for trace in traces]
        answers: list[TraceScores | str] = [self._refusal(read) or "" for read in reads]
        good = [index for index, refusal in enumerate(answers) if not refusal]
        samples, packed = [sample_of(reads[index]) for index in good], self._model.packs
        for rows in shares(samples, 1, self._budget, packed=packed)[0]:
            tensors = discriminator_tensors(
                [samples[row] for row in rows], self._reader.renderer.pad_id, packed=packed
            )
            for row, logits in zip(rows, self._model.score(tensors).numpy(), strict=True):
                answers[good[row]] = self._scores(reads[good[row]], logits)
        return answers

    def _scores(self, read: ReadTrace, logits: np.ndarray) -> TraceScores:
        return TraceScores(
            logits=logits[: len(read.unit_tokens)].copy(),
            unit_tokens=read.unit_tokens,
            unit_char_ends=read.unit_char_ends,
            discriminator_version=self.version,
        )

    def _refusal(self, read: ReadTrace) -> str:
        tokens = len(read.tokens.prompt_ids) + len(read.tokens.completion_ids)
        if len(read.unit_tokens) == 0:
            return "the completion has no tokens"
        if self._window is not None and tokens > self._window:
            return f"{tokens} tokens are more than the reward model's window of {self._window}"
        return ""
