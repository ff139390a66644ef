"""Every configuration key, its type, its bounds and its meaning: pydantic models, frozen, no extras.

A variant is a ``type``, never a boolean. Units stand in the names. Rules across sections are in
``rules.py``; YAML, ``base:``, overrides and suggestions are in ``load.py``.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rairl_ray.config import variants
from rairl_ray.config.machine_schema import (
    Cluster,
    Eval,
    Learner,
    Placement,
    Rollout,
    Timeouts,
    Tracking,
    Trainer,
)
from rairl_ray.config.section import (
    ERROR_KINDS,
    ActorFile,
    BelowOne,
    ErrorKind,
    FilePath,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    Section,
)

# --- what runs -----------------------------------------------------------------------------------


class Algorithm(Section):
    type: Literal["airl", "grpo", "sft"] = "airl"

    @property
    def needs(self) -> variants.AlgorithmNeeds:
        return variants.ALGORITHMS[self.type]


class Lora(Section):
    rank: PositiveInt | None = None
    """None trains all weights."""
    alpha: PositiveFloat | None = None
    """None means 2 * rank, as in the paper."""
    dropout: BelowOne = 0.0
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"


class Build(Section):
    """A small model made from a config and a character tokenizer, for runs without any download."""

    architecture: Literal["llama", "qwen3"] = "llama"
    hidden_size: PositiveInt = 128
    layers: PositiveInt = 4
    heads: PositiveInt = 4
    intermediate_size: PositiveInt = 384
    max_length: PositiveInt = 256


class Model(Section):
    path: FilePath | None = None
    """Hub id or local folder; None: the model of `build` (policy), or the policy's (discriminator). For the
    discriminator also a saved reward (docs/transfer.md): a run, its final/reward_model or a copy of that."""
    build: Build | None = None
    revision: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` (a GPU, LoRA): the learner holds the frozen base in 4 bits (QLoRA, arXiv 2305.14314). Rollouts and
    final artifacts join the adapter with the base as published: they differ from the learner by quantisation
    error, which `rollout/logprob_gap` shows and policy.tis_cap corrects for."""
    lora: Lora = Lora()
    gradient_checkpointing: bool = False
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    export: Literal["adapter", "merged"] = "adapter"
    """What LoRA leaves in final/policy: a PEFT adapter folder, or base and adapter merged."""
    chat_template: ActorFile | None = None
    """File with a Jinja chat template, for a tokenizer that ships none."""
    trust_remote_code: bool = False


class Models(Section):
    policy: Model = Model()
    discriminator: Model = Model()

    @property
    def read_discriminator(self) -> Model:
        """The discriminator's section, with what says how the policy's files are read where it has none."""
        own, policy = self.discriminator, self.policy
        if own.path is not None or own.build is not None:
            return own
        return own.model_copy(
            update={
                "revision": policy.revision,
                "chat_template": own.chat_template or policy.chat_template,
                "trust_remote_code": own.trust_remote_code or policy.trust_remote_code,
            }
        )


# --- data ----------------------------------------------------------------------------------------


class Arithmetic(Section):
    """Difficulty of the generated `arithmetic` task."""

    operands_min: Annotated[int, Field(ge=2)] = 4
    operands_max: Annotated[int, Field(ge=2)] = 4
    """Numbers in a problem; a problem with n numbers has n - 1 steps."""
    digits: PositiveInt = 1
    """Largest number of digits of an operand."""
    operators: tuple[Literal["+", "-", "*"], ...] = ("+",)


class Countdown(Section):
    """Difficulty of the generated `countdown` task."""

    numbers: Annotated[int, Field(ge=2, le=8)] = 4
    largest: PositiveInt = 99


class Fields(Section):
    """Column names, dotted for nested ones. The defaults are those of `jsonl`; a data set of the hub has its
    own, and these take their place where they are changed, or where only they are in a row."""

    prompt: str = "prompt"
    demonstration: str | None = "target"
    answer: str | None = "answer"
    id: str | None = None


class Data(Section):
    task: str = "arithmetic"
    path: FilePath | None = None
    """Folder or file (jsonl, json, parquet, csv) or hub id; None: the task's own hub id or generator. A single
    file is split (one in ten held out); of a task for evaluation only (aime, math500) it is all held out."""
    config_name: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    demonstrations: FilePath | None = None
    """File of expert chains of thought that replace the task's own, matched by `fields.id` or prompt."""
    expert_error_rate: Fraction = 0.0
    """Share of the training demonstrations that are made wrong on purpose by a perturbation: the same examples
    in every run, and those of a lower rate among them."""
    fields: Fields = Fields()
    grader: Literal["number", "math", "text", "choice"] = "math"
    """How `jsonl` answers are compared."""
    limit: PositiveInt | None = None
    """Use only the first n training problems (after the keyed permutation's base order)."""
    eval_limit: PositiveInt | None = 256
    on_bad_row: Literal["fail", "skip"] = "fail"
    system_prompt: str | None = None
    """None: the task's own."""
    system_role: Literal["auto", "system", "user"] = "auto"
    """Where the system prompt goes; auto asks the chat template."""
    max_prompt_tokens: PositiveInt = 300
    arithmetic: Arithmetic = Arithmetic()
    countdown: Countdown = Countdown()


# --- reward and discriminator --------------------------------------------------------------------


class Density(Section):
    type: Literal["sparse", "interval", "partial", "dense"] = "partial"
    every: PositiveInt = 15
    """Only for `interval`: a unit ends at every n-th completion token."""

    @property
    def needs(self) -> variants.DensityNeeds:
        return variants.DENSITIES[self.type]


class Reward(Section):
    type: Literal["discriminator", "correctness", "official"] = "discriminator"
    """`correctness` is the task's own grade; `official` adds rewards for the format (docs/method.md 4), 4
    in all. Where no file or override names it, `load.py` sets what the algorithm needs: `correctness` for
    grpo, else `discriminator`."""
    density: Density = Density()
    temperature: PositiveFloat = 1.0
    clip: tuple[float, float] | None = None
    """(lower, upper) bound of a unit's reward, after the temperature."""
    outcome_weight: NonNegativeFloat = 0.0
    """What a right trace gets on top of every unit's reward, so of its mean; 0 learns from experts alone."""
    rescore: bool = False
    """Score samples on arrival too, before the discriminator learns from them, and log how rewards drifted."""


class DiscriminatorLoss(Section):
    type: Literal["bce", "wgan", "bradley_terry", "airl"] = "bce"
    level: Literal["unit", "trace"] = "unit"
    """`trace`: one logit a trace, the sum of its units (implicit head only)."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.1
    gradient_penalty: NonNegativeFloat = 0.0
    """R1 penalty on the input embeddings (scalar head); `wgan` needs this, weight_clip or drift_penalty."""
    drift_penalty: NonNegativeFloat = 0.0
    """`wgan`: coefficient of the mean squared logit (arXiv 1710.10196), which bounds either head."""
    weight_clip: PositiveFloat | None = None
    """`wgan`: clamp of the trained weights after each update."""
    gamma: Fraction = 1.0
    """Discount of the shaping term of the `airl` loss."""

    @property
    def needs(self) -> variants.LossNeeds:
        return variants.LOSSES[self.type]


class Perturbations(Section):
    count: NonNegativeInt = 1
    """Perturbed copies of each expert trace that serve as hard negatives."""
    label: Literal["trace", "from_edit"] = "from_edit"
    kinds: tuple[ErrorKind, ...] = ERROR_KINDS


class Replay(Section):
    capacity: NonNegativeInt = 0
    """Past policy traces kept as negatives; 0 switches replay off."""
    share: Fraction = 0.0
    """Share of the negatives of an update that come from the buffer."""


class Optimizer(Section):
    learning_rate: PositiveFloat = 1e-5
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.99)
    weight_decay: NonNegativeFloat = 0.1
    max_grad_norm: PositiveFloat = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: Fraction = 0.1
    """Share of all updates in which the learning rate rises from zero."""


class Discriminator(Optimizer):
    head: Literal["scalar", "implicit"] = "scalar"
    beta: PositiveFloat = 0.5
    """Implicit head: f_t = beta * (log pi_phi - log pi_ref)."""
    loss: DiscriminatorLoss = DiscriminatorLoss()
    positives: Literal["expert", "expert_and_correct"] = "expert"
    perturbations: Perturbations = Perturbations()
    replay: Replay = Replay()
    negatives_per_prompt: PositiveInt | None = None
    """Policy samples of each prompt that an update takes as negatives (keyed choice); None: all of them."""
    updates_per_policy_step: NonNegativeInt = 1
    """Optimizer updates of the discriminator in each step; 0 freezes it."""
    demonstrations_per_update: PositiveInt | None = None
    """Expert traces in an update; None: those of the step's own prompts. `bradley_terry` needs None."""
    warmup_steps: NonNegativeInt = 0
    """Discriminator updates against the frozen policy before the first policy step (at least)."""
    warmup_gate_auroc: Fraction | None = None
    """Hold the policy until the AUROC on held-out right/wrong samples reaches this."""
    warmup_max_steps: NonNegativeInt | None = None
    """Give up waiting for the gate after so many updates (then warn and go on); None: 4 * warmup_steps."""
    warmup_pool_prompts: PositiveInt | None = None
    """Draw the warm-up's policy samples once, for so many prompts; None: fresh samples every update."""
    warmup_samples_per_prompt: PositiveInt = 1
    warmup_prompts_per_step: PositiveInt | None = None
    """Prompts (each with its expert trace) in one warm-up update; None: trainer.prompts_per_step."""

    @property
    def head_needs(self) -> variants.HeadNeeds:
        return variants.HEADS[self.head]


class Advantage(Section):
    type: Literal["sequence", "discounted", "loo"] = "sequence"
    gamma: Fraction = 0.9
    """Discount of `discounted` and `loo`; 0 keeps each token's own term (as in the official code)."""
    normalise: bool = True
    """Subtract the group's mean."""
    scale: bool = True
    """Divide by the group's standard deviation."""
    expert: Literal["none", "single", "balanced"] = "none"
    """Expert traces in the group: none, one, or as many as samples."""

    @property
    def needs(self) -> variants.AdvantageNeeds:
        return variants.ADVANTAGES[self.type]

    def expert_copies(self, samples: int) -> int:
        """Expert traces in a group of `samples`."""
        return {"none": 0, "single": 1, "balanced": samples}[self.expert]


class Policy(Optimizer):
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.2
    aggregation: Literal["sequence_mean", "token_mean", "constant"] = "sequence_mean"
    kl_coefficient: NonNegativeFloat = 0.0
    tis_cap: PositiveFloat | None = 2.0
    """Truncated importance sampling of the rollout engine's log-probabilities; None: plain ratios to them."""
    minibatches_per_step: PositiveInt = 1
    """Optimizer updates over one step's samples."""


class RunConfig(Section):
    """One run. `config/load.py` makes it from YAML and overrides."""

    name: str = "run"
    """Run folder below `output_dir`; slashes make subfolders."""
    seed: NonNegativeInt = 0
    output_dir: FilePath = "runs"
    """A folder, or of `train` also s3://BUCKET/PREFIX, gs://... or file:///... (docs/storage.md)."""
    warm_start: str | None = None
    """An SFT experiment file, trained first where its final policy does not exist yet; its policy is ours."""
    algorithm: Algorithm = Algorithm()
    model: Models = Models()
    data: Data = Data()
    reward: Reward = Reward()
    discriminator: Discriminator = Discriminator()
    advantage: Advantage = Advantage()
    policy: Policy = Policy()
    rollout: Rollout = Rollout()
    learner: Learner = Learner()
    trainer: Trainer = Trainer()
    eval: Eval = Eval()
    placement: Placement = Placement()
    cluster: Cluster = Cluster()
    timeouts: Timeouts = Timeouts()
    tracking: Tracking = Tracking()


variants.complete("rairl_ray.config.variants.ALGORITHMS", variants.ALGORITHMS, Algorithm, "type")
variants.complete("rairl_ray.config.variants.ENGINES", variants.ENGINES, Rollout, "engine")
variants.complete("rairl_ray.config.variants.DENSITIES", variants.DENSITIES, Density, "type")
variants.complete("rairl_ray.config.variants.LOSSES", variants.LOSSES, DiscriminatorLoss, "type")
variants.complete("rairl_ray.config.variants.HEADS", variants.HEADS, Discriminator, "head")
variants.complete("rairl_ray.config.variants.ADVANTAGES", variants.ADVANTAGES, Advantage, "type")
variants.complete("rairl_ray.config.variants.ERRORS", variants.ERRORS, Perturbations, "kinds")
