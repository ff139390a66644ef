"""Sections about machines: engines, learners, the trainer's own course, placement, deadlines, tracking.

`schema.py` has the method's sections and puts all of them together.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt

from rairl_ray.config import variants
from rairl_ray.config.labels import plain
from rairl_ray.config.section import ERROR_KINDS, ErrorKind, Fraction, NonNegativeFloat, NonNegativeInt, Section


class ReplicaBounds(Section):
    """Bounds of a number of replicas that follows the cluster: more as nodes come, fewer as they go."""

    min: PositiveInt
    """A run starts with so many, and is rebuilt where fewer are left."""
    max: PositiveInt


class Rollout(Section):
    engine: Literal["vllm", "hf"] = "vllm"
    replicas: PositiveInt | ReplicaBounds = 1
    """Engines that share the sampling, a fixed number or `{min: 1, max: 4}`. Samples do not depend on it."""
    tensor_parallel: PositiveInt = 1
    samples_per_prompt: PositiveInt = 8
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_completion_tokens: PositiveInt = 256
    memory_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """GPU: share of the device for vLLM."""
    cpu_cache_gib: PositiveFloat = 1.0
    """CPU: size of vLLM's key-value cache."""
    max_sequences: PositiveInt = 256
    """Sequences decoded at once by one replica."""
    prefix_caching: bool = True
    sleep: bool = False
    """GPU, colocated: give the engine's memory back while the learners work."""
    adapter: Literal["auto", "merged", "served"] = "auto"
    """How a LoRA policy gets into the engines. `merged`: a sync sends the matrices that the adapter changes,
    with it added to the stored base, and the engine serves plain weights. `served`: the adapter travels alone
    (far fewer bytes) and the engine computes it beside every token. auto: merged, served for a 4-bit base."""
    weight_transport: Literal["auto", "object_store", "nccl", "ipc"] = "auto"
    """How weights reach the engines; auto: `ipc` where they share GPUs with the policy learner, `nccl` where
    they have GPUs of their own, else `object_store`. Served adapters and pools always use the object store."""
    sync_check_every: NonNegativeInt | None = None
    """After the first sync and every n-th one, compare learner and engines on a few fixed traces; 0: never.
    None: 50 where each step's own samples are compared too (trainer/sync_check.py), else 1."""
    max_sync_logprob_gap: PositiveFloat | None = None
    """Largest mean |difference| a token in these comparisons; None: 0.001 in float32, 0.1 in bfloat16."""

    @property
    def offers(self) -> variants.EngineOffers:
        return variants.ENGINES[self.engine]

    @property
    def least_replicas(self) -> int:
        """Replicas that a run cannot do without."""
        return self.replicas.min if isinstance(self.replicas, ReplicaBounds) else self.replicas

    @property
    def most_replicas(self) -> int:
        """Replicas that it may have at once."""
        return self.replicas.max if isinstance(self.replicas, ReplicaBounds) else self.replicas

    @property
    def elastic(self) -> bool:
        """Whether replicas come and go while it runs."""
        return self.least_replicas < self.most_replicas


class Learner(Section):
    """Both learners; ZeRO stage 0-3 with `replicas` data-parallel ranks each."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    replicas: PositiveInt = 1
    """Ranks of the policy learner."""
    discriminator_replicas: PositiveInt | None = None
    """Ranks of the discriminator learner; None: as `replicas`."""
    tokens_per_micro_batch: PositiveInt = 16384
    """Tokens in one forward pass of one rank: those of packed rows, or rows x longest row of padded ones."""
    rows: Literal["packed", "padded"] = "packed"
    """`packed`: traces end to end without padding, and what they begin with alike (a prompt) once. `padded`:
    one row a trace. Models that cannot read packed rows read padded ones and say so. The losses are the same;
    under `lora.dropout` other values are dropped, and a shared prompt's are the same for all its traces."""
    offload: Literal["none", "cpu"] = "none"

    @property
    def discriminator_ranks(self) -> int:
        """Ranks of the discriminator learner: its own number, or the policy's."""
        return self.discriminator_replicas or self.replicas


class Trainer(Section):
    steps: PositiveInt = 100
    """Policy steps (SFT: optimizer updates)."""
    prompts_per_step: PositiveInt = 16
    """Prompts in one step over all ranks (SFT: demonstrations)."""
    checkpoint_every: NonNegativeInt = 50
    """0: only after the warm-up, at the end, and where the run stops or moves."""
    keep_checkpoints: PositiveInt = 2
    max_staleness_steps: NonNegativeInt = 0
    """Policy versions that rollouts may be old: so many steps are sampled ahead of the learners; 0: none."""
    log_rollouts_every: NonNegativeInt = 10
    """Write a sample of rollouts to the run folder every n steps; 0: never."""
    max_restarts_per_role: NonNegativeInt = 1
    """Rebuilds from the newest checkpoint that the failures of ONE role may cost; each role has its own budget.
    Errors of the user are never retried."""
    retry_backoff_seconds: NonNegativeFloat = 2.0
    """Pause before the first rebuild; it doubles with every further one, up to five minutes."""


class Eval(Section):
    every: NonNegativeInt = 0
    """Evaluate every n policy steps; 0: only at the end."""
    at_start: bool = False
    at_end: bool = True
    prompts: PositiveInt = 256
    samples_per_prompt: PositiveInt = 8
    k: tuple[PositiveInt, ...] = (1,)
    temperature: NonNegativeFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    selector: Literal["mean", "sum", "last", "min", "discounted", "tail"] = "mean"
    """How a trace's unit rewards become the one number that reranks it."""
    discount: Fraction = 0.95
    """`discounted`: weight of a unit against the one before it, in a weighted mean."""
    tail_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """`tail`: mean over this last share of the units (at least one)."""
    localisation_traces: NonNegativeInt = 256
    """Held-out expert traces with one injected error, for localisation."""
    localisation_kinds: tuple[ErrorKind, ...] = ERROR_KINDS
    """Kinds of these errors: not training's (`discriminator.perturbations.kinds`), so that runs which perturb
    otherwise, or nothing, are compared on the same errors."""
    localisation_readout: Literal["largest_drop", "argmin", "threshold"] = "largest_drop"
    """`localise`: how the values of a trace's steps name its first wrong step."""
    localisation_threshold: float | None = None
    """A trace is called right unless its largest drop exceeds this (`argmin`, `threshold`: unless a value is
    below it); None: a step of every trace is named."""
    localisation_hit_tokens: tuple[NonNegativeInt, ...] = (15,)
    """Hit@1: how many tokens from an injected error still count."""
    mode: Literal["generate", "aime", "pregenerated_policy", "pregenerated_policy_and_reward"] = "generate"
    """`evaluate`: sample the policy; the same on AIME's problems; read the completions of `input` and add the
    policy's log-probabilities; read completions with their rewards."""
    input: str | None = None
    """Pregenerated modes: JSONL file with `prompt` or `question`, `generation`, `generation_idx`, `answer`."""
    reward: str | None = None
    """`evaluate`: run folder, reward-model folder or hub id whose reward scores; None: the run's own; "none":
    nothing scores."""
    name: str | None = None
    """`evaluate`, `localise`: folder below evaluations/; None: the mode (`localisation`), and the name of
    `input`."""
    bootstrap: PositiveInt = 1000


Selector = Annotated[str, AfterValidator(plain)]


class Labels(Section):
    """Which nodes a role may be on: label -> selector as Ray reads it (`spot`, `!spot`, `in(A100, H100)`,
    `!in(A100, H100)`); all must hold. A bundle that roles share is placed by the labels of all of them."""

    rollout: dict[str, Selector] = Field(default_factory=dict)
    policy: dict[str, Selector] = Field(default_factory=dict)
    discriminator: dict[str, Selector] = Field(default_factory=dict)
    """Of a run that has one."""

    def of(self, role: str) -> dict[str, str]:
        """The labels that a role asks for."""
        return {"rollout": self.rollout, "policy": self.policy, "discriminator": self.discriminator}[role]


class Placement(Section):
    type: Literal["colocated", "disaggregated"] = "colocated"
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cpus_per_actor: PositiveFloat = 0.5
    threads_per_actor: PositiveInt | None = None
    """Compute threads of an actor on a CPU; None: all cores of the machine."""
    rollout_gpu_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    policy_gpu_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    discriminator_gpu_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    gpus_per_node: PositiveInt = 8
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "SPREAD_ROLLOUTS"] = "PACK"
    """Of all bundles of the run: on few nodes, on many, or on one. SPREAD_ROLLOUTS: a learner's ranks on one
    node (on GPUs: on one for each `gpus_per_node` of them), the engines on many."""
    labels: Labels = Labels()
    """Nodes that a role may be on, e.g. `{policy: {market: on-demand}, rollout: {market: spot}}`."""


class Workers(Section):
    """What an autoscaling cluster may grow to: workers of one size, whether they are there yet or not."""

    nodes: PositiveInt
    cpus: PositiveFloat
    """CPUs of each node."""
    gpus: NonNegativeInt = 0
    """GPUs of each node."""


class Cluster(Section):
    address: str | None = None
    """HOST:PORT of a head, or "auto" for the cluster that runs here; None starts a private one."""
    grows_to: Workers | None = None
    """Autoscaling: the run is placed on these, and waits `timeouts.placement_seconds` until they are there."""


class Timeouts(Section):
    """Deadlines in seconds; no wait is without one. A call's clock starts when its actor can run it."""

    placement_seconds: PositiveFloat = 300
    start_seconds: PositiveFloat = 600
    rollout_seconds: PositiveFloat = 1800
    update_seconds: PositiveFloat = 1800
    score_seconds: PositiveFloat = 1800
    sync_seconds: PositiveFloat = 600
    checkpoint_seconds: PositiveFloat = 1800
    probe_seconds: PositiveFloat = 30
    """How long a failure looks at the processes on their nodes, to name the culprit."""
    teardown_seconds: PositiveFloat = 60
    """Ending all actors of a run, and each polite request before."""

    @property
    def collective_seconds(self) -> float:
        """For collectives inside the ranks: never shorter than the phase that they belong to."""
        return max(
            self.start_seconds,
            self.update_seconds,
            self.score_seconds,
            self.sync_seconds,
            self.checkpoint_seconds,
        )


class Tracking(Section):
    uri: str | None = None
    """MLflow tracking URI; None: sqlite in the output folder; "none" switches MLflow off."""
    experiment: str = "rairl"
    tags: dict[str, str] = Field(default_factory=dict)
    log_artifacts: bool = True
    flush_seconds: NonNegativeFloat = 30
    """How long the end of a run waits for what is not sent yet; the rest stays in the run folder and is sent by
    `--resume` or by the next run in the same output folder. Training itself never waits for MLflow."""
