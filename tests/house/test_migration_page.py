"""docs/from-expert-reasoning.md: every command, file and key that it tells a user to write is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch import app
from rairl_ray.config.key_names import known_keys
from rairl_ray.config.load import load_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from-expert-reasoning.md").read_text(encoding="utf-8")
VERBS = {info.callback.__name__ if info.callback else "" for info in app.registered_commands}

COMMANDS = sorted(set(re.findall(r"launch\.py +([^`#;\n]+)", PAGE)))


def unshelled(command: str) -> list[str]:
    """Words of a command; a loop's variable is one of its values."""
    return shlex.split(
        command.replace('"$file"', "experiments/gsm8k/qwen2.5-7b_sft.yaml").replace("$row", "sft")
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_a_verb_a_row_and_keys_that_exist(command: str) -> None:
    verb, *words = unshelled(command)
    assert verb in VERBS
    overrides = [word for word in words if "=" in word]
    rows = [
        ROOT / (word if word.endswith(".yaml") else f"experiments/{word}.yaml")
        for word in words
        if "/" in word and "=" not in word
    ]
    assert rows or words == [], "a row of experiments/ in every command with arguments"
    for row in rows:
        load_config(row, overrides)
    for override in overrides:
        if override.startswith("eval.reward="):
            assert (ROOT / "experiments" / f"{override.partition('=')[2]}.yaml").is_file()


def test_every_verb_of_the_page_and_every_file_of_the_first_version_is_tried() -> None:
    assert {command.split()[0] for command in COMMANDS} == {
        "plan", "train", "evaluate", "score", "transfer", "report",
    }  # fmt: skip
    for path in (ROOT / "experiments" / "v1").glob("*.yaml"):
        assert any(f"v1/{path.name}" in command for command in COMMANDS), path.name


def test_every_file_pattern_of_the_page_finds_files() -> None:
    for pattern in re.findall(r"in (experiments/\S+\*\.yaml);", PAGE):
        assert list(ROOT.glob(pattern)), pattern
    for folder, names in re.findall(r"`experiments/(\w+)/\{([^}]+)\}\.yaml`", PAGE):
        files = {path.stem for path in (ROOT / "experiments" / folder).glob("*.yaml")}
        assert set(names.split(",")) == files


def keys_of_table() -> list[str]:
    """Keys of ours: the second column of the table of keys."""
    table = PAGE.split("## Keys\n")[1].split("\n## ")[0]
    cells = [line.split(" | ")[1] for line in table.splitlines()[3:] if line.count(" | ") >= 2]
    return [key for cell in cells for key in re.findall(r"`([\w.]+)", cell)]


def test_every_key_of_ours_is_a_key() -> None:
    keys = keys_of_table()
    values = {"sparse", "partial", "interval", "dense", "sequence", "discounted", "single", "balanced"}
    values |= {"expert", "expert_and_correct", "operator", "answer", "numbers"}
    assert len(keys) > 60
    assert sorted(set(keys) - set(known_keys()) - values) == []


def test_every_official_key_of_the_two_readmes_is_in_the_table() -> None:
    table = PAGE.split("## Keys\n")[1].split("\n## ")[0]
    for key in (
        "wandb.run_name",
        "training.output_dir",
        "model.dense_rewards",
        "model.num_neg_perturbations_per_expert",
        "model.classifier_loss",
    ):
        assert f"`{key}`" in table
    assert "`eval.mode`" in PAGE


def test_every_override_beside_a_command_is_one() -> None:
    """`key=value` in backticks, in the columns and sentences that speak of ours."""
    official = ("model.dense", "model.num_neg", "model.classifier", "wandb", "training")
    named = re.findall(r"`((?:[a-z_]+\.)+[a-z_]+)=[^`]*`", PAGE)
    assert named
    assert [key for key in named if not key.startswith(official) and key not in known_keys()] == []
