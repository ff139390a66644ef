"""What the policy's and the discriminator's learner ranks share: rendezvous, engine, saving, sharding."""

from __future__ import annotations

import gc
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import ray

from rairl_ray.actors.group import ActorGroup, ActorProcess, RankActor
from rairl_ray.actors.placement import gpu_fractions
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import shares
from rairl_ray.engines.environment import compute_environment, threads_of
from rairl_ray.types import DiscriminatorSample, PolicySample, Written

S = TypeVar("S", PolicySample, DiscriminatorSample)


def learner_environment(
    config: RunConfig, role: Literal["policy", "discriminator"], device: str
) -> Mapping[str, str]:
    """Environment of a learner's process before it imports torch or DeepSpeed."""
    return compute_environment(device, threads_of(config, role))


class LearnerActor(RankActor, ABC):
    """One data-parallel rank with a DeepSpeed engine; subclasses know the loss."""

    role: Literal["policy", "discriminator"]

    def __init__(self, rank: int, config: RunConfig, model_path: str, pad_id: int, device: str) -> None:
        super().__init__(rank)
        self.config = config
        self.model_path = model_path
        self.pad_id = pad_id
        self.device = device
        self.version = 0
        self.packed = False
        """Whether the model reads packed rows (`learner.rows`)."""
        self._engine: Any = None

    def open(self, address: tuple[str, int], world_size: int, total_updates: int) -> str | None:
        """Join the group at rank 0's address, load the model and hand it to DeepSpeed.

        Returns what keeps the model from the packed rows that `learner.rows` asks for.
        """
        from rairl_ray.engines.environment import setup_environment

        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        setup_environment(self.rank, world_size, address[0], address[1], self.device, threads)
        self._limit_memory()
        import rairl_ray.engines.deepspeed_engine  # noqa: F401

        # What is imported stays: DeepSpeed calls the collector of cycles up to six times while it starts.
        gc.freeze()
        self._engine = self.build(total_updates)
        reason = self.padded_because() if self.config.learner.rows == "packed" else None
        self.packed = self.config.learner.rows == "packed" and reason is None
        return reason

    def padded_because(self) -> str | None:
        """Why this role reads padded rows alone; None where it can read packed ones."""
        reason: str | None = self.engine.module.padded_because
        return reason

    def _limit_memory(self) -> None:
        """Hold this process to its role's share of a GPU, so that what torch caches is nobody else's loss.

        Where the engine sleeps, the shares hold for nobody: `rest` gives the cache back instead.
        """
        if self.device != "cuda" or self.config.placement.type != "colocated" or self.config.rollout.sleep:
            return
        import torch

        torch.cuda.set_per_process_memory_fraction(gpu_fractions(self.config)[self.role])

    def rest(self) -> None:
        """After a verb: what torch only caches goes back to the engine that wakes next (`rollout.sleep`)."""
        if self.device == "cuda" and self.config.rollout.sleep:
            import torch

            torch.cuda.empty_cache()

    @abstractmethod
    def build(self, total_updates: int) -> Any:
        """The DeepSpeed engine around this role's module."""

    @abstractmethod
    def export(self, folder: str) -> None:
        """Write the role's final artifact; rank 0 writes, all ranks gather."""

    @property
    def engine(self) -> Any:
        if self._engine is None:
            raise RuntimeError("the learner is not open; call open() first")
        return self._engine

    def save(self, folder: str) -> None:
        """Copy this rank's weights, optimizer, schedule and version, and begin to write them."""
        self.engine.save(Path(folder), {"version": self.version})

    def written(self, wait: bool) -> Written | None:
        """What this rank has written of the last `save`; None while it still writes and `wait` is false."""
        written: Written | None = self.engine.written(wait)
        return written

    def load(self, folder: str) -> int:
        """Restore the shard; returns the version."""
        self.version = int(self.engine.load(Path(folder))["version"])
        return self.version


class LearnerWorkers(ActorGroup):
    """All ranks of one learner."""

    def __init__(self, role: str, processes: Sequence[ActorProcess], config: RunConfig) -> None:
        super().__init__(role, processes)
        self.config = config
        self.version = 0
        self.padded_because: str | None = None
        """What keeps the model from the packed rows that `learner.rows` asks for; known once it is open."""

    @property
    def packed(self) -> bool:
        """Whether the ranks read packed rows."""
        return self.config.learner.rows == "packed" and self.padded_because is None

    def open(self, total_updates: int) -> None:
        """Rank 0 hands out the rendezvous; then all ranks build their engines together."""
        start = self.config.timeouts.start_seconds
        address = self.call("rendezvous", start, lambda actor, _rank: actor.rendezvous.remote(), ranks=1)[0]
        world = len(self)
        reasons = self.call(
            "open", start, lambda actor, _rank: actor.open.remote(address, world, total_updates)
        )
        self.padded_because = reasons[0]

    def save(self, folder: Path) -> None:
        """Copy the state of all ranks and begin to write it below `folder`, which one driver commits later."""
        deadline = self.config.timeouts.checkpoint_seconds
        self.call("save", deadline, lambda actor, _rank: actor.save.remote(str(folder)))

    def written(self, wait: bool) -> Written | None:
        """What all ranks have written of the last `save`; None while one still writes and `wait` is false."""
        deadline = self.config.timeouts.checkpoint_seconds
        reports = self.call("write checkpoint", deadline, lambda actor, _rank: actor.written.remote(wait))
        return None if None in reports else merged(reports)

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, on as many ranks as it was or on others."""
        deadline = self.config.timeouts.checkpoint_seconds
        versions = self.call("load", deadline, lambda actor, _rank: actor.load.remote(str(folder)))
        self.version = versions[0]

    def export(self, folder: Path) -> None:
        """Write the final artifact; rank 0 writes, all ranks gather."""
        deadline = self.config.timeouts.checkpoint_seconds
        self.call("export", deadline, lambda actor, _rank: actor.export.remote(str(folder)))


def merged(reports: Sequence[Written]) -> Written:
    """The reports of all ranks as one: a learner has written its share only where every rank has."""
    names = {part for report in reports for part in report.parts}
    parts = {part: tuple(file for r in reports for file in r.parts.get(part, ())) for part in sorted(names)}
    errors = [report.error for report in reports if report.error is not None]
    return Written(
        files={} if errors else {name: fact for report in reports for name, fact in report.files.items()},
        parts=parts,
        seconds=max(report.seconds for report in reports),
        error="; ".join(errors) or None,
    )


def shard(
    samples: Sequence[S], ranks: int, tokens: int, *, packed: bool, groups: Sequence[int] | None = None
) -> list[list[list[int]]]:
    """rank -> micro-batches -> indexes into `samples`, balanced by tokens.

    All ranks get the same number of micro-batches (short ones are empty), since every forward and backward
    pass may be a collective. Samples of one group (a pair of a pairwise loss) are never separated.
    """
    plans = shares(samples, ranks, tokens, packed=packed, groups=groups)
    count = max(1, *(len(plan) for plan in plans))
    return [plan + [[] for _ in range(count - len(plan))] for plan in plans]


def put_shards(parts: Sequence[tuple[Sequence[S], Sequence[Sequence[Sequence[int]]]]]) -> list[ray.ObjectRef]:
    """One object per rank, so that a rank fetches only its own share.

    Args:
        parts: per optimizer update, its samples and their plan from `shard`.
    """
    ranks = range(len(parts[0][1]))
    return [
        ray.put([[[samples[i] for i in part] for part in plan[rank]] for samples, plan in parts])
        for rank in ranks
    ]


def gather_rows(
    plans: Sequence[Sequence[Sequence[int]]], answers: Sequence[Sequence[Any]], count: int
) -> list[Any]:
    """Per-sample answers of all ranks back in the order of the samples."""
    rows: list[Any] = [None] * count
    for plan, answer in zip(plans, answers, strict=True):
        for index, row in zip([i for part in plan for i in part], answer, strict=True):
            rows[index] = row
    return rows


def summed(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Metric sums over ranks."""
    total: dict[str, float] = {}
    for row in metrics:
        for name, value in row.items():
            total[name] = total.get(name, 0.0) + value
    return total


def losses_of(batches: Sequence[Any], loss: Callable[[Any], Any]) -> list[Callable[[], Any]]:
    """One thunk per micro-batch, for the engine to run in order."""
    return [partial(loss, batch) for batch in batches]
