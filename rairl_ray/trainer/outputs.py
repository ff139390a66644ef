"""An `output_dir` with a scheme (s3://, gs://, file://) around a run: checked, fetched from, mirrored to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rairl_ray.config.load import warm_start_chain
from rairl_ray.config.schema import RunConfig
from rairl_ray.errors import ResumeError, RunFailure
from rairl_ray.mirror import Mirror
from rairl_ray.storage import FAULTS, Store, staging_folder


@contextmanager
def mirrored(
    config: RunConfig, resume: str | None, warn: Callable[[str], None]
) -> Iterator[tuple[RunConfig, str | None]]:
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
    staging = staging_folder(config.output_dir)
    run = config.name if resume is None else _name_of(resume, store, staging)
    earlier = [link.name for link in warm_start_chain(config)]
    mirror = Mirror(store, staging, [*reversed(earlier), run], warn)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        mirror.look()
        for name in earlier:
            mirror.borrow(name)
        if resume is None:
            mirror.begin(run)
        elif mirror.fetch(run) is None:
            raise ResumeError(
                f"--resume {resume}: neither {store.plain}/{run} nor {staging / run} is a run folder"
            )
    except FAULTS as error:
        if isinstance(error, ResumeError):
            raise
        raise store.refusal(error) from None
    warn(f"output: {store.plain}/{run}, staged in {staging / run}")
    if config.tracking.uri is None:
        warn(f"MLflow's database stays on this machine: {staging / 'mlflow.db'}; tracking.uri names a server")
    mirror.start()
    rest = f"the files are in {staging / run}; train --resume {run} uploads the rest"
    try:
        yield config.model_copy(update={"output_dir": str(staging)}), None if resume is None else run
    except BaseException:
        problem = mirror.finish()
        if problem is not None:
            warn(f"{store.plain}/{run}: not everything was uploaded ({problem}); {rest}")
        raise
    problem = mirror.finish()
    if problem is not None:
        raise RunFailure(
            f"{store.plain}/{run}: the run ended, but not everything was uploaded ({problem}); {rest}"
        )


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
