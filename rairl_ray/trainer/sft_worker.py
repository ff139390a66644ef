"""One rank of SFT, run by Ray Train in a process of its own.

Every rank draws the same demonstrations from the same cursor and takes its own share, so no data moves.
The loss is minus the mean log-probability of the expert's completion tokens, over the global number of
tokens: it does not change with micro-batches or ranks.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist

from rairl_ray import metrics as names
from rairl_ray.actors.learner import merged, shard
from rairl_ray.actors.policy import IDLE
from rairl_ray.actors.shared_disk import require_shared
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import policy_tensors
from rairl_ray.data.tasks import make_task
from rairl_ray.errors import UserError
from rairl_ray.keys import key_seed
from rairl_ray.metrics import PhaseTimer
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.prepare import policy_renderer_of, usable_rows
from rairl_ray.trainer.prompt_sampler import PromptSampler
from rairl_ray.trainer.sft_channel import WorkerSide
from rairl_ray.types import PolicySample, Trace, Written


def train_worker(settings: dict[str, Any]) -> None:
    """Entry point for `TorchTrainer`; see `Worker`."""
    context = ray.train.get_context()
    channel = WorkerSide(settings["channel"], settings["config"].timeouts)
    channel.join(context.get_world_rank())
    os.environ["DS_ACCELERATOR"] = "cpu" if settings["device"] == "cpu" else "cuda"
    os.environ["LOCAL_SIZE"] = str(context.get_local_world_size())
    if settings["device"] == "cpu":
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    else:  # Ray Train shows a rank all its node's GPUs; DeepSpeed takes the one that LOCAL_RANK counts
        os.environ["LOCAL_RANK"] = str(ray.train.torch.get_device().index)
    try:
        require_shared(settings["sign"])
        Worker(settings, channel, context.get_world_rank(), context.get_world_size()).run()
    except Exception as error:
        # Ray Train would hand on the traceback alone. A channel that is gone has no use for it either.
        told = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        with suppress(ray.exceptions.RayError):
            channel.send("failed", 0, (context.get_world_rank(), told))
        raise


class Worker:
    """This rank's model, engine and place in the data."""

    def __init__(self, settings: dict[str, Any], channel: WorkerSide, rank: int, world: int) -> None:
        from rairl_ray.engines.deepspeed_engine import DeepSpeedEngine
        from rairl_ray.engines.heads import LogprobModel
        from rairl_ray.engines.models import load_causal_lm

        config: RunConfig = settings["config"]
        self.config, self.rank, self.world, self.settings = config, rank, world, settings
        self.channel = channel
        self._send("phase", 0, "open")
        self.device = "cpu" if settings["device"] == "cpu" else str(ray.train.torch.get_device())
        path, model = settings["policy_path"], config.model.policy
        task = make_task(config.data, config.seed)
        self.renderer = policy_renderer_of(path, task, config)
        self.sampler = PromptSampler(usable_rows(task, self.renderer, config), config.seed)
        self.module = LogprobModel(load_causal_lm(path, model, device=self.device, seed=config.seed))
        self.packed = config.learner.rows == "packed" and self.module.padded_because is None
        if config.learner.rows == "packed" and not self.packed:
            self._send("event", 0, f"policy: {self.module.padded_because}")
        self.engine = DeepSpeedEngine(
            self.module,
            config.policy,
            config.learner,
            total_updates=config.trainer.steps,
            device=self.device,
            timeout_seconds=config.timeouts.collective_seconds,
            seed=key_seed(self.config.seed, "policy"),
        )
        self.folder = RunFolder(settings["folder"])
        self.store = CheckpointStore(
            self.folder.root, config.trainer.keep_checkpoints, warn=lambda text: self._send("event", 0, text)
        )
        self._draft: Any = None
        """Rank 0: the checkpoint that is being written."""
        self._writing: int | None = None
        """Step of the checkpoint that this rank is writing."""

    def run(self) -> None:
        """Train from the newest checkpoint (or the start) to the end or a stop request."""
        self._send("phase", 0, "load")
        step = self._restore()
        self._send("restored", step)
        steps, every = self.config.trainer.steps, self.config.trainer.checkpoint_every
        stopped = False
        while step < steps and not stopped:
            step += 1
            timer = PhaseTimer()
            self._send("phase", step, "update")
            metrics = self._update(timer)
            stopped = self._asked_to_stop()
            with timer.phase(names.TIME_CHECKPOINT):
                self._poll()
                if stopped or step == steps or (every and step % every == 0):
                    self._send("phase", step, "save")
                    self._save(step)
            self._send("update", step, {**metrics, names.POLICY_VERSION: float(step), **timer.finish()})
        self._poll(wait=True)
        if step == steps:
            self._send("phase", step, "export")
            self._export()
            self._send("finished", step)
        self._send("phase", step, "end")
        self.engine.destroy()

    def _update(self, timer: PhaseTimer) -> dict[str, float]:
        samples = self._samples()
        total = sum(len(sample.completion_ids) for sample in samples)
        tokens = self.config.learner.tokens_per_micro_batch
        plan = shard(samples, self.world, tokens, packed=self.packed)[self.rank]
        with timer.phase(names.TIME_POLICY):
            report = self.engine.update([partial(self._loss, samples, part, total) for part in plan])
            loss = torch.tensor([report["loss"]], device=self.device)
            dist.all_reduce(loss)
        return {
            names.POLICY_LOSS: float(loss),
            names.POLICY_GRAD_NORM: report["grad_norm"],
            names.POLICY_LEARNING_RATE: report["learning_rate"],
            names.POLICY_TOKENS: float(total),
        }

    def _samples(self) -> list[PolicySample]:
        samples = []
        for prompt in self.sampler.next_prompts(self.config.trainer.prompts_per_step):
            text = self.sampler.demonstration(prompt.id).completion or ""
            tokens = self.renderer.tokenize(Trace(prompt=prompt, text=text), same_tokenizer=True)
            ids = tokens.completion_ids
            advantages = np.ones(len(ids), dtype=np.float32)
            samples.append(
                PolicySample(
                    prompt_ids=tokens.prompt_ids,
                    completion_ids=ids,
                    advantages=advantages,
                    sampling_logprobs=None,
                )
            )
        return samples

    def _loss(self, samples: list[PolicySample], part: list[int], total: int) -> torch.Tensor:
        rows = [samples[i] for i in part] or [IDLE]
        batch = policy_tensors(rows, self.renderer.pad_id, packed=self.packed).to(self.device)
        logprobs = self.engine(
            batch.input_ids, batch.attention_mask, batch.target_positions, batch.completion_ids,
            packing=batch.packing,
        )  # fmt: skip
        summed = torch.where(batch.completion_mask, logprobs, 0.0).sum()
        return -summed / total if part else summed * 0.0

    def _asked_to_stop(self) -> bool:
        """Rank 0 looks for a stop request and tells the others, so that all leave after the same update."""
        asked = self.rank == 0 and self.channel.asked_to_stop()
        flag = torch.tensor([int(asked)], device=self.device)
        dist.broadcast(flag, src=0)
        return bool(flag)

    def _save(self, step: int) -> None:
        """Copy the state of all ranks and begin to write it."""
        self._poll(wait=True)
        folder: Path | None = None
        if self.rank == 0:
            try:
                self._draft = self.store.begin(
                    step, {"progress": {"step": step}, "cursors": self.sampler.state()}
                )
                folder = self._draft.folder
            except OSError as error:
                self._send("unwritable", step, str(error))
        folder = self._from_rank_0(folder)
        if folder is not None:
            self.engine.save(folder / "policy", {"version": step})
            self._writing = step

    def _poll(self, wait: bool = False) -> None:
        """When all ranks have written, the driver commits, after the rows sent before. All ranks call it."""
        if self._writing is None:
            return
        reports: list[Written | None] = [None] * self.world
        dist.all_gather_object(reports, self.engine.written(wait))
        done = [report for report in reports if report is not None]
        if len(done) == self.world:
            self._send("written", self._writing, (self._draft, merged(done)))
            self._writing = None

    def _from_rank_0(self, path: Path | None) -> Path | None:
        values = [path]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def _restore(self) -> int:
        path = self.store.latest_valid(verified=self.settings["verified"]) if self.rank == 0 else None
        path = self._from_rank_0(path)
        if path is None:
            return 0
        state = self.store.read(path)
        self.engine.load(path / "policy")
        self.sampler.restore(state["cursors"])
        return int(state["progress"]["step"])

    def _export(self) -> None:
        from rairl_ray.engines.artifacts import save_policy
        from rairl_ray.engines.weights import whole

        state = whole(self.engine.trainable_state())
        if self.rank == 0:
            save_policy(
                self.folder.final_policy,
                self.module,
                state,
                self.settings["policy_path"],
                self.config.model.policy,
            )
        dist.barrier()

    def _send(self, kind: str, step: int, content: Any = None) -> None:
        if self.rank == 0:
            self.channel.send(kind, step, content)
