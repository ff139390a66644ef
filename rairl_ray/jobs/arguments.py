"""A verb's arguments as they must read inside the job, whose working directory is the package."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rairl_ray.config.rules import value_of
from rairl_ray.config.schema import RunConfig
from rairl_ray.config.yamlfile import read_document
from rairl_ray.errors import UserError

OVERRIDING = frozenset({"train", "evaluate", "score", "localise", "transfer", "sweep"})
"""Verbs that take `key=value` and start actors."""
NAMED_BY_RUN = frozenset({"train", "sweep"})
"""Verbs that make a run: its name is the job's. Other jobs are named by all their arguments."""
PATH_KEYS = (
    "data.path", "data.demonstrations", "eval.input", "eval.reward", "model.policy.path",
    "model.policy.chat_template", "model.discriminator.path", "model.discriminator.chat_template",
)  # fmt: skip
"""Configuration keys whose value may be a file or folder of this machine."""
OUTSIDE = "outside"
"""Folder of the package for files from outside the checkout, by their whole path."""


class ArgumentError(UserError):
    """An argument that means something on this machine only."""


@dataclass(frozen=True)
class Call:
    """What the job runs, and what it needs."""

    verb: str
    arguments: tuple[str, ...]
    named: Mapping[str, Path]
    """Path in the package -> file of this machine that git does not track."""
    job: str
    """Submission id of its first attempt."""
    output: str
    """Where the results lie on the cluster; empty where nothing is written."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal arguments."""
        return _hash("\0".join((self.verb, *self.arguments)))


class Places:
    """Paths of this machine -> paths inside the job."""

    def __init__(self, root: Path, tracked: frozenset[str], here: bool, packed: bool) -> None:
        """
        Args:
            root: the checkout; `tracked`: its files that are packed anyway.
            here: whether the cluster is this machine.
            packed: whether files can go along at all (not with a named working directory).
        """
        self.root, self.tracked, self.here, self.packed = root.resolve(), tracked, here, packed
        self.named: dict[str, Path] = {}

    def read(self, what: str, text: str) -> str:
        """A file or folder that the job reads; a text that names nothing here is left alone."""
        path = Path(text).expanduser()
        if not text or not path.exists():
            return text
        whole = path.resolve()
        inside = whole.relative_to(self.root).as_posix() if whole.is_relative_to(self.root) else None
        if inside in self.tracked:
            return str(inside)
        if self.here:
            return str(whole)
        if path.is_dir() or not self.packed:
            if path.is_absolute():
                return text
            kind = "folder" if path.is_dir() else "file"
            raise ArgumentError(
                f"{what}: {text} is a {kind} of this machine, which is not sent; "
                "put it on a disk that the nodes share and give its absolute path"
            )
        return self._take(whole)

    def write(self, what: str, text: str) -> str:
        """A file or folder that the job writes: its working directory is deleted, so it must lie elsewhere."""
        path = Path(text).expanduser()
        if path.is_absolute() or "://" in text:
            return str(path) if "://" not in text else text
        if self.here:
            return str(path.absolute())
        raise ArgumentError(
            f"{what}={text}: a relative path lies in the job's working directory, which Ray deletes; give an "
            f"absolute one on a disk that all nodes share: {what}=/shared/{path.name}"
            + (", or s3://BUCKET/PREFIX" if what == "output_dir" else "")
        )

    def _take(self, whole: Path) -> str:
        name = self._name(whole)
        self.named[name] = whole
        if whole.suffix in (".yaml", ".yml"):
            for referred in _referred(whole):
                if self._name(referred).startswith(OUTSIDE) != name.startswith(OUTSIDE):
                    raise ArgumentError(
                        f"{whole}: refers to {referred}, which lies on the other side of the checkout's "
                        "border; "
                        "keep both in the checkout"
                    )
                if self._name(referred) not in {*self.tracked, *self.named}:
                    self._take(referred)
        return name

    def _name(self, whole: Path) -> str:
        if whole.is_relative_to(self.root):
            return whole.relative_to(self.root).as_posix()
        return f"{OUTSIDE}{whole.as_posix()}"


def prepare_call(verb: str, arguments: Sequence[str], config: RunConfig | None, places: Places) -> Call:
    """The call as it runs in the job.

    Args:
        config: of the experiment file, where the first argument is one.

    Raises:
        ArgumentError: what would be lost, or is not there.
    """
    words, output = _translate(verb, arguments, places)
    if verb in OVERRIDING:
        if config is not None:
            words += _of_config(config, arguments, places)
        if config is None or config.cluster.address is None:
            words.append("address=auto" if verb == "sweep" else "cluster.address=auto")
        output = output or _output(verb, arguments, config, places, words)
    name = config.name if config is not None and verb in NAMED_BY_RUN else ""
    first = next((word for word in arguments if not word.startswith("-")), "")
    job = f"{verb}-{slug(name)}" if name else f"{verb}-{slug(first)}-{_hash(chr(0).join(words))[:6]}"
    return Call(verb, tuple(words), dict(places.named), job, output)


def overrides_of(arguments: Sequence[str]) -> list[str]:
    """The `key=value` arguments."""
    return [word for word in arguments if "=" in word and not word.startswith("-")]


def slug(text: str) -> str:
    """A run's name or path as part of a submission id."""
    text = re.sub(r"\.ya?ml$", "", text)
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-.")[-60:]


def _translate(verb: str, arguments: Sequence[str], places: Places) -> tuple[list[str], str]:
    """(words, what --output names)."""
    words: list[str] = []
    output, option = "", ""
    for word in arguments:
        key, equals, value = word.partition("=")
        if word.startswith("-"):
            option = key
            if equals and key == "--output":
                output = places.write(key, value)
                word = f"{key}={output}"
        elif option == "--output":
            word = output = places.write(option, word)
            option = ""
        elif equals and key == "output_dir":
            word = f"output_dir={places.write(key, value)}"
        elif equals and key in (*PATH_KEYS, "warm_start"):
            word = f"{key}={places.read(key, value)}"
        elif not equals:
            word = places.read(verb, word)
            option = ""
        words.append(word)
    return words, output


def _of_config(config: RunConfig, arguments: Sequence[str], places: Places) -> list[str]:
    """Overrides for the paths that the experiment file names."""
    given = {word.partition("=")[0] for word in overrides_of(arguments)}
    extra = []
    for key in PATH_KEYS:
        value = value_of(config, key)
        if key not in given and isinstance(value, str):
            there = places.read(key, value)
            if there != value:
                extra.append(f"{key}={there}")
    return extra


def _output(
    verb: str, arguments: Sequence[str], config: RunConfig | None, places: Places, words: list[str]
) -> str:
    """The output folder on the cluster, with an override where the given one would be lost."""
    said = next((word for word in reversed(words) if word.startswith("output_dir=")), None)
    if said is None:
        first = next((word for word in words if not word.startswith("-")), "")
        if (
            verb not in NAMED_BY_RUN
            and Path(first).is_absolute()
            and Path(first).suffix not in (".yaml", ".yml")
        ):
            return first
        said = f"output_dir={places.write('output_dir', config.output_dir if config is not None else 'runs')}"
        if config is None or said != f"output_dir={config.output_dir}":
            words.append(said)
    folder = said.partition("=")[2]
    if "://" in folder:
        folder = folder.partition("?")[0].rstrip("/")
    return f"{folder}/{config.name}" if config is not None and verb in NAMED_BY_RUN else folder


def _referred(file: Path) -> list[Path]:
    """The files that an experiment file names as `base:` and `warm_start:`."""
    data = read_document(file, str(file)).data
    base = data.get("base") or []
    names = [*([base] if isinstance(base, str) else base), data.get("warm_start")]
    return [(file.parent / name).resolve() for name in names if isinstance(name, str)]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
