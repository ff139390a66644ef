"""Rules about names, models, engines and machines. `rules.check` runs them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

from rairl_ray.config.estimate import shape_of
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.config.transport import (
    adapter_of,
    engines_own_gpus,
    learner_beside_every_engine,
)

Problems = Iterator[tuple[str, str]]

BUCKETS = ("s3", "gs", "file")
"""Schemes of an `output_dir` that is no folder of this machine."""
LONGEST_NAME = 200
"""Letters of a part of a name: file systems take 255 bytes, and NAME~1 is the earlier run of the name."""


def names(config: RunConfig) -> Problems:
    parts = config.name.split("/")
    if config.name.startswith("/") or any(part in ("", ".", "..") for part in parts):
        yield (
            "name",
            "must stay below output_dir: words joined by single slashes, without '..' or a leading slash",
        )
    elif not all(all(c.isalnum() or c in "._-=+" for c in part) and part[0] != "-" for part in parts):
        yield "name", "may hold letters, digits and . _ - = + only, and slashes for subfolders"
    elif any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        yield "name", f"is too long for a folder; at most {LONGEST_NAME} letters between slashes"
    if not config.output_dir.strip():
        yield "output_dir", "is empty; name a folder such as runs"
    elif "://" in config.output_dir and (why := bucket_problem(config.output_dir)):
        yield "output_dir", why


def url_problem(url: str) -> str | None:
    """What is malformed in an address; None: nothing."""
    try:
        urlsplit(url).port  # noqa: B018  # raises for what is no number, or no port
    except ValueError as error:
        return f"is no address ({error})"
    return None


def bucket_problem(uri: str) -> str | None:
    """What keeps runs from lying at a URI; None: nothing that can be seen in it."""
    if why := url_problem(uri):
        return f"{why}; write s3://BUCKET/PREFIX"
    parts = urlsplit(uri)
    if parts.scheme not in BUCKETS:
        known = ", ".join(f"{scheme}://" for scheme in BUCKETS)
        return f"{parts.scheme}:// is no known scheme; give a folder or one of {known}"
    if "@" in parts.netloc or any(word in parts.query for word in ("access_key", "secret_key")):
        return (
            "holds a user or key, which would be saved with the run; take it out and set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY instead"
        )
    if parts.scheme != "file" and not parts.netloc:
        return f"names no bucket; write {parts.scheme}://BUCKET/PREFIX"
    return None


def tracking(config: RunConfig) -> Problems:
    uri = config.tracking.uri
    if not config.tracking.experiment.strip():
        yield "tracking.experiment", "is empty; name the MLflow experiment"
    if uri is None or uri in ("none", "databricks", "databricks-uc"):  # MLflow's own words
        return
    if why := url_problem(uri) if uri.startswith("http") else None:
        yield "tracking.uri", f"{why}; write http://HOST:PORT"
        return
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https") and "@" in urlsplit(uri).netloc:
        # The resolved configuration is saved and logged whole.
        yield (
            "tracking.uri",
            "holds a user or password, which would be saved with the run; take it out and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        )
    elif not uri or scheme in ("", "file"):
        yield (
            "tracking.uri",
            "MLflow's file store is gone; write sqlite:///path/mlflow.db, a server's URL, databricks, or none",
        )


def autoscaling(config: RunConfig) -> Problems:
    address = config.cluster.address
    if address not in (None, "auto") and (url_problem(f"//{address}") or not urlsplit(f"//{address}").port):
        yield "cluster.address", "must be HOST:PORT of the cluster's head, or auto"
    if config.cluster.grows_to is not None and address is None:
        yield "cluster.grows_to", "a private cluster does not grow; set cluster.address, or take this key out"


def model_source(config: RunConfig) -> Problems:
    policy = config.model.policy
    if policy.path is None and policy.build is None and config.warm_start is None:
        yield "model.policy.path", "no policy model; set model.policy.path, model.policy.build or warm_start"
    for role in ("policy", "discriminator"):
        model: Model = getattr(config.model, role)
        if model.path is not None and model.build is not None:
            yield f"model.{role}.path", f"contradicts model.{role}.build; set one of the two to null"
        if model.path is not None and not model.path.strip():
            yield f"model.{role}.path", "is empty; write a hub id, a folder, or null"
        if model.revision is not None and model.path is None:
            yield f"model.{role}.revision", f"needs model.{role}.path"


def lora(config: RunConfig) -> Problems:
    for role in ("policy", "discriminator"):
        settings = getattr(config.model, role).lora
        if settings.rank is None and settings.alpha is not None:
            yield f"model.{role}.lora.alpha", f"means nothing without an adapter; set model.{role}.lora.rank"
        if not settings.target_modules:
            yield f"model.{role}.lora.target_modules", "is empty; name modules or write all-linear"
    rank, ranks = config.model.policy.lora.rank, config.rollout.offers.lora_ranks
    served = adapter_of(config) == "served"
    if served and ranks is not None and rank is not None and rank > ranks[-1]:
        yield (
            "model.policy.lora.rank",
            f"{config.rollout.engine} serves adapters up to rank {ranks[-1]}; lower it, or write "
            "rollout.adapter=merged",
        )


def build_shape(config: RunConfig) -> Problems:
    served = config.rollout.offers.cpu_head_sizes if config.placement.device != "gpu" else None
    for role in ("policy", "discriminator"):
        build = getattr(config.model, role).build
        if build is None:
            continue
        key = f"model.{role}.build.hidden_size"
        size, rest = divmod(build.hidden_size, build.heads)
        if rest:
            yield key, f"must be a multiple of model.{role}.build.heads={build.heads}"
        elif size % 2:
            yield (
                key,
                f"gives heads of {size}, and rotary positions need an even size; "
                f"make it {(size + 1) * build.heads}",
            )
        elif role == "policy" and served is not None and size not in served:
            yield (
                key,
                f"gives heads of {size}; {config.rollout.engine} on a CPU serves "
                f"{', '.join(map(str, served))}: change hidden_size or heads={build.heads}, or set "
                "rollout.engine=hf",
            )
        if role == "policy" and build.heads % config.rollout.tensor_parallel:
            yield (
                f"model.{role}.build.heads",
                f"must be a multiple of rollout.tensor_parallel={config.rollout.tensor_parallel}",
            )


def window(config: RunConfig) -> Problems:
    longest = config.data.max_prompt_tokens + config.rollout.max_completion_tokens
    said = (
        f"data.max_prompt_tokens={config.data.max_prompt_tokens} + "
        f"rollout.max_completion_tokens={config.rollout.max_completion_tokens}"
    )
    for role in ("policy", "discriminator"):
        model: Model = getattr(config.model, role)
        shape = shape_of(model)
        if shape is None or shape.max_length is None or longest <= shape.max_length:
            continue
        if model.build is not None:
            yield f"model.{role}.build.max_length", f"is less than {said}; raise it to {longest} or lower those"
        else:
            yield (
                f"model.{role}.path",
                f"has a window of {shape.max_length} tokens, less than {said}; lower those",
            )
    if longest > config.learner.tokens_per_micro_batch:
        yield "learner.tokens_per_micro_batch", f"does not hold one trace of {said}; raise it to {longest}"


def attention(config: RunConfig) -> Problems:
    ours = config.model.discriminator
    penalised = config.discriminator.loss.gradient_penalty > 0
    if penalised and ours.gradient_checkpointing and ours.attention == "sdpa":
        yield (
            "model.discriminator.attention",
            "is recomputed by a kernel without a second derivative, which discriminator.loss.gradient_penalty "
            "needs, under model.discriminator.gradient_checkpointing; write eager",
        )
    for role in ("policy", "discriminator"):
        model: Model = getattr(config.model, role)
        if model.attention != "flash_attention_2":
            continue
        key = f"model.{role}.attention"
        if config.placement.device == "cpu":
            yield key, "needs a GPU; write sdpa"
        if model.dtype == "float32":
            yield key, f"needs model.{role}.dtype=bfloat16; set it or write sdpa"
        if role == "discriminator" and penalised:
            yield key, "has no second derivative for discriminator.loss.gradient_penalty; write eager"


def quantization(config: RunConfig) -> Problems:
    for role in ("policy", "discriminator"):
        model: Model = getattr(config.model, role)
        if model.quantization == "none":
            continue
        key = f"model.{role}.quantization"
        if config.placement.device == "cpu":
            yield key, "needs a GPU; write none"
        if model.lora.rank is None:
            yield key, f"freezes the base, and nothing is left to train; set model.{role}.lora.rank"
        if model.dtype != "bfloat16":
            yield key, f"computes in bfloat16; set model.{role}.dtype=bfloat16"
        if config.learner.zero_stage == 3:
            yield key, "cannot be cut into ZeRO-3's shards; set learner.zero_stage=2"
        if role == "discriminator" and config.discriminator.loss.gradient_penalty > 0:
            yield key, "has no second derivative for discriminator.loss.gradient_penalty; write none"
    if config.model.policy.quantization != "none" and adapter_of(config) == "merged":
        yield (
            "rollout.adapter",
            f"needs the base as published, and model.policy.quantization={config.model.policy.quantization} "
            "leaves the learner 4 bits of it; write served",
        )


def precision(config: RunConfig) -> Problems:
    refuses = config.placement.device == "gpu" and not config.rollout.offers.float32_adapters
    policy = config.model.policy
    if refuses and adapter_of(config) == "served" and policy.dtype == "float32":
        yield (
            "model.policy.dtype",
            f"{config.rollout.engine}'s GPU kernels for adapters (model.policy.lora.rank={policy.lora.rank}) "
            "take bfloat16 alone; write bfloat16, or set rollout.adapter=merged",
        )


def ranks(config: RunConfig) -> Problems:
    """Every rank of a learner must have something to learn from in every optimizer update."""
    prompts, samples = config.trainer.prompts_per_step, config.rollout.samples_per_prompt
    learner, sft = config.learner, not config.algorithm.needs.rollouts
    updates_per_step = config.policy.minibatches_per_step
    traces = prompts if sft else prompts * samples // updates_per_step
    if traces < learner.replicas:
        said = f"trainer.prompts_per_step={prompts}"
        if not sft:
            said += f" x rollout.samples_per_prompt={samples} / policy.minibatches_per_step={updates_per_step}"
        yield "learner.replicas", f"{said} gives {traces} traces an update, fewer than the ranks; lower it"
    if not config.algorithm.needs.discriminator:
        return
    updates = [("the step", prompts * samples, prompts)]
    if config.discriminator.warmup_steps:
        warm = config.discriminator.warmup_prompts_per_step or prompts
        updates.append(("a warm-up update", warm * config.discriminator.warmup_samples_per_prompt, warm))
    replicas = learner.discriminator_ranks
    for what, negatives, own_experts in updates:
        experts = config.discriminator.demonstrations_per_update or own_experts
        total = negatives + experts * (1 + config.discriminator.perturbations.count)
        if total < replicas:
            key = "learner.discriminator_replicas" if learner.discriminator_replicas else "learner.replicas"
            yield (
                key,
                f"{what} gives the discriminator {total} traces, fewer than its {replicas} ranks; lower it",
            )


def zero(config: RunConfig) -> Problems:
    if config.learner.offload == "cpu" and config.learner.zero_stage == 0:
        yield "learner.offload", "needs learner.zero_stage of 1 or more"
    if config.learner.offload == "cpu" and config.placement.device == "cpu":
        yield "learner.offload", "has no GPU to offload from with placement.device=cpu; write none"


def engine(config: RunConfig) -> Problems:
    rollout, device = config.rollout, config.placement.device
    if rollout.sleep and device == "cpu":
        yield "rollout.sleep", "gives back GPU memory, but placement.device=cpu; set it to false"
    if rollout.sleep and not rollout.offers.sleep:
        yield "rollout.sleep", f"is nothing that rollout.engine={rollout.engine} can do; set it to false"
    if rollout.sleep and config.trainer.max_staleness_steps > 0:
        yield (
            "trainer.max_staleness_steps",
            "an engine that samples ahead cannot sleep; set rollout.sleep=false",
        )
    if rollout.sleep and (config.placement.type == "disaggregated" or rollout.tensor_parallel > 1):
        yield "rollout.sleep", "nobody shares the engine's GPU in this placement; set it to false"
    if rollout.tensor_parallel > 1 and not rollout.offers.tensor_parallel:
        yield "rollout.tensor_parallel", f"is nothing that rollout.engine={rollout.engine} can do; set it to 1"
    if rollout.tensor_parallel > 1 and device == "cpu":
        yield (
            "rollout.tensor_parallel",
            "splits a model over GPUs, but placement.device=cpu; use rollout.replicas",
        )
    if rollout.tensor_parallel > config.placement.gpus_per_node:
        yield (
            "rollout.tensor_parallel",
            f"exceeds placement.gpus_per_node={config.placement.gpus_per_node}; one engine stays on one node",
        )


def transport(config: RunConfig) -> Problems:
    key, asked = "rollout.weight_transport", config.rollout.weight_transport
    if asked not in ("nccl", "ipc"):
        return
    if config.placement.device == "cpu":
        yield key, "moves weights between GPUs, but placement.device=cpu; write auto or object_store"
    if not config.rollout.offers.transports:
        yield key, f"is nothing that rollout.engine={config.rollout.engine} can do; write auto or object_store"
    if adapter_of(config) == "served" and config.algorithm.needs.rollouts:
        adapter = config.rollout.adapter
        yield key, f"moves weights, but an adapter travels alone (rollout.adapter={adapter}); write auto"
    if asked == "nccl" and not engines_own_gpus(config):
        yield (
            key,
            "needs engines on GPUs of their own; write ipc, or set placement.type=disaggregated",
        )
    if asked == "ipc" and not learner_beside_every_engine(config):
        yield (
            key,
            "needs a policy rank on every engine's GPU: placement.type=colocated, rollout.tensor_parallel=1 "
            "and no more rollout.replicas than learner.replicas; write nccl or auto",
        )


def pool(config: RunConfig) -> Problems:
    """Replicas that come and go do so between two steps, each by itself."""
    key, rollout = "rollout.replicas", config.rollout
    least, most = rollout.least_replicas, rollout.most_replicas
    if least > most:
        yield key, f"has min above max; write {{min: {most}, max: {least}}}"
    if not rollout.elastic or not config.algorithm.needs.rollouts:
        return
    fixed = f"or write a number such as {most}"
    if config.trainer.max_staleness_steps > 0:
        yield (
            key,
            f"trainer.max_staleness_steps={config.trainer.max_staleness_steps} leaves no moment "
            f"without samples under way, in which a replica could join; set it to 0, {fixed}",
        )
    if rollout.weight_transport in ("nccl", "ipc"):
        yield (
            key,
            f"rollout.weight_transport={rollout.weight_transport} ends with the first replica that leaves; "
            f"write object_store or auto, {fixed}",
        )
    if config.placement.strategy == "STRICT_PACK":
        yield (
            key,
            "a replica that joins may be on any node, but placement.strategy=STRICT_PACK asks for one; write "
            f"PACK, {fixed}",
        )


MACHINE_RULES: tuple[Callable[[RunConfig], Problems], ...] = (
    names,
    tracking,
    autoscaling,
    model_source,
    lora,
    build_shape,
    window,
    attention,
    quantization,
    precision,
    ranks,
    zero,
    engine,
    transport,
    pool,
)
