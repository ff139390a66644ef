"""Discriminator learner: ranks that hold the reward model under DeepSpeed, and the group the driver calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rairl_ray import metrics as names
from rairl_ray.actors.group import ActorProcess
from rairl_ray.actors.learner import (
    LearnerActor,
    LearnerWorkers,
    gather_rows,
    losses_of,
    put_shards,
    shard,
    summed,
)
from rairl_ray.algorithms.discriminator_losses import (
    DiscriminatorOutputs,
    Totals,
    discriminator_loss,
    gradient_penalty,
    mean_metrics,
)
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import DiscriminatorTensors, discriminator_tensors
from rairl_ray.keys import key_seed
from rairl_ray.types import DiscriminatorBatch, DiscriminatorSample, UpdateResult

MicroBatches = list[list[DiscriminatorSample]]

IDLE = DiscriminatorSample(
    prompt_ids=(0,),
    completion_ids=(0,),
    unit_tokens=np.zeros(1, np.int64),
    unit_starts=np.zeros(1, np.int64),
    positive=False,
    pair_id=-1,
    reference_logprobs=np.zeros(1, np.float32),
)
"""Stands in for a micro-batch without samples: the pass runs, because it may be a collective, and counts 0."""


class DiscriminatorActor(LearnerActor):
    """One rank of the discriminator, with a scalar or an implicit head."""

    role = "discriminator"

    def build(self, total_updates: int) -> Any:
        from rairl_ray.engines.deepspeed_engine import DeepSpeedEngine

        settings = self.config.discriminator
        self._model = self.module()
        return DeepSpeedEngine(
            self._model,
            settings,
            self.config.learner,
            total_updates=total_updates,
            device=self.device,
            timeout_seconds=self.config.timeouts.collective_seconds,
            seed=key_seed(self.config.seed, "discriminator"),
            weight_clip=settings.loss.weight_clip,
        )

    def module(self) -> Any:
        """The head as training starts; over a saved implicit reward with the reference saved beside it."""
        from rairl_ray.engines.reward_heads import HEADS

        settings = self.config.discriminator
        return HEADS[settings.head].load(
            self.model_path,
            self.config.model.read_discriminator,
            beta=settings.beta,
            potential=settings.loss.needs.potential,
            device=self.device,
            seed=self.config.seed,
        )

    def padded_because(self) -> str | None:
        if self.config.discriminator.loss.gradient_penalty > 0:
            return "discriminator.loss.gradient_penalty asks each trace for its own embeddings: padded rows"
        return super().padded_because()

    def update(self, updates: list[MicroBatches], totals: Totals) -> tuple[dict, dict]:
        """One optimizer update; returns (metric sums of this rank, the engine's report)."""
        sums: list[dict[str, float]] = []

        def loss(samples: list[DiscriminatorSample]) -> Any:
            contribution, metrics = self._loss(samples, totals)
            sums.append({name: float(value) for name, value in metrics.items()})
            return contribution

        report = self.engine.update(losses_of(updates[0], loss))
        self.rest()
        self.version += 1
        return summed(sums), report

    def _loss(self, samples: list[DiscriminatorSample], totals: Totals) -> tuple[Any, dict]:
        config = self.config.discriminator.loss
        batch = self._tensors(samples)
        outputs, penalty = self._outputs(batch, self.engine, totals)
        contribution, metrics = discriminator_loss(
            outputs, batch.unit_mask, batch.positive, batch.pair_id, batch.policy_logprobs, totals, config
        )
        if penalty is not None:
            contribution = contribution + config.gradient_penalty * penalty
            metrics[names.DISCRIMINATOR_PENALTY] = penalty.detach()
        return (contribution, metrics) if samples else (contribution * 0.0, {})

    def _outputs(
        self, batch: DiscriminatorTensors, forward: Any, totals: Totals | None = None
    ) -> tuple[DiscriminatorOutputs, Any]:
        """Unit logits of a micro-batch, and the gradient penalty where training wants it."""
        from rairl_ray.engines.reward_heads import HEADS

        settings, penalty = self.config.discriminator, None
        if totals is not None and settings.loss.gradient_penalty > 0:
            penalty = partial(_penalty, batch.unit_mask, batch.positive, positive_traces=totals.positive_traces)
        read = HEADS[settings.head].read
        return read(forward, batch, potential=settings.loss.needs.potential, penalty=penalty)

    def _tensors(self, samples: list[DiscriminatorSample]) -> DiscriminatorTensors:
        return discriminator_tensors(samples or [IDLE], self.pad_id, packed=self.packed).to(self.device)

    def reference(self, updates: list[MicroBatches]) -> list[np.ndarray]:
        """[T] log-probabilities of each completion under the implicit head's reference, in order."""
        rows: list[np.ndarray] = []
        for samples in updates[0]:
            batch = self._tensors(samples)
            values = self.engine.infer(
                batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
                reference=True, packing=batch.packing,
            ).float().cpu().numpy()  # fmt: skip
            rows += [values[i, : len(s.completion_ids)].copy() for i, s in enumerate(samples)]
        self.rest()
        return rows

    def score(self, updates: list[MicroBatches]) -> list[np.ndarray]:
        """[U] unit logits per sample, in the order of the micro-batches."""
        rows: list[np.ndarray] = []
        for samples in updates[0]:
            outputs, _ = self._outputs(self._tensors(samples), self.engine.infer)
            values = outputs.values.float().cpu().numpy()
            rows += [values[i, : len(s.unit_tokens)].copy() for i, s in enumerate(samples)]
        self.rest()
        return rows

    def export(self, folder: str) -> None:
        """Write final/reward_model: a folder that scores as in training."""
        from rairl_ray.engines.artifacts import save_reward_model
        from rairl_ray.engines.weights import whole

        state = whole(self.engine.trainable_state())
        if self.rank == 0:
            save_reward_model(Path(folder), self._model, state, self.model_path, self.config, self.version)


def _penalty(mask: Any, positive: Any, values: Any, embeddings: Any, *, positive_traces: int) -> Any:
    return gradient_penalty(values, embeddings, mask, positive, positive_traces=positive_traces)


class DiscriminatorWorkers(LearnerWorkers):
    """All ranks of the discriminator as one learner."""

    def __init__(self, processes: Sequence[ActorProcess], config: RunConfig) -> None:
        super().__init__("discriminator", processes, config)
        self._references: dict[tuple[tuple[int, ...], tuple[int, ...]], np.ndarray] = {}
        """Prompt and completion ids -> what the reference says of the completion, for one step's traces."""

    def forget_references(self) -> None:
        """Begin a step: what the reference said before is asked anew, as after a resume.

        Kernels round by batch: a value that outlived its step would not be the resumed run's, bit for bit.
        """
        self._references.clear()

    def _with_references(self, samples: Sequence[DiscriminatorSample]) -> Sequence[DiscriminatorSample]:
        """The samples with what an implicit head's reference says of them, asked once for a trace in a step."""
        if not self.config.discriminator.head_needs.reference:
            return samples
        keys = [(sample.prompt_ids, sample.completion_ids) for sample in samples]
        unknown = {key: s for key, s in zip(keys, samples, strict=True) if key not in self._references}
        if unknown:
            asked = list(unknown.values())
            answers = self._read("reference", asked, lambda actor, shares: actor.reference.remote(shares))
            self._references |= dict(zip(unknown, answers, strict=True))
        return [
            replace(sample, reference_logprobs=self._references[key])
            for key, sample in zip(keys, samples, strict=True)
        ]

    def update(self, batch: DiscriminatorBatch) -> UpdateResult:
        """One optimizer update on labelled traces, with global denominators."""
        # A pairwise loss needs all traces of a prompt in one micro-batch; the others balance better without.
        groups = None
        if self.config.discriminator.loss.needs.pairs:
            groups = [sample.pair_id for sample in batch.samples]
        samples = self._with_references(batch.samples)
        refs = put_shards([(samples, self._shard(samples, groups))])
        totals = Totals.of_batch(batch)
        answers = self.call(
            "update",
            self.config.timeouts.update_seconds,
            lambda actor, rank: actor.update.remote(refs[rank], totals),
        )
        self.version += 1
        sums = summed([sums for sums, _ in answers])
        metrics = {
            **mean_metrics(sums),
            names.DISCRIMINATOR_GRAD_NORM: answers[0][1]["grad_norm"],
            names.DISCRIMINATOR_LEARNING_RATE: answers[0][1]["learning_rate"],
        }
        if names.DISCRIMINATOR_PENALTY in sums:
            metrics[names.DISCRIMINATOR_PENALTY] = sums[names.DISCRIMINATOR_PENALTY]
        return UpdateResult(version=self.version, metrics=metrics)

    def score(self, samples: Sequence[DiscriminatorSample]) -> tuple[list[np.ndarray], int]:
        """[U] logits per sample in the given order, and the version of the discriminator that gave them."""
        if not samples:
            return [], self.version
        samples = self._with_references(samples)
        logits = self._read("score", samples, lambda actor, shares: actor.score.remote(shares))
        return logits, self.version

    def _read(
        self, phase: str, samples: Sequence[DiscriminatorSample], verb: Callable[[Any, Any], Any]
    ) -> list[np.ndarray]:
        """One row of numbers a sample, in the given order, from a pass without an update."""
        plan = self._shard(samples, None)
        refs = put_shards([(samples, plan)])
        answers = self.call(
            phase, self.config.timeouts.score_seconds, lambda actor, rank: verb(actor, refs[rank])
        )
        return gather_rows(plan, answers, len(samples))

    def _shard(
        self, samples: Sequence[DiscriminatorSample], groups: Sequence[int] | None
    ) -> list[list[list[int]]]:
        tokens = self.config.learner.tokens_per_micro_batch
        return shard(samples, len(self), tokens, packed=self.packed, groups=groups)
