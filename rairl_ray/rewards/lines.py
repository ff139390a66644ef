"""Lines of a JSONL file with prompts and completions, and the same lines with their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rairl_ray.actors.chunks import Line
from rairl_ray.algorithms.rewards import selected_score, unit_rewards
from rairl_ray.config.schema import Eval
from rairl_ray.data.rows import BadRow, text_column
from rairl_ray.rewards.saved import SavedReward
from rairl_ray.rewards.scorer import Scorer
from rairl_ray.types import Prompt, Trace, TraceScores

PROMPTS = ("prompt", "question", "problem", "query", "instruction")
COMPLETIONS = ("generation", "completion", "response", "output", "solution", "text")
"""Columns that public files keep them in; the first one present counts."""


def question_of(values: Mapping[str, Any]) -> str:
    """What was asked. Raises BadRow."""
    messages = _messages(values)
    if messages is not None:
        asked = [message for message in messages if message.get("role") == "user"]
        if len(asked) != 1:
            raise BadRow(f"a conversation of {len(asked)} user turns; give rows of one question and one answer")
        return text_column(asked[0], "content")
    return text_column(values, _present(values, PROMPTS, "prompt"))


def completion_of(values: Mapping[str, Any]) -> str:
    """What was answered; it may be empty. Raises BadRow."""
    messages = values.get("messages")
    if isinstance(messages, list):
        last = messages[-1] if messages else {}
        if not isinstance(last, dict) or last.get("role") != "assistant":
            raise BadRow("column 'messages' does not end with an assistant turn")
        text = last.get("content")
    else:
        name = _present(values, COMPLETIONS, "generation")
        text = values[name]
    if not isinstance(text, str):
        raise BadRow(f"the completion is {type(text).__name__}, not text")
    return text


def trace_of_line(values: Mapping[str, Any], number: int, *, sampled_ids: bool = False) -> Trace:
    """The trace of a line; `finish_reason: length` marks one that was cut. Raises BadRow.

    sampled_ids: `token_ids` are the policy's own, from this project's sampling.
    """
    ids = values.get("token_ids") if sampled_ids else None
    return Trace(
        prompt=Prompt(id=str(number), question=question_of(values)),
        text=completion_of(values),
        finished=values.get("finish_reason") != "length",
        token_ids=None if ids is None else tuple(ids),
    )


def check_line(values: Mapping[str, Any]) -> None:
    """Raises BadRow for a line that cannot be scored."""
    trace_of_line(values, 0)


class ScoreLines:
    """Adds rewards to lines (`actors.chunks.LineMap`); opened inside an actor."""

    def __init__(
        self,
        folder: Path,
        selector: Eval,
        *,
        policy_fingerprint: str = "",
        keep_given: bool = False,
        **options: Any,
    ) -> None:
        self._reward: Scorer = SavedReward(folder, policy_fingerprint=policy_fingerprint, **options)
        self._selector = selector
        self._sampled = bool(policy_fingerprint)
        self._keep_given = keep_given

    def __call__(self, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """One row a line: its columns, the rewards of its units and where they end."""
        asked = [line for line in lines if not (self._keep_given and brings_reward(line.values))]
        traces = [trace_of_line(line.values, line.number, sampled_ids=self._sampled) for line in asked]
        scores = zip(asked, traces, self._reward.score(traces), strict=True)
        made = {line.number: self._row(line, trace, score) for line, trace, score in scores}
        return [made.get(line.number, line.values) for line in lines]

    def _row(self, line: Line, trace: Trace, score: TraceScores) -> dict[str, Any]:
        kept = dict(line.values)
        if self._sampled:
            kept.pop("token_ids", None)
        if score.refusal:
            return {**kept, "reward_model_score": None, "error": f"line {line.number}: {score.refusal}"}
        rewards = unit_rewards(score.logits, self._reward.reward, None)
        ends = [int(end) for end in score.unit_char_ends]
        starts = [0, *(min(end, len(trace.text)) for end in ends[:-1])]
        return {
            **kept,
            "reward_model_score": selected_score(rewards, self._selector),
            "unit_scores": [float(value) for value in rewards],
            "unit_char_ends": ends,
            "unit_spans": [[start, min(end, len(trace.text))] for start, end in zip(starts, ends, strict=True)],
            "discriminator_version": score.discriminator_version,
        }


def brings_reward(values: Mapping[str, Any]) -> bool:
    """Whether a line has a reward already."""
    return values.get("unit_scores") is not None or values.get("reward_model_score") is not None


def _messages(values: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """A conversation in `messages` or in `prompt`."""
    for name in ("messages", "prompt"):
        value = values.get(name)
        if isinstance(value, list) and all(isinstance(message, dict) for message in value):
            return value
    return None


def _present(values: Mapping[str, Any], columns: Sequence[str], wanted: str) -> str:
    for name in columns:
        if values.get(name) is not None:
            return name
    there = ", ".join(map(str, values)) or "none"
    raise BadRow(f"no column {wanted!r} (nor {', '.join(columns[1:])}; there are: {there})")
