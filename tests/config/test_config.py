"""Loading: layers, scalars, and messages that name file, key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rairl_ray.config.key_names import RENAMED, known_keys, nearest_key
from rairl_ray.config.load import (
    dump_yaml,
    load_config,
    read_saved,
    warm_start_chain,
)
from rairl_ray.config.rules import check, check_files, check_output
from rairl_ray.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(
    path for path in (ROOT / "experiments").rglob("*.yaml") if path.parent.name not in ("base", "sweeps")
)
VALID = """\
model: {policy: {build: {max_length: 128}}}
data: {max_prompt_tokens: 32}
rollout: {max_completion_tokens: 64}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml", VALID)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


# --- every shipped experiment ---------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_experiment_loads_and_survives_its_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    check(config)
    warm_start_chain(config)
    assert load_config(write(tmp_path / "config.yaml", dump_yaml(config))) == config


@pytest.mark.skipif(not (ROOT / "experiments/demo/airl.yaml").is_file(), reason="no demo experiment")
@pytest.mark.parametrize(
    "override",
    [f"reward.density.type={d}" for d in ("sparse", "partial", "interval", "dense")]
    + [f"discriminator.loss.type={loss}" for loss in ("bce", "bradley_terry", "airl")]
    + ["algorithm.type=sft", "discriminator.perturbations.count=0", "model.policy.lora.rank=8"],
)
def test_the_demo_takes_every_variant_by_one_override(override: str) -> None:
    load_config(ROOT / "experiments/demo/airl.yaml", [override])


# --- layers ---------------------------------------------------------------------------------------


def test_base_files_merge_deeply_and_relative_to_themselves(tmp_path: Path) -> None:
    write(tmp_path / "bases/root.yaml", VALID + "seed: 1\ntrainer: {steps: 5, prompts_per_step: 3}\n")
    write(tmp_path / "bases/middle.yaml", "base: root.yaml\nseed: 2\ntrainer: {steps: 6}\n")
    top = write(tmp_path / "top.yaml", "base: bases/middle.yaml\nname: top\n")
    config = load_config(top, ["trainer.checkpoint_every=9"])
    assert (config.name, config.seed, config.trainer.steps) == ("top", 2, 6)
    assert (config.trainer.prompts_per_step, config.trainer.checkpoint_every) == (3, 9)
    assert config.model.policy.build is not None
    assert load_config(top, ["model.policy.build=null", "model.policy.path=x/y"]).model.policy.build is None


def test_of_several_bases_later_ones_win_and_a_shared_one_counts_once(tmp_path: Path) -> None:
    write(tmp_path / "root.yaml", VALID + "seed: 1\ntrainer: {steps: 5, prompts_per_step: 3}\n")
    write(tmp_path / "left.yaml", "base: root.yaml\nseed: 2\ntrainer: {steps: 6}\n")
    write(tmp_path / "right.yaml", "base: root.yaml\ntrainer: {steps: 7}\n")
    bases = "base:\n  - left.yaml\n  - right.yaml\n"
    config = load_config(write(tmp_path / "top.yaml", bases))
    # The root below `right` does not undo the seed of `left`.
    assert (config.seed, config.trainer.steps, config.trainer.prompts_per_step) == (2, 7, 3)
    assert load_config(write(tmp_path / "other.yaml", "base: [right.yaml, left.yaml]")).trainer.steps == 6
    assert load_config(write(tmp_path / "top.yaml", bases + "trainer: {steps: 8}\n")).trainer.steps == 8


def test_a_missing_one_of_several_bases_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", VALID)
    text = message(write(tmp_path / "top.yaml", "name: x\nbase: [a.yaml, nope.yaml]\n"))
    assert text.startswith(f"{tmp_path}/top.yaml:2: base=nope.yaml: no such file")
    text = message(write(tmp_path / "top.yaml", "base: [a.yaml, top.yaml]\n"))
    assert "base leads back" in text


def test_a_base_circle_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "base: b.yaml\n")
    write(tmp_path / "b.yaml", "base: a.yaml\n")
    assert "base leads back" in message(tmp_path / "a.yaml")
    assert "base leads back" in message(write(tmp_path / "self.yaml", "base: self.yaml\n"))


def test_a_missing_base_names_the_file_that_wants_it(tmp_path: Path) -> None:
    text = message(write(tmp_path / "a.yaml", "name: x\nbase: nope.yaml\n"))
    assert text.startswith(f"{tmp_path}/a.yaml:2: base=nope.yaml: no such file")


def test_later_overrides_win(file: Path) -> None:
    assert load_config(file, ["seed=1", "seed=2"]).seed == 2


def test_warm_start_is_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    sft = write(tmp_path / "exp/sft.yaml", VALID + "name: sft\nalgorithm: {type: sft}\n")
    top = write(tmp_path / "exp/airl.yaml", VALID + "name: airl\nwarm_start: sft.yaml\n")
    config = load_config(top)
    assert config.warm_start == str(sft)
    assert [earlier.name for earlier in warm_start_chain(config)] == ["sft"]
    # The saved configuration still finds it from its run folder.
    saved = write(tmp_path / "runs/airl/config.yaml", dump_yaml(config))
    assert load_config(saved) == config
    assert read_saved(saved) == config


def test_a_warm_start_follows_the_run_that_asks_for_it(tmp_path: Path) -> None:
    write(tmp_path / "sft.yaml", VALID + "name: sft\nalgorithm: {type: sft}\n")
    top = write(tmp_path / "airl.yaml", VALID + "name: airl\nwarm_start: sft.yaml\n")
    config = load_config(
        top, ["seed=5", "output_dir=elsewhere", "model.policy.build.layers=2", "policy.clip_low=0.1"]
    )
    (sft,) = warm_start_chain(config)
    assert (sft.name, sft.seed, sft.output_dir, sft.policy.clip_low) == ("sft", 5, "elsewhere", 0.2)
    assert sft.model.policy.build == config.model.policy.build
    # The resolved configuration names the warm start's result: its warm start is still built, not circular.
    resolved = ["model.policy.path=runs/sft/final/policy", "model.policy.build=null"]
    (sft,) = warm_start_chain(load_config(top, resolved))
    assert sft.model.policy.path is None and sft.model.policy.build is not None


@pytest.mark.parametrize(
    ("sft", "fragment"),
    [
        (None, "no such file"),
        (VALID + "name: sft\n", "algorithm.type=airl; name an SFT experiment"),
        (VALID + "algorithm: {type: sft}\nname: airl\n", "same run folder"),
        (VALID + "algorithm: {type: sft}\nname: sft\nwarm_start: sft.yaml\n", "starts from itself"),
    ],
)
def test_a_warm_start_that_contradicts_the_run_is_refused(
    tmp_path: Path, sft: str | None, fragment: str
) -> None:
    if sft is not None:
        write(tmp_path / "sft.yaml", sft)
    config = load_config(write(tmp_path / "airl.yaml", VALID + "name: airl\nwarm_start: sft.yaml\n"))
    with pytest.raises(ConfigError) as error:
        warm_start_chain(config)
    assert fragment in str(error.value)


# --- scalars --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("policy.learning_rate=1e-4", "policy", "learning_rate", 1e-4),
        ("policy.learning_rate=3E-5", "policy", "learning_rate", 3e-5),
        ("reward.clip=[-5, 5]", "reward", "clip", (-5.0, 5.0)),
        ("reward.clip=[-5,5]", "reward", "clip", (-5.0, 5.0)),
        ("data.limit=null", "data", "limit", None),
        ("data.limit=12", "data", "limit", 12),
        ("rollout.prefix_caching=false", "rollout", "prefix_caching", False),
        ("tracking.tags={}", "tracking", "tags", {}),
        ("tracking.tags={a: b}", "tracking", "tags", {"a": "b"}),
        ("data.system_prompt=Think: then answer", "data", "system_prompt", "Think: then answer"),
        ("data.system_prompt=a=b", "data", "system_prompt", "a=b"),
        ("data.system_prompt='12'", "data", "system_prompt", "12"),
        ("data.config_name=2024-01-01", "data", "config_name", "2024-01-01"),
        ("data.config_name=on", "data", "config_name", "on"),
    ],
)
def test_override_values_are_yaml_scalars(
    file: Path, override: str, section: str, key: str, value: Any
) -> None:
    got = getattr(getattr(load_config(file, [override]), section), key)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("false", "sparse"),
        ("true", "dense"),
        ("full", "dense"),
        ("partial_fixed", "interval"),
        ("partial", "partial"),
    ],
)
def test_the_official_names_of_densities(tmp_path: Path, file: Path, official: str, ours: str) -> None:
    for override in (f"reward.density.type={official}", f"reward.density={official}"):
        assert load_config(file, [override]).reward.density.type == ours
    for text in (f"reward: {{density: {official}}}", f"reward: {{density: {{type: {official}}}}}"):
        assert load_config(write(tmp_path / "d.yaml", VALID + text)).reward.density.type == ours
    quoted = write(tmp_path / "q.yaml", VALID + f"reward: {{density: '{official}'}}")
    assert load_config(quoted).reward.density.type == ours


def test_a_density_by_name_keeps_the_base_files_interval(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", VALID + "reward: {density: {type: interval, every: 7}}\n")
    top = write(tmp_path / "top.yaml", "base: base.yaml\nreward: {density: partial}\n")
    assert load_config(top).reward.density.every == 7
    density = load_config(top, ["reward.density=interval"]).reward.density
    assert (density.type, density.every) == ("interval", 7)


def test_grpo_is_rewarded_by_correctness_unless_a_layer_contradicts(file: Path) -> None:
    assert load_config(file, ["algorithm.type=grpo"]).reward.type == "correctness"
    assert load_config(file).reward.type == "discriminator"
    assert "reward.type=correctness" in message(file, "algorithm.type=grpo", "reward.type=discriminator")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("End with #### and the number", "End with #### and the number"),
        ("#3", "#3"),
        ("sweep #3", "sweep #3"),
        ("a\t#b", "a\t#b"),
        ("it's #1: the first", "it's #1: the first"),
        ("'quoted #1'", "quoted #1"),
        ('"quoted #1"', "quoted #1"),
        ("C#", "C#"),
    ],
)
def test_a_hash_in_an_override_is_a_character(file: Path, written: str, meant: str) -> None:
    assert load_config(file, [f"data.system_prompt={written}"]).data.system_prompt == meant
    assert load_config(file, ["tracking.tags={note: 'a #b'}"]).tracking.tags == {"note": "a #b"}


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "start"),
    [
        ("policy.kl=0", "unknown key policy.kl (value 0): the nearest key is policy.kl_coefficient"),
        ("reward.densty=dense", "unknown key reward.densty (value dense): the nearest key is reward.density"),
        ("policy.lr=1", "unknown key policy.lr (value 1): the nearest key is policy.learning_rate"),
        ("steps=3", "unknown key steps (value 3): the nearest key is trainer.steps"),
        ("rewards.clip=[0,1]", "unknown key rewards.clip (value [0, 1]): the nearest key is reward.clip"),
        ("seed.x=1", "unknown key seed.x (value 1): the nearest key is seed"),
        ("model.policy.build.width=3", "unknown key model.policy.build.width (value 3): the nearest key is "),
        ("trainer.steps=soon", "trainer.steps=soon: must be a whole number"),
        ("trainer.steps=2.5", "trainer.steps=2.5: must be a whole number"),
        ("trainer.steps='8'", "trainer.steps=8: must be a whole number"),
        ("seed=true", "seed=true: must be a whole number"),
        ("name=3", "name=3: must be text"),
        ("rollout.prefix_caching=yes", "rollout.prefix_caching=yes: must be true or false"),
        ("policy=fast", "policy=fast: must be a section"),
        ("policy.learning_rate=.inf", "policy.learning_rate=Infinity: must be a finite number"),
        ("policy.learning_rate=.nan", "policy.learning_rate=NaN: must be a finite number"),
        ("eval.k=5", "eval.k=5: must be a list such as [a, b]"),
        ("eval.k=[0]", "eval.k=[0]: must be greater than 0"),
        ("reward.clip=[1]", "reward.clip=[1]: has too few values"),
        ("trainer.prompts_per_step=-4", "trainer.prompts_per_step=-4: must be greater than 0"),
        ("rollout.max_completion_tokens=0", "rollout.max_completion_tokens=0: must be greater than 0"),
        ("model.policy.lora.rank=0", "model.policy.lora.rank=0: must be greater than 0"),
        ("policy.betas=[0.9, 1.0]", "policy.betas=[0.9, 1.0]: must be less than 1"),
        ("learner.zero_stage=4", "learner.zero_stage=4: must be less than or equal to 3"),
        ("reward.density.type=thick", "reward.density.type=thick: must be 'sparse', 'interval',"),
        ("reward.density=thick", "reward.density.type=thick: must be 'sparse', 'interval',"),
        ("discriminator.loss.type=mse", "discriminator.loss.type=mse: must be 'bce', 'wgan',"),
        ("model.policy.lora.target_modules=5", "model.policy.lora.target_modules=5: must be a list such as"),
        ("base=x.yaml", "unknown key base"),
        ("seed", "'seed' is not an override; write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("a..b=3", "'a..b=3' is not an override"),
        ("data.path=", "data.path= has no value; write data.path=null"),
        ("seed=[1", "seed=[1: malformed YAML"),
        ("eval.k=[1, 4] # two", "eval.k=[1, 4] # two: malformed YAML: opens with [ and does not end with ]"),
        ("eval.k=[1 #, 4]", "eval.k=[1 #, 4]: malformed YAML"),
        ("trainer.steps=5 # few", "trainer.steps=5 # few: must be a whole number"),
        ("reward.density.every=3", "reward.density.every=3: only `interval` has one"),
    ],
)  # fmt: skip
def test_bad_overrides_are_one_line_with_key_value_and_remedy(file: Path, override: str, start: str) -> None:
    text = message(file, override)
    assert "\n" not in text
    assert text.startswith(f"command line: {start}"), text


def test_errors_in_a_file_name_file_and_line(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", VALID + "trainer:\n  steps: -1\n")
    top = write(tmp_path / "top.yaml", "base: base.yaml\nreward:\n  densty: dense\n")
    assert message(top).startswith(f"{top}:3: unknown key reward.densty (value dense)")
    assert (
        message(write(top, "base: base.yaml\n"))
        == f"{tmp_path}/base.yaml:5: trainer.steps=-1: must be greater than 0"
    )


def test_several_errors_are_one_whole_line_each(file: Path) -> None:
    lines = message(file, "seed=-1", "trainer.steps=x").splitlines()
    assert len(lines) == 2
    assert all(line.startswith("command line: ") and ": must be " in line for line in lines)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("seed: 1\nname: a\nseed: 2\n", ":3: seed is given twice, first in line 1"),
        ("trainer:\n  steps: 1\n  steps: 2\n", ":3: trainer.steps is given twice, first in line 2"),
        ("seed: [1\nname: a\n", ": malformed YAML"),
        ("a: 1\n b: 2\n", ":2: malformed YAML"),
        ("- 1\n", "holds list, not a mapping"),
        ("just text\n", "holds str, not a mapping"),
        ("a: &x {b: *x}\n", "contains itself"),
        ("name: !!python/object/apply:os.getcwd []\n", ":1: malformed YAML"),
        ("base: [1]\n", ":1: base=[1]: must be the path of a YAML file, or a list"),
        ("seed: 1\nbase: {a: b}\n", ':2: base={"a": "b"}: must be the path of a YAML file, or a list'),
        ("name: x\nname : y\n", ":2: name is given twice"),
    ],
)
def test_malformed_files_name_the_line(tmp_path: Path, text: str, fragment: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    error = message(path)
    assert error.startswith(str(path))
    assert fragment in error
    assert "\n" not in error


def test_unreadable_files(tmp_path: Path) -> None:
    assert "no such file" in message(tmp_path / "nope.yaml")
    assert "is a folder" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in message(tmp_path / "binary.yaml")


def test_an_empty_file_is_a_config_without_a_model(tmp_path: Path) -> None:
    assert "no policy model" in message(write(tmp_path / "empty.yaml", ""))


def test_a_former_name_is_answered_with_the_present_one() -> None:
    keys = "policy.clip_norm discriminator.warmup_share policy.importance_cap trainer.failure_retries"
    for key in keys.split():
        section, _, name = key.partition(".")
        present = f"{section}.{RENAMED[name]}"
        assert present in known_keys() and nearest_key(key) == present


def test_a_former_value_is_answered_with_the_present_one(tmp_path: Path) -> None:
    said = message(write(tmp_path / "a.yaml", "eval: {localisation_kinds: [slip]}\n"))
    assert said.endswith("""eval.localisation_kinds=["slip"]: 'slip' is called 'propagated_error' now"""), said


def test_nearest_keys_are_valid_keys() -> None:
    keys = set(known_keys())
    assert {"reward.density.type", "model.policy.lora.rank", "model.policy.build.heads", "seed"} <= keys
    for key in sorted(keys)[::9]:
        assert nearest_key(key) == key
        assert nearest_key(key[:-1]) in keys


# --- files and folders ----------------------------------------------------------------------------


def test_an_unwritable_output_folder_is_named(tmp_path: Path, file: Path) -> None:
    blocker = write(tmp_path / "blocked", "a file")
    with pytest.raises(ConfigError, match=rf"output_dir={blocker}: the run folder .* cannot be written"):
        check_output(load_config(file, [f"output_dir={blocker}"]))
    with pytest.raises(ConfigError, match="output_dir=/proc/nowhere"):
        check_output(load_config(file, ["output_dir=/proc/nowhere"]))
    check_output(load_config(file, [f"output_dir={tmp_path}/runs", "name=a/b"]))
    assert list((tmp_path / "runs/a/b").iterdir()) == []


def test_missing_files_are_named(tmp_path: Path, file: Path) -> None:
    config = load_config(
        file,
        [
            "data.task=jsonl",
            "data.path=./nope.jsonl",
            "data.demonstrations=experts",
            "model.policy.chat_template=t.jinja",
        ],
    )
    with pytest.raises(ConfigError) as error:
        check_files(config)
    assert [line.split("=")[0] for line in str(error.value).splitlines()] == [
        "data.path", "data.demonstrations", "model.policy.chat_template",
    ]  # fmt: skip
    check_files(load_config(file, ["data.task=jsonl", "data.path=org/hub-id"]))
