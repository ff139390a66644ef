"""A discriminator over a saved reward: the same scores before and after, or one line that says why not."""

from __future__ import annotations

import json
import logging
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rairl_ray.actors.discriminator import DiscriminatorActor
from rairl_ray.algorithms.rewards import unit_rewards
from rairl_ray.checkpoint import CheckpointStore
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.batching import discriminator_tensors
from rairl_ray.data.characters import CHAT_TEMPLATE
from rairl_ray.engines.artifacts import read_settings, save_reward_model
from rairl_ray.engines.heads import ScalarModel
from rairl_ray.engines.weights import exported_name
from rairl_ray.errors import ConfigError, ModelError, ResumeError
from rairl_ray.evaluation.rows import read_rows
from rairl_ray.rewards.reading import sample_of
from rairl_ray.rewards.saved import SavedReward
from rairl_ray.runfolder import RunFolder
from rairl_ray.trainer.async_checkpointer import references
from rairl_ray.trainer.prepare import Prepared, prepare
from rairl_ray.trainer.worker_groups import cluster
from rairl_ray.types import Prompt, Trace
from tests.faults import events
from tests.finished import finished_run, trained_a_little
from tests.inprocess import config_of, killed_after, rows_of, run

FROZEN = (
    "discriminator.updates_per_policy_step=0",
    "discriminator.warmup_steps=0",
    "discriminator.warmup_max_steps=null",
    "discriminator.warmup_pool_prompts=null",
)
HEADS = {
    "scalar": ("discriminator.head=scalar", "discriminator.loss.level=unit"),
    "implicit": ("discriminator.head=implicit",),
}
FOREIGN = (
    "data.task=countdown",
    "data.countdown.numbers=3",
    "data.max_prompt_tokens=64",
    "data.system_prompt=Go.",
)
"""Another domain than the reward's, and another system prompt."""
TRACES = [
    Trace(prompt=Prompt(id=str(i), question="Numbers: 12, 34."), text=text)
    for i, text in enumerate(("12+34=46\n46-1=45", "<think>\n3*14\n</think>\n<answer>\n42\n</answer>", "7"))
]


def using(path: object, output: Path, head: str, *overrides: str) -> RunConfig:
    return config_of(
        "airl", output, "name=user", f"model.discriminator.path={path}", *HEADS[head], *FOREIGN, *overrides
    )


def actor_of(prepared: Prepared) -> DiscriminatorActor:
    """A rank without DeepSpeed: its module is what the engine would get."""
    return DiscriminatorActor(
        0, prepared.config, prepared.discriminator_path, prepared.reader.renderer.pad_id, "cpu"
    )


@torch.no_grad()
def scores_in_training(prepared: Prepared) -> list[np.ndarray]:
    """Unit logits of TRACES under the discriminator as a run would begin."""
    actor = actor_of(prepared)
    module = actor.module().eval()
    reads = [prepared.reader.read(trace) for trace in TRACES]
    tensors = discriminator_tensors([sample_of(read) for read in reads], actor.pad_id)
    values = actor._outputs(tensors, module)[0].values.numpy()
    return [values[i, : len(read.unit_tokens)] for i, read in enumerate(reads)]


def saved_scores(folder: Path) -> list[np.ndarray]:
    answers = SavedReward(folder, system_prompt="ignored: it was saved with its own").score(TRACES)
    return [answer.logits for answer in answers if not answer.refusal]


def exported(prepared: Prepared, target: Path, seed: int | None = None) -> Path:
    """The start as a run would export it: as it is, or trained a little."""
    module = actor_of(prepared).module()
    state = {exported_name(n): p.detach() for n, p in module.named_parameters() if p.requires_grad}
    if seed is not None:
        state = trained_a_little(module, seed)
    save_reward_model(target, module, state, prepared.discriminator_path, prepared.config, 0)
    return target


def two_digit_model(folder: Path) -> Path:
    """A small Llama whose tokenizer reads two digits as one token: another tokenisation of the same texts."""
    pairs = [a + b for a in string.digits for b in string.digits]
    words = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "\ufffd", *pairs, *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="\ufffd"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[0-9]{2}|[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=256, **shape)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder with a finished run of each head, and one with another tokenizer."""
    output = tmp_path_factory.mktemp("saved")
    for head, overrides in HEADS.items():
        finished_run(output, f"reward/{head}", *overrides)
    other = two_digit_model(output / "two-digit")
    path = (f"model.policy.path={other}", "model.policy.build=null")
    finished_run(output, "reward/other", *HEADS["implicit"], *path)
    return output


@pytest.mark.parametrize("rank", ["null", "4"])
@pytest.mark.parametrize("head", HEADS)
def test_a_frozen_start_scores_as_saved_and_exports_what_it_was(
    head: str, rank: str, saved: Path, tmp_path: Path
) -> None:
    folder = RunFolder(saved / "reward" / head).final_reward_model
    prepared = prepare(
        using(saved / "reward" / head, tmp_path, head, *FROZEN, f"model.discriminator.lora.rank={rank}")
    )
    expected = saved_scores(folder)
    assert min(np.abs(values).max() for values in expected) > 1e-2
    for found, values in zip(scores_in_training(prepared), expected, strict=True):
        np.testing.assert_allclose(found, values, rtol=0, atol=1e-6)
    target = exported(prepared, tmp_path / "exported")
    before, after = (load_file(place / "model.safetensors") for place in (folder, target))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    for found, values in zip(saved_scores(target), expected, strict=True):
        np.testing.assert_array_equal(found, values)
    was, became = read_settings(folder), read_settings(target)
    assert was is not None and became is not None
    for name in ("head", "beta", "loss", "level", "density", "clip", "reference_checksum", "system_prompt"):
        assert getattr(was, name) == getattr(became, name), name


def test_a_lora_start_that_learns_on_keeps_the_saved_reference(saved: Path, tmp_path: Path) -> None:
    """Not the saved weights with the adapter switched off, from which the log-ratio would begin at 0."""
    prepared = prepare(
        using(saved / "reward" / "implicit", tmp_path, "implicit", "model.discriminator.lora.rank=4")
    )
    target = exported(prepared, tmp_path / "exported", seed=5)
    start = RunFolder(saved / "reward" / "implicit").final_reward_model
    was, became = read_settings(start), read_settings(target)
    assert was is not None and became is not None and became.reference_checksum == was.reference_checksum
    references_ = [load_file(place / "reference" / "model.safetensors") for place in (start, target)]
    assert all(torch.equal(references_[0][name], references_[1][name]) for name in references_[0])
    differences = [np.abs(a - b).max() for a, b in zip(saved_scores(target), saved_scores(start), strict=True)]
    assert max(differences) > 1e-2


def test_a_reward_of_another_tokenizer_reads_with_its_own(saved: Path, tmp_path: Path) -> None:
    prepared = prepare(using(saved / "reward" / "other", tmp_path, "implicit", *FROZEN))
    assert not prepared.reader.same_tokenizer
    folder = RunFolder(saved / "reward" / "other").final_reward_model
    for found, values in zip(scores_in_training(prepared), saved_scores(folder), strict=True):
        np.testing.assert_allclose(found, values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", ["reward/scalar", "{0}/reward/scalar/final/reward_model", "{0}/copy"])
def test_a_reward_is_named_by_run_folder_or_copy(place: str, saved: Path, tmp_path: Path) -> None:
    if place == "{0}/copy":
        shutil.copytree(RunFolder(saved / "reward" / "scalar").final_reward_model, saved / "copy")
    config = using(place.format(saved), tmp_path, "scalar", *FROZEN).model_copy(
        update={"output_dir": str(saved)}
    )
    start = prepare(config).start
    assert start is not None and start.frozen and "it stays as it is" in start.describe()
    assert isinstance(actor_of(prepare(config)).module(), ScalarModel)


def test_a_run_without_a_reward_is_no_start(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "config.yaml").write_text("name: sft\n")
    with pytest.raises(ModelError, match=r"no reward model there: no reward\.json"):
        prepare(using(tmp_path / "sft", tmp_path, "scalar", *FROZEN))
    ordinary = using(RunFolder(saved / "reward" / "scalar").final_policy, tmp_path, "scalar", *FROZEN)
    assert prepare(ordinary).start is None


CONTRADICTIONS = {
    "discriminator.beta": ("discriminator.beta=0.25", "=0.5 (configuration: 0.25)"),
    "reward.density.type": ("reward.density.type=dense", "=partial (configuration: dense)"),
    "reward.temperature": ("reward.temperature=2", "=1.0 (configuration: 2.0)"),
    "reward.clip": ("reward.clip=null", "=[-5.0, 0.0] (configuration: null)"),
}


def test_contradictions_of_a_frozen_reward_are_one_line_with_both_values(saved: Path, tmp_path: Path) -> None:
    changes = [override for override, _ in CONTRADICTIONS.values()]
    with pytest.raises(ConfigError) as raised:
        prepare(using(saved / "reward" / "implicit", tmp_path, "implicit", *FROZEN, *changes))
    text = str(raised.value)
    assert "\n" not in text and "reward.json" in text and "updates_per_policy_step=1" in text
    for key, (_, said) in CONTRADICTIONS.items():
        assert f"{key}{said}" in text


def test_what_learns_on_keeps_its_head_and_warns_of_the_rest(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        start = prepare(
            using(saved / "reward" / "implicit", tmp_path, "implicit", "reward.density.type=dense")
        ).start
    assert start is not None and not start.frozen
    assert "learns on, but was saved with reward.density.type=partial (configuration: dense)" in caplog.text
    with pytest.raises(ConfigError, match=r"discriminator\.head=implicit \(configuration: scalar\)"):
        prepare(using(saved / "reward" / "implicit", tmp_path, "scalar"))
    with pytest.raises(ConfigError, match=r"without the potential h\) \(configuration: airl\)"):
        prepare(using(saved / "reward" / "scalar", tmp_path, "scalar", "discriminator.loss.type=airl"))


def test_a_damaged_start_is_refused(saved: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(RunFolder(saved / "reward" / "implicit").final_reward_model, copy)
    prepared = prepare(using(copy, tmp_path, "implicit", *FROZEN))
    before = references(prepared)
    assert set(before) == {"discriminator", "discriminator's reference"}
    file = copy / "reference" / "model.safetensors"
    save_file({name: tensor + 1e-3 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(ModelError, match="other weights than in training"):
        actor_of(prepared).module()
    changed = [role for role, found in references(prepared).items() if found != before[role]]
    assert changed == ["discriminator's reference"]
    (copy / "reward.json").write_text(json.dumps({"head": "implicit"}))
    with pytest.raises(ModelError, match="not the file of a saved reward"):
        prepare(using(copy, tmp_path, "implicit", *FROZEN))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "name"), [("scalar", "reward/scalar"), ("implicit", "reward/other")])
def test_a_policy_learns_from_a_frozen_foreign_reward(
    head: str, name: str, saved: Path, tmp_path: Path
) -> None:
    """Countdown under a reward of arithmetic, with the same tokenizer and with another; stopped and resumed."""
    copy = tmp_path / "foreign"
    shutil.copytree(RunFolder(saved / name).final_reward_model, copy)
    config = using(copy, tmp_path / "runs", head, *FROZEN, "eval.samples_per_prompt=8")
    with cluster(config):
        rows = run(config)
        folder = RunFolder(tmp_path / "runs" / "user")
        assert len(events(folder.root, "stays as it is")) == 1
        assert [row["step"] for row in rows if "policy/loss" in row] == [1, 2]
        reward, compared = SavedReward(copy), 0
        for row in read_rows(folder.evaluation("final") / "rows.jsonl"):
            trace = Trace(
                prompt=Prompt(id=row.prompt_id, question=row.question),
                text=row.generation,
                finished=row.finish_reason == "stop",
            )
            if head == "scalar" and len(reward._reader.read(trace).tokens.completion_ids) != row.tokens:
                continue  # sampled ids hold special tokens, which the text does not
            (score,) = reward.score([trace])
            if score.refusal:
                assert not row.unit_scores, score.refusal
                continue
            found = unit_rewards(score.logits, reward.reward, None)
            np.testing.assert_allclose(row.unit_scores, found, rtol=0, atol=1e-5)
            compared += 1
        assert compared
        final = folder.final_reward_model
        before, after = (load_file(place / "model.safetensors") for place in (copy, final))
        assert all(torch.equal(before[name], after[name]) for name in before)
        manifest = CheckpointStore(folder.root).manifest(folder.root / "checkpoints" / "step-000001")
        assert manifest["references"]["discriminator"]["path"] == str(copy)
        cut = killed_after(config, 1, tmp_path / "cut")
        assert run(cut, resume=True) == rows == rows_of(config)
        weights = copy / ("model.safetensors" if head == "scalar" else "reference/model.safetensors")
        save_file({n: t + 1e-3 for n, t in load_file(weights).items()}, weights, {"format": "pt"})
        cut = killed_after(config, 1, tmp_path / "changed")
        with pytest.raises(ResumeError, match="the frozen weights of the discriminator"):
            run(cut, resume=True)
