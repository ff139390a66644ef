"""An `output_dir` with a scheme (s3://, gs://, file://) around a command: fetched from, mirrored to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import yaml

from rairl_ray.config.load import dump_yaml, load_config, warm_start_chain
from rairl_ray.config.rules import show
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ModelError, ResumeError, RunFailure, UserError
from rairl_ray.mirror import Mirror
from rairl_ray.mirrored_files import SIGNS, Wanted, model_files, state_files
from rairl_ray.storage import FAULTS, Store, plain, staging_folder

Warn = Callable[[str], None]
REWARD_KEY = "eval.reward="
YAML = (".yaml", ".yml")


@contextmanager
def mirrored(config: RunConfig, resume: str | None, warn: Warn) -> Iterator[tuple[RunConfig, str | None]]:
    """The configuration and the name to resume as the trainer sees them: with a folder of this machine.

    While the block runs its folders are mirrored. An `output_dir` without a scheme changes nothing.

    Raises:
        ConfigError: a place that cannot be used; nothing was started.
        RunFailure: the run ended well, but not everything arrived.
    """
    if "://" not in config.output_dir:
        yield config, resume
        return
    store = Store(config.output_dir)
    store.probe()
    staging, inner = staging_folder(config.output_dir), staged(config)
    run = config.name if resume is None else _name_of(resume, store, staging)
    earlier = [link.name for link in warm_start_chain(config)]
    mirror = Mirror(store, staging, [*reversed(earlier), run], warn)
    with refusing(store):
        staging.mkdir(parents=True, exist_ok=True)
        mirror.look()
        for name in earlier:
            mirror.borrow(name)
        mirror.read_named(dump_yaml(inner))
        _read_reward(mirror, inner.model.discriminator.path)
        if resume is None:
            mirror.begin(run)
        elif mirror.resume(run) is None:
            raise ResumeError(
                f"--resume {resume}: neither {store.plain}/{run} nor {staging / run} is a run folder"
            )
    warn(f"output: {store.plain}/{run}, staged in {staging / run}")
    if config.tracking.uri is None:
        warn(f"MLflow's database stays on this machine: {staging / 'mlflow.db'}; tracking.uri names a server")
    mirror.start()
    with sent_back([mirror], f"the files are in {staging / run}; train --resume {run} uploads the rest", warn):
        yield inner, None if resume is None else run


def staged(config: RunConfig) -> RunConfig:
    """The configuration with what lies below its remote `output_dir` in the staging folder."""
    if "://" not in config.output_dir:
        return config
    there, here = f"{plain(config.output_dir)}/", f"{staging_folder(config.output_dir)}/"
    models = {}
    for role in ("policy", "discriminator"):
        model = getattr(config.model, role)
        if model.path is not None and model.path.startswith(there):
            models[role] = model.model_copy(update={"path": here + model.path.removeprefix(there)})
    model = config.model.model_copy(update=models)
    return config.model_copy(update={"output_dir": here.rstrip("/"), "model": model})


@contextmanager
def refusing(store: Store, done: str = "written") -> Iterator[None]:
    """A fault of the place in here is one line."""
    try:
        yield
    except UserError:
        raise
    except FAULTS as error:
        raise store.refusal(error, done) from None


@contextmanager
def sent_back(mirrors: Collection[Mirror], rest: str, warn: Warn) -> Iterator[None]:
    """What is done in here arrives over there, or RunFailure says that it did not; `rest`: what to do then.

    Mirrors may still be added and started in the block.
    """

    def problems() -> str:
        ended = [(mirror, mirror.finish()) for mirror in mirrors if mirror.names]
        told = [f"{m.store.plain}/{m.names[-1]} ({problem})" for m, problem in ended if problem is not None]
        return f"not everything was uploaded to {', '.join(told)}; {rest}" if told else ""

    try:
        yield
    except BaseException:
        if said := problems():
            warn(said)
        raise
    if said := problems():
        raise RunFailure(said)


def _read_reward(mirror: Mirror, path: str | None) -> None:
    """Fetch the run whose reward a configuration starts from, where it is named below `output_dir`."""
    if path is None or "://" in path or Path(path).expanduser().exists():
        return
    for name, _ in _cuts(path.strip("/")):
        if _sign(mirror.store, name) is not None:
            mirror.read(name, model_files)
            return


def _name_of(resume: str, store: Store, staging: Path) -> str:
    """The run's name in `--resume NAME`, or in the whole of its remote or staged place."""
    for above in (store.plain, str(staging)):
        if resume.startswith(f"{above}/"):
            return resume[len(above) + 1 :].strip("/")
    if (Path(resume) / "config.yaml").is_file():
        raise ResumeError(
            f"--resume {resume}: is a folder of this machine, and output_dir={store.plain}; give the run's name"
        )
    return resume.strip("/")


# --- runs that a command reads ------------------------------------------------------------------------


class Found(NamedTuple):
    """A folder in a remote output folder."""

    mirror: Mirror
    name: str
    rest: str
    """What the text names below it, such as final/policy."""


@dataclass
class Places:
    """The remote output folders that a command names, each with its staging folder."""

    output: str
    """The command's own `output_dir`."""
    warn: Warn
    mirrors: dict[str, Mirror] = field(default_factory=dict)

    def find(self, text: str) -> Found | None:
        """The remote folder that a text names by its URI, or by its name below a remote `output_dir`.

        Raises:
            UserError: a place that cannot be used, a URI where nothing is.
        """
        if "://" in text:
            return self._of_uri(text)
        if "://" not in self.output or Path(text).exists() or text.endswith(YAML):
            return None
        mirror = self._mirror(self.output)
        with refusing(mirror.store, "read"):
            for name, rest in _cuts(text.strip("/")):
                if _sign(mirror.store, name) is not None:
                    return Found(mirror, name, rest)
        return None

    def fetched(self, text: str, wanted: Wanted, *, inner: bool = False) -> str:
        """What a text names, as a folder of this machine; the text itself where that is not remote.

        Args:
            inner: with the folders below it that are mirrored by themselves.
        """
        found = self.find(text)
        if found is None:
            return text
        mirror, name, rest = found
        with refusing(mirror.store, "read"):
            folder = mirror.read(name, wanted) or mirror.staging / name
            adapter = folder / "final" / "policy" / "adapter_config.json"
            if adapter.is_file():
                mirror.read_named(adapter.read_text(encoding="utf-8"))
            if inner:
                mirror.read_inner(name, wanted)
        return str(folder / rest)

    def with_checkpoint(self, found: Found, step: int) -> tuple[Path, list[int]]:
        """(a run's folder with its checkpoint of `step`, all steps over there), to fork it.

        The final models that its configuration names are fetched, too.
        """
        mirror, name, _ = found
        with refusing(mirror.store, "read"):
            folder = mirror.read(name, state_files) or mirror.staging / name
            steps = mirror.fetch_checkpoint(name, step)
            if (folder / "config.yaml").is_file():
                mirror.read_named((folder / "config.yaml").read_text(encoding="utf-8"))
        return folder, steps

    def keep(self, folder: Path) -> None:
        """Mirror a folder that the command is about to write, if it lies in a staging folder."""
        for mirror in self.mirrors.values():
            if folder.is_relative_to(mirror.staging):
                if not mirror.names:
                    mirror.store.probe()
                with refusing(mirror.store):
                    mirror.add(folder.relative_to(mirror.staging).as_posix())
                mirror.start()
                self.warn(f"output: {mirror.store.plain}/{mirror.names[-1]}, staged in {folder}")

    def send(self, folder: Path) -> None:
        """Upload a folder's files beside what is over there, such as a report, which no other process owns."""
        for mirror in self.mirrors.values():
            if folder.is_relative_to(mirror.staging):
                with refusing(mirror.store):
                    for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
                        name = path.relative_to(mirror.staging).as_posix()
                        mirror.store.upload(path, name, lambda _bytes: None)

    def _mirror(self, uri: str) -> Mirror:
        uri = self.output if plain(uri) == plain(self.output) else uri
        if uri not in self.mirrors:
            store = Store(uri)
            store.look()
            self.mirrors[uri] = Mirror(store, staging_folder(uri), [], self.warn)
        return self.mirrors[uri]

    def _of_uri(self, text: str) -> Found:
        """The folder says its own name, so what stands before that is the output folder."""
        base, mark, options = text.partition("?")
        scheme, _, path = base.partition("://")
        for whole, rest in _cuts(path.rstrip("/")):
            store = Store(f"{scheme}://{whole}{mark}{options}")
            with refusing(store, "read"):
                store.look()
                name = _sign(store, "")
            if name is not None:
                above, own = whole.split("/"), len(name.split("/"))
                own = own if own < len(above) else 1
                root = "/".join(above[:-own])
                mirror = self._mirror(f"{scheme}://{root}{mark}{options}")
                return Found(mirror, "/".join(above[-own:]), rest)
        raise ModelError(f"{show(text)}: nothing of a run is there; give the URI of a run, or its name")


def read_sweep_of(text: str, output_dir: str) -> str:
    """The folder of a remote sweep, named by its URI or name, with how its trials stand; or the text itself."""
    places = Places(output_dir, partial(print, file=sys.stderr))
    return places.fetched(text, state_files, inner=True)


class AtHand(NamedTuple):
    """What a command was given, as it sees it."""

    runs: list[str]
    overrides: list[str]
    keep: Callable[[Path], None]
    """To be called with each folder before it is written."""


@contextmanager
def at_hand(
    runs: Sequence[str], overrides: Sequence[str], warn: Warn, wanted: Wanted = model_files
) -> Iterator[AtHand]:
    """Runs as folders of this machine, remote ones fetched; what the block leaves in `keep` is sent back.

    Raises:
        UserError: a place that cannot be used; nothing was started.
        RunFailure: the block ended well, but not everything arrived.
    """
    said = [word for word in overrides if word.startswith("output_dir=")]
    experiment = next((text for text in runs if text.endswith(YAML)), None)
    output = load_config(experiment, said).output_dir
    places = Places(output, warn)
    found = [places.fetched(text, wanted) for text in runs]
    words = [word for word in overrides if word not in said or "://" not in output]
    for number, word in enumerate(words):
        if word.startswith(REWARD_KEY):
            words[number] = REWARD_KEY + places.fetched(word.removeprefix(REWARD_KEY), wanted)
    if "://" in output:
        words.append(f"output_dir={staging_folder(output)}")
    elif places.mirrors and not said:  # Runs were named by their URIs alone.
        words.append(f"output_dir={next(iter(places.mirrors.values())).staging}")
    with sent_back(places.mirrors.values(), "the files are staged; the same command again uploads them", warn):
        yield AtHand(found, words, places.keep)


def _cuts(path: str) -> Iterator[tuple[str, str]]:
    """(RUN, what is below it), the whole path being RUN first: RUN/final/policy names a run, too."""
    parts = path.split("/")
    for cut in range(len(parts), max(0, len(parts) - 3), -1):
        yield "/".join(parts[:cut]), "/".join(parts[cut:])


def _sign(store: Store, folder: str) -> str | None:
    """The name that a remote folder says it has, its last word where it says none; None: nothing of ours."""
    for sign in SIGNS:
        content = store.read(f"{folder}/{sign}".lstrip("/"))
        if content is not None:
            said = None
            with suppress(yaml.YAMLError):
                said = yaml.safe_load(content)  # JSON is YAML, too.
            name = said.get("name") if isinstance(said, dict) else None
            return name if isinstance(name, str) else store.plain.rpartition("/")[2]
    return None
