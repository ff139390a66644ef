"""Policy learner: ranks that hold the policy under DeepSpeed, and the group that the driver calls."""

from __future__ import annotations

from collections.abc import Sequence
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
from rairl_ray.actors.weight_sync import EngineClient, WeightUpdate, put_update
from rairl_ray.algorithms.policy_losses import mean_metrics, policy_loss
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.transport import adapter_of, weight_transport
from rairl_ray.data.batching import PolicyTensors, policy_tensors
from rairl_ray.keys import key_seed
from rairl_ray.types import PolicyBatch, PolicySample, UpdateResult

MicroBatches = list[list[PolicySample]]

IDLE = PolicySample(
    prompt_ids=(0,), completion_ids=(0,), advantages=np.zeros(1, np.float32), sampling_logprobs=None
)
"""Stands in for a micro-batch without samples: the pass runs, because it may be a collective, and counts 0."""


class PolicyActor(LearnerActor):
    """One rank of the policy."""

    role = "policy"
    _sender: Any = None
    """vLLM's trainer engine, where this learner pushes its weights."""

    def build(self, total_updates: int) -> Any:
        from rairl_ray.engines.deepspeed_engine import DeepSpeedEngine
        from rairl_ray.engines.heads import LogprobModel
        from rairl_ray.engines.models import load_causal_lm

        model = load_causal_lm(
            self.model_path, self.config.model.policy, device=self.device, seed=self.config.seed
        )
        self._model = LogprobModel(model, with_reference=self.config.policy.kl_coefficient > 0)
        self._outgoing()  # refuses an adapter that cannot be merged before anything is trained
        return DeepSpeedEngine(
            self._model,
            self.config.policy,
            self.config.learner,
            total_updates=total_updates,
            device=self.device,
            timeout_seconds=self.config.timeouts.collective_seconds,
            seed=key_seed(self.config.seed, "policy"),
        )

    def update(self, minibatches: list[MicroBatches], totals: list[tuple[int, int]]) -> tuple[dict, dict]:
        """All optimizer updates of one step; returns (metric sums of this rank, engine report of the last).

        Args:
            minibatches: per update, this rank's micro-batches of samples.
            totals: per update, (completion tokens, samples) over all ranks.
        """
        olds = self._old_logprobs(minibatches)
        sums: list[dict[str, float]] = []
        report: dict[str, float] = {}
        for index, (batches, old, (tokens, samples)) in enumerate(zip(minibatches, olds, totals, strict=True)):
            # without old log-probabilities only the first update still sees the weights that were sent
            moved = index > 0 and self.config.policy.tis_cap is None
            unknown = (names.ROLLOUT_LOGPROB_GAP, names.ROLLOUT_GAP_TOKENS) if moved else ()

            def loss(
                item: tuple[list[PolicySample], Any],
                tokens: int = tokens,
                samples: int = samples,
                unknown: Sequence[str] = unknown,
            ) -> Any:
                contribution, metrics = self._loss(item[0], item[1], tokens, samples)
                sums.append({name: float(value) for name, value in metrics.items() if name not in unknown})
                return contribution

            report = self.engine.update(losses_of(list(zip(batches, old, strict=True)), loss))
        self.rest()
        self.version += 1
        return summed(sums), report

    def _old_logprobs(self, minibatches: list[MicroBatches]) -> list[list[Any]]:
        """Log-probabilities before the first update; needed only where a later update sees moved weights."""
        if len(minibatches) == 1 or self.config.policy.tis_cap is None:
            return [[None] * len(batches) for batches in minibatches]
        return [[self._logprobs(part) for part in batches] for batches in minibatches]

    def _loss(self, samples: list[PolicySample], old: Any, tokens: int, count: int) -> tuple[Any, dict]:
        batch = self._tensors(samples)
        logprobs = self.engine(
            batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
            temperature=self._temperature, packing=batch.packing,
        )  # fmt: skip
        reference = None
        if self.config.policy.kl_coefficient > 0:
            reference = self._model.reference_logprobs(
                batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
                temperature=self._temperature, packing=batch.packing,
            )  # fmt: skip
        contribution, metrics = policy_loss(
            logprobs,
            old,
            batch.sampling_logprobs,
            batch.advantages,
            batch.completion_mask,
            reference,
            batch.expert,
            self.config.policy,
            total_tokens=tokens,
            total_samples=count,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
        )
        return (contribution, metrics) if samples else (contribution * 0.0, {})

    @property
    def _temperature(self) -> float:
        """Log-probabilities are those of the sampling distribution; greedy sampling has no gradient anyway."""
        return self.config.rollout.temperature or 1.0

    def _tensors(self, samples: list[PolicySample]) -> PolicyTensors:
        return policy_tensors(samples or [IDLE], self.pad_id, packed=self.packed).to(self.device)

    def _logprobs(self, samples: list[PolicySample], temperature: float | None = None) -> Any:
        batch = self._tensors(samples)
        return self.engine.infer(
            batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
            temperature=temperature or self._temperature, packing=batch.packing,
        )  # fmt: skip

    def logprobs(self, minibatches: list[MicroBatches], temperature: float | None) -> list[np.ndarray]:
        """[T] per sample, in the order of the micro-batches."""
        rows: list[np.ndarray] = []
        for samples in (part for batches in minibatches for part in batches):
            values = self._logprobs(samples, temperature).float().cpu().numpy()
            rows += [values[i, : len(s.completion_ids)].copy() for i, s in enumerate(samples)]
        self.rest()
        return rows

    def weights(self, engines: Sequence[Any]) -> WeightUpdate | None:
        """Send what the rollout engines need; all ranks help to gather it, rank 0 answers.

        Through the object store rank 0 puts it there, chunk by chunk. Over NCCL or CUDA IPC it is in the
        engines when this returns.

        Args:
            engines: handles of the rollout actors, for the control calls of NCCL and IPC.
        """
        from rairl_ray.engines.models import adapter_config

        if weight_transport(self.config, self.device) != "object_store":
            return self._push(engines)
        adapter = adapter_config(self._model) if adapter_of(self.config) == "served" else None
        update = put_update(self.engine.outgoing(self._outgoing()), self.version, adapter)
        return update if self.rank == 0 else None

    def _outgoing(self) -> list[Any]:
        """What a sync sends: the trained weights, or the matrices that a merged adapter changes."""
        from rairl_ray.engines import outgoing

        kind = outgoing.merged if adapter_of(self.config) == "merged" else outgoing.trained
        return kind(self._model)

    def _push(self, engines: Sequence[Any]) -> WeightUpdate | None:
        """Not run: no GPU was available."""
        from rairl_ray.engines.weight_transfer import check_vllm

        if self._sender is None:
            check_vllm()
            from rairl_ray.engines.weight_transfer_vllm import LearnerSource, open_sender

            items, workers = self._outgoing(), self.config.rollout.tensor_parallel
            self._sender = open_sender(
                weight_transport(self.config, self.device),
                LearnerSource(
                    [(item.name, item.dtype, item.shape) for item in items],
                    partial(self.engine.outgoing, items, on_device=True),
                ),
                EngineClient(engines, workers, self.config.timeouts.sync_seconds),
                rank=self.rank,
                address=self.rendezvous(),  # rank 0 is the one that is met
                receivers=len(engines) * workers,
            )
        self._sender.client.version = self.version
        self._sender.send_weights()
        checksum = self._sender.source.digest.hexdigest()
        return WeightUpdate(version=self.version, checksum=checksum, chunks=None) if self.rank == 0 else None

    def export(self, folder: str) -> None:
        """Write final/policy: a Hugging Face folder, or a PEFT adapter folder."""
        from rairl_ray.engines.artifacts import save_policy
        from rairl_ray.engines.weights import whole

        state = whole(self.engine.trainable_state())  # files are written from whole tensors, on rank 0's CPU
        if self.rank == 0:
            save_policy(Path(folder), self._model, state, self.model_path, self.config.model.policy)


class PolicyWorkers(LearnerWorkers):
    """All ranks of the policy as one learner."""

    def __init__(self, processes: Sequence[ActorProcess], config: RunConfig) -> None:
        super().__init__("policy", processes, config)

    def update(self, batches: Sequence[PolicyBatch]) -> UpdateResult:
        """One step: an optimizer update per batch, each with its own global denominators."""
        plans = [self._shard(batch.samples) for batch in batches]
        refs = put_shards([(batch.samples, plan) for batch, plan in zip(batches, plans, strict=True)])
        totals = [(batch.total_tokens, batch.total_samples) for batch in batches]
        answers = self.call(
            "update",
            self.config.timeouts.update_seconds,
            lambda actor, rank: actor.update.remote(refs[rank], totals),
        )
        self.version += 1
        report = answers[0][1]
        return UpdateResult(
            version=self.version,
            metrics={
                **mean_metrics(summed([sums for sums, _ in answers])),
                names.POLICY_GRAD_NORM: report["grad_norm"],
                names.POLICY_LEARNING_RATE: report["learning_rate"],
                names.POLICY_PADDING_SHARE: 0.0 if self.packed else padding_share(plans, batches),
            },
        )

    def logprobs(self, samples: Sequence[PolicySample], temperature: float | None = None) -> list[np.ndarray]:
        """[T] log-probabilities of each sample's completion under the newest policy.

        `temperature` None: that of the rollouts.
        """
        plan = self._shard(samples)
        refs = put_shards([(samples, plan)])
        answers = self.call(
            "logprobs",
            self.config.timeouts.score_seconds,
            lambda actor, rank: actor.logprobs.remote(refs[rank], temperature),
        )
        return gather_rows(plan, answers, len(samples))

    def weights(self, engines: Sequence[ActorProcess]) -> WeightUpdate:
        """The newest weights (or adapter), on their way to these rollout actors; they never pass the driver."""
        deadline = self.config.timeouts.sync_seconds
        handles = [process.handle for process in engines]
        return self.call("weights", deadline, lambda actor, _rank: actor.weights.remote(handles))[0]

    def _shard(self, samples: Sequence[PolicySample]) -> list[list[list[int]]]:
        return shard(samples, len(self), self.config.learner.tokens_per_micro_batch, packed=self.packed)


def padding_share(plans: Sequence[Sequence[Sequence[Sequence[int]]]], batches: Sequence[PolicyBatch]) -> float:
    """Share of padding among all positions that the forward passes of these batches see in padded rows."""
    real = seen = 0
    for batch, plan in zip(batches, plans, strict=True):
        lengths = [_length(sample) for sample in batch.samples]
        for part in (part for share in plan for part in share if part):
            real += sum(lengths[i] for i in part)
            seen += len(part) * max(lengths[i] for i in part)
    return 1.0 - real / seen if seen else 0.0


def _length(sample: PolicySample) -> int:
    return len(sample.prompt_ids) + len(sample.completion_ids)
