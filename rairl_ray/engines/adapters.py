"""Adapter folders, as other trainers write them too, and what each of them stands on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from rairl_ray.engines.origin import TOKENIZER_NAMES, Origin, content_id, files_digest
from rairl_ray.errors import ModelError
from rairl_ray.imports import NOT_FOR_TEXT, without

with without(*NOT_FOR_TEXT):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

T = TypeVar("T")

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Adapter:
    """A folder with an adapter, and the base model that it was trained on."""

    folder: Path
    base: str
    """A folder, absolute, or a hub id."""
    revision: str | None
    """Of a hub id."""
    trust_remote_code: bool = False
    """Whether the base may bring code of its own along: the reader's word, not the adapter's."""

    @classmethod
    def read(cls, key: str, folder: Path, trust_remote_code: bool = False) -> Adapter:
        """What `adapter_config.json` says. A relative base is looked for here and beside the adapter.

        Raises:
            ModelError: no weights, no base, or a base that is gone: one line with the remedy.
        """
        if not any((folder / name).is_file() for name in WEIGHTS):
            raise ModelError(f"{key}={folder}: {WEIGHTS[0]} is missing beside adapter_config.json")
        file = folder / "adapter_config.json"
        try:
            fields = json.loads(file.read_text(encoding="utf-8"))
            base, revision, task = (
                fields.get(key) for key in ("base_model_name_or_path", "revision", "task_type")
            )
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{file}: not the file of a PEFT adapter ({error}); restore it") from None
        if not base or not isinstance(base, str):
            raise ModelError(
                f"{file}: base_model_name_or_path is missing; write the adapter's base model there"
            )
        if task not in (None, "CAUSAL_LM"):
            raise ModelError(f"{file}: task_type={task}: only adapters of language models (CAUSAL_LM) will do")
        expanded = Path(base).expanduser()
        for place in (Path(os.path.abspath(expanded)), folder / expanded, folder.parent / expanded):
            if (place / "config.json").is_file():
                return cls(folder, os.path.abspath(place), None, trust_remote_code)._checked(key)
        if not HUB_ID.fullmatch(str(base)):
            raise ModelError(
                f"{file}: base_model_name_or_path={base}: no such model folder (was it moved?); "
                "write its path or hub id there"
            )
        return cls(folder, str(base), revision, trust_remote_code)._checked(key)

    def _checked(self, key: str) -> Adapter:
        """Itself, if an adapter of ours does not ask for trust in a base's code that the user has not given."""
        origin = Origin.read(self.folder)
        if origin is not None and origin.trust_remote_code and not self.trust_remote_code:
            raise ModelError(
                f"{key}={self.folder}: its base {self.base} was run with its own code; read that and set "
                f"{key.removesuffix('.path')}.trust_remote_code=true"
            )
        return self

    def digest(self) -> str:
        """16 hex digits of everything that the merged model depends on.

        Raises:
            ModelError: the base is not the one that the adapter was trained on, where the adapter says so.
        """
        own = files_digest(self.folder, (*TOKENIZER_NAMES, *WEIGHTS))
        base = one_line_errors(self.base, lambda: content_id(self.base, self.revision))
        origin = Origin.read(self.folder)
        if origin is not None and origin.content != base:
            raise ModelError(
                f"{self.folder}: was trained on {origin.base} ({origin.content}), and {self.base} is another "
                f"model now ({base}); give back that base model, or train anew"
            )
        if Path(self.base).is_dir():
            base += files_digest(Path(self.base), TOKENIZER_NAMES)
        return hashlib.sha256(f"{own} {base}".encode()).hexdigest()[:16]

    def merged(self) -> Any:
        """The base with the adapter in its weights, in the base's dtype. Raises ModelError."""
        from peft import PeftModel, get_peft_model_state_dict

        def load() -> Any:
            base: Any = AutoModelForCausalLM.from_pretrained(self.base, dtype="auto", **self._place)
            rows = self._embedding_rows(base)
            if rows is not None and rows != base.get_input_embeddings().weight.shape[0]:
                base.resize_token_embeddings(rows, mean_resizing=False)
            adapted = PeftModel.from_pretrained(base, str(self.folder))
            if not hasattr(adapted.base_model, "merge_and_unload"):
                kind = adapted.peft_config["default"].peft_type.value
                raise ModelError(f"{self.folder}: peft_type={kind} cannot be merged into weights; use LoRA")
            self._check_names(set(get_peft_model_state_dict(adapted)))
            return adapted.merge_and_unload()

        return one_line_errors(str(self.folder), load)

    def tokenizer(self) -> Any:
        """The one beside the adapter, or else its base's. Raises ModelError."""
        if has_tokenizer(self.folder):
            return one_line_errors(str(self.folder), lambda: AutoTokenizer.from_pretrained(self.folder))
        return one_line_errors(self.base, lambda: AutoTokenizer.from_pretrained(self.base, **self._place))

    @property
    def _place(self) -> dict[str, Any]:
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}

    def _check_names(self, wanted: set[str]) -> None:
        """PEFT only warns of weights that find no place, and leaves what is missing as it was drawn."""
        found = set(self._shapes())
        own = ("lora_", "ia3_")
        odd = sorted(key for key in wanted ^ found if any(mark in key for mark in own))
        if odd:
            why = "is missing" if odd[0] in wanted else f"has no place in {self.base}"
            raise ModelError(
                f"{self.folder}: {odd[0]} {why} ({len(odd)} weights do not fit); give the adapter's own base, "
                "or save the adapter again"
            )

    def _embedding_rows(self, base: Any) -> int | None:
        """Rows of the embedding that the adapter brings along, for tokens that were added; None for none."""
        embedding = base.get_input_embeddings()
        (name,) = (name for name, module in base.named_modules() if module is embedding)
        shapes = {key: shape for key, shape in self._shapes().items() if f".{name}." in f".{key}"}
        whole = [shape[0] for key, shape in shapes.items() if key.endswith(f"{name}.weight")]
        return max(whole, default=None)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        file = self.folder / WEIGHTS[0]
        if file.is_file():
            with safe_open(file, framework="pt") as tensors:
                return {key: tuple(tensors.get_slice(key).get_shape()) for key in list(tensors.keys())}
        state = torch.load(self.folder / WEIGHTS[1], map_location="meta", weights_only=True)
        return {key: tuple(tensor.shape) for key, tensor in state.items()}


def save_model(model: Any, folder: Path) -> None:
    """`save_pretrained`, also where the model came with generation settings that transformers will not write.

    Of those that contradict each other only the special tokens are kept: they alone are read here.
    """
    settings = getattr(model, "generation_config", None)
    if settings is not None:
        try:
            settings.validate(strict=True)
        except ValueError:
            model.generation_config = GenerationConfig(
                bos_token_id=settings.bos_token_id,
                eos_token_id=settings.eos_token_id,
                pad_token_id=settings.pad_token_id,
            )
    model.save_pretrained(folder)


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def one_line_errors(path: str, load: Callable[[], T]) -> T:
    """Run `load`, turning the library's long errors into one line that names the model."""
    try:
        return load()
    except ModelError:
        raise
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path}: cannot be loaded ({type(error).__name__}: {reason})") from error
