"""What may differ when a run is resumed: keys of the configuration, and nothing in the frozen weights."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import pytest

from rairl_ray import checkpoint
from rairl_ray.actors import placement
from rairl_ray.checkpoint import CheckpointStore, Identity
from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.config.schema import Build, Model, RunConfig
from rairl_ray.engines.origin import content_id
from rairl_ray.engines.sources import resolve_model
from rairl_ray.errors import PlacementError, ResumeError
from rairl_ray.trainer import run, worker_groups
from rairl_ray.trainer.async_checkpointer import check_references, references
from rairl_ray.trainer.fork import FORK_KEYS
from rairl_ray.trainer.prepare import Prepared
from rairl_ray.trainer.run_context import FREE_KEYS, RunContext, resumable
from rairl_ray.types import Written

ROOT = Path(__file__).resolve().parents[2]
LEARNER = {"replicas": 2, "discriminator_replicas": 1, "zero_stage": 3}


def saved_run(root: Path) -> RunConfig:
    config = RunConfig(name="a", output_dir=str(root))
    (root / "a" / "checkpoints").mkdir(parents=True)
    (root / "a" / "config.yaml").write_text(dump_yaml(config))
    return config


def changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(
        config.model_dump()
        | {name: {**config.model_dump()[name], **values} for name, values in sections.items()}
    )


def test_ranks_stage_and_places_may_change(tmp_path: Path) -> None:
    config = saved_run(tmp_path)
    other = changed(
        config, learner=LEARNER, trainer={"checkpoint_every": 7, "keep_checkpoints": 5},
        placement={"cpus_per_actor": 0.25}, timeouts={"sync_seconds": 5}, tracking={"experiment": "other"},
    )  # fmt: skip
    assert resumable(other, "a").root == tmp_path / "a"


def test_any_other_difference_is_shown_key_by_key_and_refused(tmp_path: Path) -> None:
    config = saved_run(tmp_path)
    other = changed(
        config, learner={**LEARNER, "offload": "cpu"}, policy={"learning_rate": 0.5}, trainer={"steps": 7}
    )
    with pytest.raises(ResumeError) as refused:
        resumable(other, "a")
    text = str(refused.value)
    assert "policy.learning_rate (run: 1e-05, now: 0.5)" in text
    assert "trainer.steps (run: 100, now: 7)" in text and "learner.offload (run: none, now: cpu)" in text
    assert "zero_stage" not in text and "replicas" not in text and "\n" not in text


def test_the_documented_table_is_the_code() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text().split("## Keys that may change")[1]
    for part, keys in zip(text.split("## Forks"), (FREE_KEYS, FORK_KEYS), strict=True):
        rows = re.findall(r"^\| `([\w.]+)(\*?)` \| (.*) \|$", part, re.MULTILINE)
        assert {key: why for key, _, why in rows} == keys
        assert all(key.endswith(".") == bool(star) for key, star, _ in rows)


def test_a_folder_of_another_kind_is_no_run(tmp_path: Path) -> None:
    config = saved_run(tmp_path)
    (tmp_path / "a" / "checkpoints").rmdir()
    with pytest.raises(ResumeError, match="is no training run"):
        resumable(config, "a")


class Started(Exception):
    pass


def refuse_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a run takes or makes is the end of the test: models, data, Ray, a warm start's own training."""
    for name in ("with_warm_start", "prepare", "cluster", "place"):
        monkeypatch.setattr(run, name, lambda *_, name=name: (_ for _ in ()).throw(Started(name)))


DEMO = ROOT / "experiments" / "demo" / "airl.yaml"


@pytest.mark.parametrize(
    ("saved", "why"),
    [(None, "neither"), ({"steps": 7}, "trainer.steps"), ({}, "is no training run")],
)
def test_all_about_resume_is_checked_before_anything_is_made_or_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: dict[str, Any] | None, why: str
) -> None:
    """Also for a run with a warm start that is not there yet and would be trained first."""
    refuse_to_start(monkeypatch)
    config = load_config(DEMO, [f"output_dir={tmp_path}", "name=r"])
    if saved is not None:
        earlier = changed(run.filled_in(config), trainer=saved)
        (tmp_path / "r").mkdir()
        (tmp_path / "r" / "config.yaml").write_text(dump_yaml(earlier))
        if saved:
            (tmp_path / "r" / "checkpoints").mkdir()
    with pytest.raises(ResumeError, match=why):
        run.train(config, resume="r")
    assert not (tmp_path / "demo").exists()


def test_the_runs_own_configuration_is_accepted_before_its_warm_start_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_start(monkeypatch)
    monkeypatch.setattr(run, "check_room", lambda config: None)
    config = load_config(DEMO, [f"output_dir={tmp_path}", "name=r"])
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    (tmp_path / "r" / "config.yaml").write_text(dump_yaml(run.filled_in(config)))
    with pytest.raises(Started, match="with_warm_start"):
        run.train(config, resume="r")


def test_a_run_that_fits_on_no_machine_like_this_one_is_refused_before_its_warm_start_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_start(monkeypatch)
    monkeypatch.setattr(worker_groups, "this_machine", lambda: placement.Node({"CPU": 2.0, "GPU": 0.0}, {}))
    wanted = [f"output_dir={tmp_path}", "placement.cpus_per_actor=2.5", "placement.device=cpu"]
    with pytest.raises(PlacementError, match=r"needs 7\.5 CPUs and the cluster has 2"):
        run.train(load_config(DEMO, wanted))
    with pytest.raises(Started, match="with_warm_start"):
        run.train(load_config(DEMO, [f"output_dir={tmp_path}", "placement.cpus_per_actor=0.5"]))


def test_a_temporary_folder_too_long_for_rays_sockets_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_start(monkeypatch)
    monkeypatch.setattr(
        worker_groups, "get_default_ray_temp_dir", lambda: "/scratch/slurm_jobdir/1355700/tmp.node0016/ray"
    )
    with pytest.raises(
        PlacementError, match=r"TMPDIR: .* set RAY_TMPDIR to a folder of at most (\d+)"
    ) as refused:
        run.train(load_config(DEMO, [f"output_dir={tmp_path}", "placement.cpus_per_actor=0.1"]))
    most = int(str(refused.value).split("at most ")[1].split()[0])
    worker_groups.check_sockets("/" + "x" * (most - 1) + "/ray")
    with pytest.raises(PlacementError):
        worker_groups.check_sockets("/" + "x" * most + "/ray")


@pytest.mark.parametrize(
    ("visible", "gpus"), [(None, 2), ("", 0), ("-1", 0), ("1", 1), ("0,1", 2), ("GPU-a,GPU-b,GPU-c", 2)]
)
def test_hidden_gpus_do_not_count(monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int) -> None:
    monkeypatch.setattr(placement, "local_gpus", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert placement.this_machine().resources["GPU"] == gpus


def test_every_free_key_exists() -> None:
    for key in (*FREE_KEYS, *FORK_KEYS):
        part: Any = RunConfig()
        for name in key.rstrip(".").split("."):
            part = getattr(part, name)


# --- frozen weights --------------------------------------------------------------------------------


def test_content_is_of_configuration_and_weights_wherever_they_lie(tmp_path: Path) -> None:
    model = Model(build=Build(hidden_size=16, layers=1, heads=2, intermediate_size=16, max_length=32))
    folder = Path(resolve_model(model, role="policy", cache_dir=tmp_path / "cache", seed=1))
    other = shutil.copytree(folder, tmp_path / "moved")
    (other / "README.md").write_text("not a weight")
    assert content_id(str(folder)) == content_id(str(other)) and content_id(str(folder)).startswith("sha256:")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert content_id(str(folder)) != content_id(str(other))


def test_a_hub_model_is_identified_by_its_commit(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "models--owner--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    code = "from rairl_ray.engines.origin import content_id; print(content_id('owner/name'))"
    environment = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.stdout.strip() == f"owner/name@{commit}", done.stderr


def prepared(config: RunConfig, path: Path) -> Prepared:
    parts: dict[str, Any] = {"task": None, "policy_renderer": None, "reader": None}
    return Prepared(config=config, policy_path=str(path), discriminator_path=str(path), **parts)


@pytest.mark.parametrize(
    ("changes", "roles"),
    [
        ({}, set()),
        ({"policy": {"kl_coefficient": 0.1}}, {"policy"}),
        ({"policy": {"kl_coefficient": 0.1}, "algorithm": {"type": "sft"}}, set()),
        ({"discriminator": {"head": "implicit"}}, {"discriminator"}),
        ({"discriminator": {"head": "implicit"}, "algorithm": {"type": "grpo"}}, set()),
        ({"model": {"policy": {"lora": {"rank": 4}}, "discriminator": {"lora": {"rank": 4}}}},
         {"policy", "discriminator"}),
    ],
)  # fmt: skip
def test_references_are_the_frozen_weights_that_a_run_needs(
    changes: dict[str, Any], roles: set[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    found = references(prepared(changed(RunConfig(), **changes), tmp_path))
    assert set(found) == roles
    assert all(entry["path"] == str(tmp_path) for entry in found.values())


def test_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    before = {"policy": {"path": "a", "content": "sha256:1"}}
    check_references(before, {"policy": {"path": "moved", "content": "sha256:1"}}, tmp_path)
    for now in ({"policy": {"path": "a", "content": "sha256:2"}}, {}):
        with pytest.raises(ResumeError, match="frozen weights of the policy were sha256:1"):
            check_references(before, now, tmp_path)


# --- reading the newest checkpoint -----------------------------------------------------------------


def test_the_checksums_of_a_resumed_run_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    written = {"policy": Written({}, {}, 0.0)}
    path = store.commit(store.begin(1, {"progress": {}}), written, {}, Identity("", "", None))
    checked: list[Path] = []
    real = checkpoint.verify
    monkeypatch.setattr(checkpoint, "verify", lambda path: (checked.append(path), real(path))[1])
    newest = store.latest_valid()  # as run.py does, for the tracker's run id
    nothing = cast(Any, None)
    context = RunContext(nothing, nothing, nothing, store, nothing, nothing, True, Future(), newest)
    assert context.newest_checkpoint() == path and checked == [path]
    assert context.newest_checkpoint() == path and checked == [path, path], (
        "after a failure it is looked at again"
    )
