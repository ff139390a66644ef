"""Three servants of one protocol: the live discriminator, a saved reward model, the task's own grade."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rairl_ray.config.schema import Model, Reward, RunConfig
from rairl_ray.data.characters import character_tokenizer
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.data.tasks import make_task
from rairl_ray.engines.artifacts import save_reward_model
from rairl_ray.engines.heads import ScalarModel
from rairl_ray.engines.models import load_token_classifier, resolve_model
from rairl_ray.evaluation.localisation import injected_errors
from rairl_ray.metrics import PhaseTimer
from rairl_ray.rewards.grade import TaskGrade
from rairl_ray.rewards.live import LiveReward
from rairl_ray.rewards.reading import TraceReader
from rairl_ray.rewards.saved import SavedReward
from rairl_ray.rewards.scorer import Scorer
from rairl_ray.trainer.evaluator import Evaluator
from rairl_ray.trainer.grpo import GrpoStrategy
from rairl_ray.types import DiscriminatorSample, Rollout, RolloutGroup, Trace
from tests.finished import trained_a_little

CONFIG = RunConfig.model_validate({
    "model": {"policy": {"build": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 32}}},
    "reward": {"density": {"type": "partial"}, "temperature": 2.0},
    "discriminator": {"head": "scalar"}, "data": {"limit": 4, "eval_limit": 4},
})  # fmt: skip
TASK = make_task(CONFIG.data, CONFIG.seed)
PROMPT = TASK.eval[0].prompt
RIGHT = f"<think>\n1+1=2\n2+2=4\n</think>\n<answer>\n{PROMPT.answer}\n</answer>"
TEXTS = [RIGHT, RIGHT.replace(f"\n{PROMPT.answer}\n", "\n-1\n"), ""]
NOBODY: Any = None


class Judge:
    """Stands where the discriminator's workers stand; a unit's logit is its place."""

    def score(self, samples: list[DiscriminatorSample]) -> tuple[list[np.ndarray], int]:
        return [np.arange(len(sample.unit_tokens), dtype=np.float32) for sample in samples], 7


@pytest.fixture(scope="module")
def servants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scorer]:
    folder = tmp_path_factory.mktemp("reward")
    base = resolve_model(CONFIG.model.policy, role="policy", cache_dir=folder, seed=0)
    module = ScalarModel(load_token_classifier(base, Model(), outputs=1))
    save_reward_model(folder / "saved", module, trained_a_little(module), base, CONFIG, 7)
    renderer = Renderer(load_tokenizer(base, Model()), "")
    judge: Any = Judge()
    reader = TraceReader(renderer, CONFIG.reward.density, renderer.fingerprint)
    return {
        "live": LiveReward(judge, reader, CONFIG.reward),
        "saved": SavedReward(folder / "saved"),
        "grade": TaskGrade(TASK, Reward(type="official")),
    }


@pytest.mark.parametrize(("name", "version"), [("live", 7), ("saved", 7), ("grade", None)])
def test_every_servant_answers_for_each_trace_in_order_with_its_version(
    name: str, version: int | None, servants: dict[str, Scorer]
) -> None:
    scorer = servants[name]
    traces = [Trace(prompt=PROMPT, text=text, finished=bool(text)) for text in TEXTS]
    together, alone = scorer.score(traces), [scorer.score([trace])[0] for trace in traces]
    for trace, found, again in zip(traces, together, alone, strict=True):
        assert len(found.logits) == len(found.unit_tokens) == len(found.unit_char_ends)
        assert found.discriminator_version == version
        np.testing.assert_allclose(found.logits, again.logits, atol=1e-5)
        if len(found.logits):
            assert found.unit_char_ends[-1] == len(trace.text) + trace.finished or name == "grade"
            assert (np.diff(found.unit_tokens) > 0).all()
    assert len(together[0].logits) == (1 if name == "grade" else 6)
    assert bool(together[2].refusal) == (name == "saved")


def test_an_evaluation_takes_any_servant_and_no_strategy(servants: dict[str, Scorer]) -> None:
    rollouts = [
        Rollout(prompt_id=PROMPT.id, sample_index=index, text=text, token_ids=(1,), logprobs=(0.0,),
                finish_reason="stop", policy_version=0, seed=0)
        for index, text in enumerate(TEXTS)
    ]  # fmt: skip
    group = RolloutGroup(prompt=PROMPT, rollouts=tuple(rollouts))
    for name, scorer in servants.items():
        rows = Evaluator(CONFIG, TASK, NOBODY, scorer).rows([group])
        assert [row.discriminator_version for row in rows] == [None if name == "grade" else 7] * 3
        assert rows[0].score is not None
    graded = Evaluator(CONFIG, TASK, NOBODY, GrpoStrategy(TASK, NOBODY).scorer)
    assert graded.separation([group]) == 1.0
    assert [row.score is None for row in Evaluator(CONFIG, TASK, NOBODY, None).rows([group])] == [True] * 3


def test_a_sample_without_tokens_keeps_its_grade_and_has_no_token_to_give_it_to() -> None:
    renderer = Renderer(character_tokenizer(64), "")
    empty = Rollout(prompt_id=PROMPT.id, sample_index=0, text="", token_ids=(), logprobs=(),
                    finish_reason="length", policy_version=0, seed=0)  # fmt: skip
    group = RolloutGroup(prompt=PROMPT, rollouts=(empty,))
    [[trace]], metrics = GrpoStrategy(TASK, renderer).score([group], PhaseTimer())
    assert trace.token_rewards.shape == (0,) and trace.last_unit_reward == metrics["reward/mean"] == 0.0


def test_errors_to_localise_are_the_same_whatever_training_perturbs() -> None:
    seen = []
    for changes in ({}, {"count": 0}, {"kinds": ["answer"]}):
        config = CONFIG.model_copy(
            update={"discriminator": CONFIG.discriminator.model_validate({"perturbations": changes})}
        )
        seen.append([trace.text for trace in injected_errors(TASK.eval, config)])
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 4
    own = CONFIG.eval.model_copy(update={"localisation_kinds": ("answer",), "localisation_traces": 2})
    answers = CONFIG.model_copy(update={"eval": own})
    chosen = injected_errors(TASK.eval, answers)
    assert len(chosen) == 2
    for row, trace in zip(TASK.eval, chosen, strict=False):
        assert row.completion is not None and trace.edit_char is not None
        assert trace.edit_char > row.completion.index("<answer>")


def test_only_the_run_knows_strategies() -> None:
    root = Path(__file__).resolve().parents[2] / "rairl_ray"
    users = {
        path.stem
        for path in root.rglob("*.py")
        if "trainer.airl import" in path.read_text() or "trainer.grpo import" in path.read_text()
    }
    assert users == {"rl_trainer"}
