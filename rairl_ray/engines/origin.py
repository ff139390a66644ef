"""What weights are, and what an artifact was made from (`origin.json` beside them)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from rairl_ray.config.schema import Model
from rairl_ray.data.tokenizer_facts import fingerprint
from rairl_ray.errors import ModelError

ORIGIN_FILE = "origin.json"
TOKENIZER_NAMES = ("*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""What a tokenizer, a template and a model's own code are read from."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """`origin.json`: everything that a policy, an adapter or a reward model was trained from."""

    base: str
    """A folder, absolute, or a hub id."""
    revision: str | None
    """Of a hub id: its commit."""
    content: str
    """`content_id` of the base."""
    trust_remote_code: bool
    """Whether the base was loaded with code of its own. It is never believed, only asked for again."""
    tokenizer: str
    """Fingerprint of the tokenizer and its chat template, which are saved beside the weights."""
    chat_template: str | None
    """The file that was given in place of the tokenizer's own template."""

    @classmethod
    def of(cls, base: str, model: Model, tokenizer: Any) -> Origin:
        """What is made from `base` by a `model.*` section with this tokenizer."""
        template = model.chat_template
        return cls(
            base=os.path.abspath(base) if Path(base).is_dir() else base,
            revision=commit_of(base, model.revision),
            content=content_id(base, model.revision),
            trust_remote_code=model.trust_remote_code,
            tokenizer=fingerprint(tokenizer),
            chat_template=None if template is None else os.path.abspath(template),
        )

    @classmethod
    def read(cls, folder: Path) -> Origin | None:
        """What the file in `folder` says; None where there is none: made by somebody else.

        Raises:
            ModelError: the file cannot be understood.
        """
        file = folder / ORIGIN_FILE
        if not file.is_file():
            return None
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise ModelError(f"{file}: not the file of an artifact ({error}); restore it") from None

    def write(self, folder: Path) -> None:
        (folder / ORIGIN_FILE).write_text(json.dumps(asdict(self), indent=2, sort_keys=True), encoding="utf-8")


def commit_of(path: str, revision: str | None) -> str | None:
    """The commit of a hub model at `revision`; None for a folder."""
    return None if Path(path).is_dir() else content_id(path, revision).rpartition("@")[2]


def content_id(path: str, revision: str | None = None) -> str:
    """What identifies the weights behind `path`: a hash of a folder's files, or a hub model's commit.

    Two folders with the same configuration and weights have the same one.
    """
    folder = Path(path)
    if not folder.is_dir():
        # The hub's cache keeps each commit in a folder of its name.
        return f"{path}@{Path(hf_hub_download(path, 'config.json', revision=revision)).parent.name}"
    return f"sha256:{files_digest(folder, ('config.json', 'adapter_config.json', '*.safetensors', '*.bin'))}"


def files_digest(folder: Path, names: Sequence[str]) -> str:
    """sha256 over the names and contents of the files that match."""
    digest = hashlib.sha256()
    for path in sorted({path for name in names for path in folder.glob(name)}):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
