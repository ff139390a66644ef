"""`train --fork RUN@STEP`: what may be forked into what, and that a fork draws what its run drew."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rairl_ray.checkpoint import CheckpointStore, Identity, verify
from rairl_ray.config.load import dump_yaml, load_config
from rairl_ray.errors import ConfigError, ResumeError
from rairl_ray.files import read_json_lines
from rairl_ray.runfolder import RunFolder
from rairl_ray.sweep import supervise
from rairl_ray.sweep.file import SweepFile, load_sweep
from rairl_ray.sweep.points import trials
from rairl_ray.trainer.fork import fork_of, take_over
from rairl_ray.trainer.run import train
from rairl_ray.types import Written
from tests.inprocess import config_of, differing, moved, rows_in, rows_of, run
from tests.runs import ROOT
from tests.verbs.test_cli import refused

DEMO = ROOT / "experiments/demo/airl.yaml"


@pytest.fixture
def source(tmp_path: Path) -> RunFolder:
    """A run with checkpoints of steps 2, 4 and 8, none of which holds a weight."""
    folder = RunFolder(tmp_path / "runs" / "demo" / "airl")
    folder.create()
    words = [f"output_dir={tmp_path}/runs", "model.policy.path=/start", "model.policy.build=null"]
    folder.write_config(dump_yaml(load_config(DEMO, [*words, "trainer.steps=9", "name=demo/airl"])))
    store = CheckpointStore(folder.root, keep=9)
    for step in (2, 4, 8):
        folder.append_metrics(step, {"loss": step / 2})
        draft = store.begin(step, {"progress": {"step": step}})
        store.commit(draft, {"policy": Written({}, {}, 0.0)}, {}, Identity("hash", "code", "mlflow-run"))
    return folder


def test_a_fork_is_the_run_with_the_given_changes(source: RunFolder) -> None:
    words = ["policy.learning_rate=0.5", "discriminator.loss.type=wgan", "discriminator.loss.drift_penalty=1"]
    fork = fork_of(f"{source.root}@4", words)
    assert fork.config.policy.learning_rate == 0.5 and fork.config.discriminator.loss.type == "wgan"
    assert fork.config.warm_start is None, "the policy's path names its result"
    assert fork.config.model.policy.path == "/start" and fork.config.trainer.steps == 9
    assert fork.config.name.startswith("demo/airl-at-4-") and len(fork.changed) == 3
    assert fork_of(f"{source.root}@4", words[:1]).config.name != fork.config.name
    named = fork_of("demo/airl@4", [f"output_dir={source.root.parents[1]}", "name=other"])
    assert (named.config.name, named.changed) == ("other", ())


def test_it_takes_over_rows_and_checkpoint_and_leaves_the_run_as_it_was(source: RunFolder) -> None:
    before = {path: path.read_bytes() for path in source.root.rglob("*") if path.is_file()}
    fork = fork_of(f"{source.root}@4", ["advantage.gamma=0.6", "name=demo/fork"])
    folder = RunFolder(source.root.parent / "fork")
    folder.create()
    take_over(fork, folder)
    store = CheckpointStore(folder.root, keep=2)
    newest = store.latest_valid()
    assert newest == store.path(4) and store.steps() == [4] and verify(store.path(4)) is None
    manifest = store.manifest(newest)
    assert manifest["mlflow_run_id"] is None, "the run's own MLflow run is not written to"
    changed = ["advantage.gamma (run: 0.5, now: 0.6)"]
    assert folder.read_fork() == {"run": str(source.root), "step": 4, "changed": changed}
    assert folder.truncate_to_step(4) == 1 and [row["step"] for row in folder.read_metrics()] == [2, 4]
    assert "advantage.gamma (run: 0.5, now: 0.6)" in folder.events.read_text()
    # a newer checkpoint pushes the linked one out, which its run keeps
    store = CheckpointStore(folder.root, keep=1)
    draft = store.begin(5, {"progress": {}})
    store.commit(draft, {"policy": Written({}, {}, 0.0)}, {}, Identity("", "", None))
    assert store.steps() == [5]
    assert {path: path.read_bytes() for path in source.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("step", "nearest"), [("3", "the nearest: 2 and 4"), ("0", "the nearest: 2"), ("99", "the nearest: 8")]
)
def test_a_step_without_a_checkpoint_names_the_nearest(step: str, nearest: str, source: RunFolder) -> None:
    with pytest.raises(ResumeError, match=rf"has no checkpoint of step {step}; {nearest}$"):
        fork_of(f"{source.root}@{step}", [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=5"], r"cannot change seed \(run: 0, now: 5: no key of a fork\)"),
        (["data.limit=8", "data.system_role=user"], r"data\.limit .*, data\.system_role .*no key of a fork"),
        (["discriminator.warmup_steps=3"], r"discriminator\.warmup_steps .*the warm-up lies behind"),
        (["discriminator.replay.capacity=3"], r"the buffer is in the checkpoint"),
        (["discriminator.head=scalar", "discriminator.loss.level=unit", "discriminator.loss.type=airl"],
         r"discriminator\.head .*in the checkpoint\), discriminator\.loss\.type .*has a second output"),
        (["trainer.steps=4"], r"trainer\.steps=4: the fork starts after step 4; give more"),
        (["other.yaml"], r"other\.yaml: the configuration is the run's own"),
        (["policy.learning_rat=1"], r"unknown key policy\.learning_rat"),
        (["policy.learning_rate=-1"], r"policy\.learning_rate=-1"),
    ],
)  # fmt: skip
def test_what_cannot_change_is_one_line(words: list[str], said: str, source: RunFolder) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        fork_of(f"{source.root}@4", words)
    assert len(str(error.value).splitlines()) == 1


def test_other_bad_forks(source: RunFolder) -> None:
    for text in ("demo/airl", "demo/airl@", "@4", "demo/airl@four"):
        with pytest.raises(ConfigError, match="must be RUN@STEP"):
            fork_of(text, [])
    with pytest.raises(ResumeError, match="--fork nowhere: neither"):
        fork_of("nowhere@4", [])
    with pytest.raises(ConfigError, match="to continue one, --resume x alone"):
        fork_of(f"{source.root}@4", [], resume="x")
    state = source.checkpoints / "step-000004" / "trainer" / "progress.json"
    state.write_text("{}")
    with pytest.raises(ResumeError, match=r"step-000004 is damaged: .*; the other steps: 2, 8"):
        fork_of(f"{source.root}@4", [])
    source.root.rename(source.root.with_name("moved"))
    with pytest.raises(ConfigError, match="name=demo/moved: is the run itself"):
        fork_of(f"{source.root.with_name('moved')}@8", ["name=demo/moved"])


def test_on_the_command_line(source: RunFolder) -> None:
    assert "has no checkpoint of step 7; the nearest: 4 and 8" in refused("train", "--fork", f"{source.root}@7")
    assert refused("train").startswith("train: CONFIG is missing")


def test_a_sweep_of_forks(source: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"name": "sw", "fork": f"{source.root}@4", "output_dir": str(tmp_path / "out")}
    settings |= {"space": {"policy.learning_rate": [0.5, 0.25]}, "overrides": {"advantage.gamma": 0.6}}
    file = tmp_path / "sweep.yaml"

    def loaded(**changes: object) -> SweepFile:
        file.write_text(json.dumps(settings | changes))
        return load_sweep(str(file))

    made = trials(loaded())
    assert [item.config.policy.learning_rate for item in made] == [0.5, 0.25]
    assert all(item.config.advantage.gamma == 0.6 and item.config.warm_start is None for item in made)
    assert made[0].config.name == f"sw/trials/{made[0].id}" and made[0].seed == 0
    # what Tune's worker runs: a fork, and once it has a folder its resume
    monkeypatch.setattr(supervise.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="here"))
    spec = {"fork": f"{source.root}@4", "base": "", "overrides": list(made[0].overrides), "folder": "/none"}
    command = supervise._command(spec, RunFolder("/none"))[4:]
    assert command[:2] == ["--fork", f"{source.root}@4"] and not any(w.startswith("seed=") for w in command)
    resumed = supervise._command(spec, source)[4:]
    assert resumed == [str(source.config), 'cluster.address="here"', "--resume", str(source.root)]
    with pytest.raises(ConfigError, match="needs `base`, experiment files, or `fork`"):
        loaded(base="x.yaml")
    with pytest.raises(ConfigError, match=r"seeds=\[1, 2\]: a fork has its run's seed"):
        loaded(seeds=[1, 2])
    with pytest.raises(ResumeError, match="has no checkpoint of step 3; the nearest: 2 and 4"):
        trials(loaded(fork=f"{source.root}@3"))
    with pytest.raises(ConfigError, match=r"point data\.limit=8: .*cannot change data\.limit"):
        trials(loaded(space={"data.limit": [8]}))


# --- real ones -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("one_cluster")
def test_a_fork_draws_what_its_run_drew(tmp_path: Path) -> None:
    config = config_of(
        "airl", tmp_path, "trainer.steps=4", "trainer.checkpoint_every=2", "trainer.log_rollouts_every=1",
        "trainer.keep_checkpoints=9", "policy.learning_rate=0.003", "discriminator.learning_rate=0.003",
        "trainer.prompts_per_step=3", "data.limit=8", "discriminator.replay.capacity=16",
        "discriminator.replay.share=0.5",
    )  # fmt: skip
    whole = run(config)
    root = tmp_path / config.name
    assert moved(whole)

    def forked(*words: str) -> RunFolder:
        fork = fork_of(f"{root}@2", words)
        assert train(fork.config, fork=fork) == 0
        return RunFolder(tmp_path / fork.config.name)

    same, other = forked("name=same"), forked("name=other", "policy.learning_rate=0.03", "reward.density=dense")
    assert differing(whole, rows_in(same)) == []
    rows = {row["step"]: row for row in rows_in(other) if "policy/learning_rate" in row}
    before = {row["step"]: row for row in rows_of(config) if "policy/learning_rate" in row}
    assert {**rows[2]} == {**before[2]} and sorted(rows) == [1, 2, 3, 4]
    for step in (3, 4):
        rate = before[step]["policy/learning_rate"]
        assert rows[step]["policy/learning_rate"] == pytest.approx(10 * rate)

    def samples(folder: RunFolder, step: int) -> list[str]:
        drawn = read_json_lines(folder.rollouts / f"step-{step:06d}.jsonl")
        return [json.dumps([row["prompt_id"], row["seed"], row["generation"]]) for row in drawn]

    source = RunFolder(root)
    assert samples(other, 3) == samples(source, 3), "the same policy, prompts and random numbers"
    prompts = [[json.loads(text)[:2] for text in samples(folder, 4)] for folder in (other, source)]
    assert prompts[0] == prompts[1] and samples(other, 4) != samples(source, 4)
    finished = rows_in(other)
    assert differing(run(load_config(other.config), resume=True), finished) == [], (
        "a fork resumes as a run does"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("one_cluster")
@pytest.mark.parametrize("algorithm", ["grpo", "sft"])
def test_forks_of_the_baselines_draw_what_their_runs_drew(algorithm: str, tmp_path: Path) -> None:
    words = ["trainer.steps=4", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9", "data.limit=8"]
    config = config_of(algorithm, tmp_path, *words)
    whole = run(config)
    source = f"{tmp_path / config.name}@2"
    same, other = fork_of(source, ["name=same"]), fork_of(source, ["name=other", "policy.learning_rate=0.01"])
    for fork in (same, other):
        assert train(fork.config, fork=fork) == 0
    assert differing(whole, rows_in(RunFolder(tmp_path / "same"))) == []
    assert differing(run(load_config(tmp_path / "same" / "config.yaml"), resume=True), whole) == []
    changed = differing(whole, rows_in(RunFolder(tmp_path / "other")))
    assert changed and not any(f"step {step}:" in text for text in changed for step in (1, 2)), changed
