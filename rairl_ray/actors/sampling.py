"""Line maps around a rollout engine: samples of problems, and log-probabilities of given completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from rairl_ray.actors.chunks import Line
from rairl_ray.actors.rollout import sampling_seed
from rairl_ray.actors.rollout_actor import open_engine
from rairl_ray.config.schema import RunConfig
from rairl_ray.data.rendering import Renderer, load_tokenizer
from rairl_ray.engines.rollout_engine import Generation, GenerationRequest, RolloutEngine, SamplingSettings
from rairl_ray.types import Prompt, Trace

STREAM = "eval/heldout"
"""The stream of a run's own evaluations: with equal weights, `evaluate` draws the same samples again."""


class _EngineLines:
    """A rollout engine that serves a model as it lies on disk."""

    def __init__(
        self, config: RunConfig, policy_path: str, device: Literal["cpu", "cuda"], system_prompt: str
    ) -> None:
        tokenizer = load_tokenizer(policy_path, config.model.policy)
        self._config = config
        self._renderer = Renderer(tokenizer, system_prompt, config.data.system_role)
        self._engine: RolloutEngine = open_engine(config, policy_path, device)
        self._engine.mark_synced(0)


class SampleLines(_EngineLines):
    """`eval.samples_per_prompt` samples of each line's problem (`prompt_id`, `question`)."""

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """One row a sample, all samples of a problem together."""
        config = self._config
        settings = SamplingSettings(
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            max_tokens=config.rollout.max_completion_tokens,
        )
        asked = [(line.values, sample) for line in lines for sample in range(config.eval.samples_per_prompt)]
        requests = [
            GenerationRequest(
                prompt_ids=self._renderer.prompt_ids(_prompt(values)),
                seed=sampling_seed(config.seed, STREAM, values["prompt_id"], sample),
            )
            for values, sample in asked
        ]
        made = self._engine.generate(requests, settings)
        return [
            _sampled(values, sample, generation)
            for (values, sample), generation in zip(asked, made, strict=True)
        ]


class LogprobLines(_EngineLines):
    """Adds the policy's log-probability of every completion token to lines that have none."""

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """One row a line, with `policy_logprobs` and `tokens`; a trace beyond the window says so in `error`."""
        rows = [dict(line.values) for line in lines]
        tokens = [self._renderer.tokenize(_trace(values), same_tokenizer=True) for values in rows]
        window = self._config.data.max_prompt_tokens + self._config.rollout.max_completion_tokens
        fitting = []
        for index, token in enumerate(tokens):
            if "policy_logprobs" in rows[index]:
                continue
            length = len(token.prompt_ids) + len(token.completion_ids)
            if length <= window:
                fitting.append(index)
            else:
                rows[index]["error"] = f"{length} tokens are more than the window of {window}"
        scores = self._engine.score_tokens(
            [tokens[index].prompt_ids for index in fitting], [tokens[index].completion_ids for index in fitting]
        )
        for index, values in zip(fitting, scores, strict=True):
            rows[index] |= {"policy_logprobs": values, "tokens": len(values)}
        return rows


def _prompt(values: dict[str, Any]) -> Prompt:
    return Prompt(id=values["prompt_id"], question=values["question"])


def _trace(values: dict[str, Any]) -> Trace:
    return Trace(
        prompt=_prompt(values),
        text=values["generation"],
        finished=values.get("finish_reason") != "length",
    )


def _sampled(values: dict[str, Any], sample: int, made: Generation) -> dict[str, Any]:
    return {
        **values,
        "generation": made.text,
        "generation_idx": sample,
        "finish_reason": made.finish_reason,
        "tokens": len(made.token_ids),
        "token_ids": list(made.token_ids),
        "policy_logprobs": list(made.logprobs),
    }
