"""Expert texts from data files: into the one completion format, and from a file of their own."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from pathlib import Path

from rairl_ray.config.schema import Data
from rairl_ray.data.completion_format import (
    ANSWER_CLOSE,
    ANSWER_OPEN,
    TAGS,
    format_completion,
    is_well_formed,
)
from rairl_ray.data.grading import extract_answer
from rairl_ray.data.rows import BadRow, BadRowReport, optional_text_column, read_file, text_column
from rairl_ray.errors import DataError
from rairl_ray.types import Demonstration

_CALCULATION = re.compile(r"<<[^<>]*>>")
_LAST_HASHES = re.compile(r"^[ \t]*####[^\n]*\s*\Z", re.MULTILINE)
_ANSWER_SECTION = re.compile(rf"{ANSWER_OPEN}.*?{ANSWER_CLOSE}", re.DOTALL)
_CONCLUSION = re.compile(
    r"\b(?:answer|result)\s*(?:is|=|:|is:)\s*(?:option\s+)?(\S[^\n]*?)\s*(?:\.\s|\.?\s*$|\n)",
    re.IGNORECASE | re.MULTILINE,
)
CONCLUSION_CHARACTERS = 400
"""At the end of a text, in which it may state its answer in words."""

_log = logging.getLogger(__name__)


def expert_completion(text: str, _gold: str | None = None) -> str:
    """A chain of thought, an expert's or a wrong one, in the format of docs/method.md 5.

    Already formatted text stays as it is. Otherwise the reasoning goes inside <think> without calculator
    marks (`<<3+5=8>>`) and the `####` line of the answer, and the answer is the one that the text itself
    marks, or states in words at its end ("the answer is 5"). It is never the gold one, which may be
    given and is not looked at: a text with neither stays verbatim."""
    if is_well_formed(text):
        return text.strip()
    answer = own_answer(text)
    return text.strip() if answer is None else composed_completion(text, answer)


def own_answer(text: str) -> str | None:
    """What a chain concludes: the answer that it marks, or else states in words at its end."""
    marked = extract_answer(text)
    if marked is not None or ANSWER_OPEN in text or "\\boxed" in text:
        return marked
    stated = _CONCLUSION.findall(text[-CONCLUSION_CHARACTERS:])
    return stated[-1].strip(" *:$") or None if stated else None


def composed_completion(text: str, answer: str) -> str:
    """A text as the reasoning (as in `expert_completion`) before the answer that belongs to it.

    For data that keep an expert's chain and its answer in two columns; a chain that marks or states another
    answer is the caller's to find (`own_answer`).
    """
    reasoning = _ANSWER_SECTION.sub("", _LAST_HASHES.sub("", _CALCULATION.sub("", text)))
    return format_completion(_untagged(reasoning), _untagged(answer))


def _untagged(text: str) -> str:
    for tag in TAGS:
        text = text.replace(tag, "")
    return text.strip()


def with_demonstrations(rows: list[Demonstration], keys: list[str], data: Data) -> list[Demonstration]:
    """Rows with the experts of `data.demonstrations` in place of their own, matched by `keys` [N].

    The file has the columns `data.fields.demonstration` and, to match, `data.fields.id` or else
    `data.fields.prompt`. Rows that it does not know have no expert. Raises DataError if it matches none.
    """
    assert data.demonstrations is not None
    texts = _read_demonstrations(data.demonstrations, data)
    replaced = [
        replace(row, completion=expert_completion(texts[key]) if key in texts else None)
        for row, key in zip(rows, keys, strict=True)
    ]
    matched = sum(row.completion is not None for row in replaced)
    if not matched:
        column = data.fields.id or data.fields.prompt
        raise DataError(
            f"data.demonstrations={data.demonstrations}: no row matches a training problem "
            f"by column {column!r}; set data.fields.id or data.fields.prompt"
        )
    if matched < len(replaced):
        _log.warning(
            "%s: %d of %d training problems have no expert", data.demonstrations, len(rows) - matched, len(rows)
        )
    return replaced


def _read_demonstrations(source: str, data: Data) -> dict[str, str]:
    if not Path(source).is_file():
        raise DataError(f"data.demonstrations={source}: no such file")
    if data.fields.demonstration is None:
        raise DataError("data.fields.demonstration is null; name the column of data.demonstrations to read")
    report = BadRowReport(source, data.on_bad_row)
    texts: dict[str, str] = {}
    for row in read_file(Path(source), report):
        try:
            key = text_column(row.values, data.fields.id or data.fields.prompt).strip()
            text = optional_text_column(row.values, data.fields.demonstration)
            if text is None:
                raise BadRow(f"no text in column {data.fields.demonstration!r}")
            texts.setdefault(key, text)
        except BadRow as error:
            report.add(row.place, error)
    report.finish(len(texts))
    return texts
