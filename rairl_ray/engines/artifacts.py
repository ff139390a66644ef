"""Final artifacts: ordinary Hugging Face and PEFT folders, and the reward model that reproduces its scores.

`state` is always what `DeepSpeedEngine.trainable_state` gave on rank 0: all weights under Hugging Face names,
or the adapter (and a scalar head) under PEFT names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rairl_ray.algorithms.warmup import frozen
from rairl_ray.config.load import config_hash
from rairl_ray.config.schema import Model, RunConfig
from rairl_ray.config.variants import HEADS
from rairl_ray.data.rendering import load_tokenizer
from rairl_ray.data.tasks import task_rules
from rairl_ray.engines.adapters import save_model
from rairl_ray.engines.models import DTYPES, adapter_config, load_causal_lm, load_token_classifier
from rairl_ray.engines.origin import Origin, commit_of
from rairl_ray.engines.sources import atomic_folder
from rairl_ray.engines.weights import checksum
from rairl_ray.errors import ModelError
from rairl_ray.files import REWARD_FILE

REFERENCE_FOLDER = "reference"
REFERENCE_FIELDS = ("reference", "reference_checksum", "reference_revision")
"""Fields of RewardSettings that say what an implicit head is compared with."""

Dtype = Literal["float32", "bfloat16"]
SystemRole = Literal["auto", "system", "user"]


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """`reward.json`: what is needed, beside the weights, to score as in training."""

    head: str
    beta: float
    """Only for the implicit head."""
    loss: str
    level: str
    density: dict[str, Any]
    """Section `reward.density`: which tokens end a unit."""
    temperature: float
    clip: tuple[float, float] | None
    reference: str | None
    """Implicit head: hub id, or `reference` for the subfolder that holds a copy of a local model."""
    reference_checksum: str | None
    """`weights.checksum` of the reference's state dict."""
    reference_revision: str | None
    dtype: str
    """Of the saved weights, and of training."""
    discriminator_version: int
    config_hash: str
    system_prompt: str | None = None
    """What stood before every question in training; "" for nothing, None where it was not recorded."""
    system_role: SystemRole = "auto"


def save_policy(
    folder: Path,
    module: nn.Module,
    state: Mapping[str, Tensor],
    base: str,
    model: Model,
) -> None:
    """Write the policy as an HF folder, or for LoRA as a PEFT adapter folder (unless `export: merged`).

    `base` is the path that the module was loaded from. The tokenizer and `origin.json` are saved beside the
    weights.
    """
    model = _as_loaded(module, model)
    tokenizer = load_tokenizer(base, model)
    origin = Origin.of(base, model, tokenizer)
    with atomic_folder(folder) as temporary:
        if model.lora.rank is not None and model.export == "adapter":
            # Where the base lies, wherever the adapter is used from; a hub id with its commit.
            place = {"base_model_name_or_path": origin.base, "revision": origin.revision}
            config = {**adapter_config(module), **place}
            (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
            tensors = {name: tensor.contiguous() for name, tensor in state.items()}
            save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        else:
            save_model(_restored(load_causal_lm(base, _quiet(model)), state), temporary)
        tokenizer.save_pretrained(temporary)
        origin.write(temporary)


def save_reward_model(
    folder: Path, module: nn.Module, state: Mapping[str, Tensor], base: str, config: RunConfig, version: int
) -> None:
    """Write the reward model with merged weights, its tokenizer, `reward.json` and `origin.json`.

    A scalar head becomes a token classifier with one label (of an `airl` head the reward g alone is kept); an
    implicit head becomes a causal language model beside its reference, which is named by hub id, or copied
    into `reference/` where it is a local folder, so that the artifact does not depend on a cache. Where `base`
    is itself a saved reward, its reference stays the reference.
    """
    model = _as_loaded(module, config.model.read_discriminator)
    head = config.discriminator.head_needs
    start = read_settings(Path(base))
    with atomic_folder(folder) as temporary:
        reference: dict[str, str | None] = dict.fromkeys(REFERENCE_FIELDS)
        if head.reference:
            reference = _save_reference(temporary, base, _quiet(model))
        if head.own_output:
            outputs = next(tensor.shape[0] for name, tensor in state.items() if name.endswith("score.weight"))
            merged = _restored(load_token_classifier(base, _quiet(model), outputs=outputs), state)
            _keep_reward(merged)
        else:
            merged = _restored(load_causal_lm(base, _quiet(model)), state)
        save_model(merged, temporary)
        tokenizer = load_tokenizer(base, model)
        tokenizer.save_pretrained(temporary)
        Origin.of(base, model, tokenizer).write(temporary)
        loss = config.discriminator.loss
        # A frozen reward keeps the loss that made it, and a saved one goes on to read questions as it did.
        made = start if start is not None and frozen(config.discriminator) else None
        prompt, role = system_prompt_of(start, task_rules(config.data).system_prompt, config.data.system_role)
        settings = RewardSettings(
            head=config.discriminator.head,
            beta=config.discriminator.beta,
            loss=loss.type if made is None else made.loss,
            level=loss.level if made is None else made.level,
            density=config.reward.density.model_dump(),
            temperature=config.reward.temperature,
            clip=config.reward.clip,
            **reference,
            dtype=model.dtype,
            discriminator_version=version,
            config_hash=config_hash(config),
            system_prompt=prompt,
            system_role=role,
        )
        (temporary / REWARD_FILE).write_text(json.dumps(asdict(settings), indent=2, sort_keys=True))


def read_settings(folder: Path) -> RewardSettings | None:
    """What `reward.json` in `folder` says; None where there is none: no saved reward.

    Raises:
        ModelError: the file cannot be understood.
    """
    file = folder / REWARD_FILE
    if not file.is_file():
        return None
    try:
        fields = json.loads(file.read_text())
        settings = RewardSettings(**{**fields, "clip": fields["clip"] and tuple(fields["clip"])})
        if settings.head not in HEADS:
            raise ValueError(f"head={settings.head}: unknown")
        return settings
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{file}: not the file of a saved reward ({error}); restore it") from None


def system_prompt_of(settings: RewardSettings | None, prompt: str, role: SystemRole) -> tuple[str, SystemRole]:
    """(system prompt, its role) that a reward reads questions with: the saved one's own, else those given."""
    if settings is None:
        return prompt, role
    return (prompt if settings.system_prompt is None else settings.system_prompt), settings.system_role


def reference_path(folder: Path, settings: RewardSettings) -> str:
    """Where the reference of the implicit reward in `folder` is: the copy beside it, or a hub id."""
    name = settings.reference or ""
    return str(folder / name) if name == REFERENCE_FOLDER else name


def saved_reference(path: str, dtype: Dtype) -> Any | None:
    """The frozen reference of the implicit reward saved at `path`; None where no such reward is.

    Raises:
        ModelError: it has other weights than `reward.json` says.
    """
    settings = read_settings(Path(path))
    if settings is None or not HEADS[settings.head].reference:
        return None
    model = Model.model_validate({"dtype": settings.dtype, "revision": settings.reference_revision})
    reference = load_causal_lm(reference_path(Path(path), settings), model, trainable=False)
    if checksum(reference.state_dict()) != settings.reference_checksum:
        raise ModelError(
            f"{Path(path) / REWARD_FILE}: reference={settings.reference} has other weights than in training; "
            "restore that model"
        )
    return reference.to(DTYPES[dtype])


def _save_reference(target: Path, base: str, model: Model) -> dict[str, str | None]:
    """REFERENCE_FIELDS of an implicit head that began as `base`; what is no hub model is copied to `target`."""
    saved = read_settings(Path(base))
    reference = saved_reference(base, model.dtype)
    if saved is None or reference is None:
        name, revision, local = base, commit_of(base, model.revision), Path(base).is_dir()
        reference = load_causal_lm(base, model, trainable=False)
    else:
        name, revision = saved.reference or "", saved.reference_revision
        local = name == REFERENCE_FOLDER or saved.dtype != model.dtype
    if local:
        name, revision = REFERENCE_FOLDER, None
        save_model(reference, target / REFERENCE_FOLDER)
    return dict(zip(REFERENCE_FIELDS, (name, checksum(reference.state_dict()), revision), strict=True))


def _as_loaded(module: nn.Module, model: Model) -> Model:
    """The model section with the commit that was loaded from the hub: a branch may have moved on since."""
    commit = getattr(module.wrapped, "loaded_commit", None)
    return model.model_copy(update={"revision": commit}) if commit else model


def _quiet(model: Model) -> Model:
    """The model section without what only training needs: adapters are merged into the base as published."""
    plain = {"gradient_checkpointing": False, "quantization": "none", "attention": "sdpa"}
    return model.model_copy(update=plain)


def _restored(fresh: Any, state: Mapping[str, Tensor]) -> Any:
    """The plain Hugging Face model with the trained weights in it; adapters are merged."""
    if hasattr(fresh, "peft_config"):
        from peft import set_peft_model_state_dict

        result = set_peft_model_state_dict(fresh, dict(state))
        unknown = result.unexpected_keys
        missing = [key for key in result.missing_keys if "lora_" in key]
        fresh = fresh.merge_and_unload()
    else:
        missing, unknown = fresh.load_state_dict(dict(state), strict=False)
        missing = [key for key in missing if key not in (fresh._tied_weights_keys or ())]
    if missing or unknown:
        raise RuntimeError(
            f"trained weights do not fit the model: missing {missing[:3]}, unknown {unknown[:3]}"
        )
    return fresh


def _keep_reward(classifier: Any) -> None:
    """Cut the head to its first output, the reward."""
    old = classifier.score
    new = nn.Linear(old.in_features, 1, bias=old.bias is not None, dtype=old.weight.dtype)
    with torch.no_grad():
        new.weight.copy_(old.weight[:1])
        if old.bias is not None:
            new.bias.copy_(old.bias[:1])
    classifier.score = new
    classifier.num_labels = classifier.config.num_labels = 1
