"""Tasks whose problems are rows of a folder, a file or a hub dataset, read with a parser of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rairl_ray.config.schema import Data, Fields
from rairl_ray.data.rows import (
    BadRow,
    BadRowReport,
    Row,
    column,
    is_hub_id,
    optional_text_column,
    read_rows,
    split_files,
    text_column,
)
from rairl_ray.data.tasks.base import Task, TaskRules, content_hash
from rairl_ray.data.tasks.experts import expert_completion, with_demonstrations
from rairl_ray.data.tasks.generated import is_held_out
from rairl_ray.errors import DataError
from rairl_ray.types import Demonstration, Prompt

_GENERAL = Fields()
_SPLITS = Data()

_log = logging.getLogger(__name__)


class Columns(NamedTuple):
    """Where a row has its problem, gold answer and expert; None: the data has no experts."""

    prompt: str
    answer: str
    demonstration: str | None

    def resolved(self, fields: Fields, values: Mapping[str, object]) -> Columns:
        """Names that `data.fields` gives, else the data set's own, else (where only they exist) the general."""
        answer = _GENERAL.answer if fields.answer is None else fields.answer
        return Columns(
            _name(self.prompt, fields.prompt, _GENERAL.prompt, values) or self.prompt,
            _name(self.answer, answer, _GENERAL.answer, values) or self.answer,
            _name(self.demonstration, fields.demonstration, _GENERAL.demonstration, values),
        )


def _name(
    own: str | None, configured: str | None, general: str | None, values: Mapping[str, object]
) -> str | None:
    if configured != general or configured is None:
        return configured
    return general if own not in values and general in values else own


class Source(NamedTuple):
    """Rows of one split."""

    path: str
    """File, folder or hub id."""
    split: str
    config_name: str | None = None
    name: str | None = None
    """Part of the ids of its problems; None: the split."""


class Hub(NamedTuple):
    """Where a data set lies on the hub. Without `train` it is for evaluation only."""

    train: tuple[Source, ...] = ()
    eval: tuple[Source, ...] = ()
    """Empty: one in ten of the training rows is held out."""


RowParser = Callable[[Row, str], Demonstration]
"""(row, prompt id) -> demonstration; raises BadRow."""


def plain_row(
    row: Row,
    prompt_id: str,
    columns: Columns,
    gold: Callable[[str, str], str] = lambda text, name: text.strip(),
) -> Demonstration:
    """A question, a gold answer and an expert. `gold` reads the answer (text, name of its column)."""
    answer = gold(text_column(row.values, columns.answer), columns.answer)
    prompt = Prompt(id=prompt_id, question=text_column(row.values, columns.prompt).strip(), answer=answer)
    text = expert_text(row, columns)
    return Demonstration(prompt=prompt, completion=text and expert_completion(text))


@dataclass(frozen=True, kw_only=True)
class TableTask:
    """A data set: `make` raises DataError for unusable files, with the rows' places."""

    name: str
    hub: Hub
    columns: Columns
    rules: Callable[[Data], TaskRules]
    parse: Callable[[Row, str, Columns], Demonstration] = plain_row

    def make(self, data: Data) -> Task:
        def columns(row: Row) -> Columns:
            return self.columns.resolved(data.fields, row.values)

        train, evaluation = read_splits(
            data,
            self.name,
            lambda row: columns(row).prompt,
            lambda row, prompt_id: self.parse(row, prompt_id, columns(row)),
            self.hub,
        )
        rules = self.rules(data)
        return Task(
            name=self.name,
            system_prompt=rules.system_prompt,
            train=train,
            eval=evaluation,
            data_hash=content_hash(train, evaluation),
            grader=rules.grader,
        )


def expert_text(row: Row, columns: Columns) -> str | None:
    """The expert's text. A missing column is an error (BadRow); an empty one means no expert."""
    if columns.demonstration is None:
        return None
    column(row.values, columns.demonstration)
    return optional_text_column(row.values, columns.demonstration)


def read_splits(
    data: Data, task: str, prompt_column: Callable[[Row], str], parse: RowParser, hub: Hub | None = None
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(train, eval) of at most `data.limit` and `data.eval_limit` rows, in the order of the data.

    A single file is split by a keyed hash of its questions (one in ten held out), unless `data.train_split`
    and `data.eval_split` are equal, which says: the same rows for both. A data set for evaluation only (`Hub`
    without `train`) keeps all rows of a single file for that.
    """
    train_sources, eval_sources = _sources(data, hub)
    reader = _Reader(data, task, prompt_column, parse)
    if eval_sources:
        train = reader.rows(train_sources, data.limit)
        evaluation = reader.rows(eval_sources, data.eval_limit)
    else:
        train, evaluation = _held_out(reader.rows(train_sources, None), train_sources, data)
    if data.demonstrations is not None and train:
        train = with_demonstrations(train, [reader.keys[row.prompt.id] for row in train], data)
    return train, evaluation


def _held_out(
    rows: list[Demonstration], sources: tuple[Source, ...], data: Data
) -> tuple[list[Demonstration], list[Demonstration]]:
    train = [row for row in rows if not is_held_out(row.prompt.question)][: data.limit]
    evaluation = [row for row in rows if is_held_out(row.prompt.question)][: data.eval_limit]
    path = ", ".join(source.path for source in sources)
    if not train or not evaluation:
        raise DataError(
            f"data.path={path}: {len(rows)} rows are too few to hold some out; give a folder with "
            f"{data.train_split} and {data.eval_split} files, or set data.eval_split={data.train_split}"
        )
    _log.info("%s: one split; %d rows to train on, %d held out", path, len(train), len(evaluation))
    return train, evaluation


def _sources(data: Data, hub: Hub | None) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    """(train, eval); an empty `eval` is held out of `train`."""
    path = data.path
    if path is None:
        assert hub is not None, "a task without a hub id needs data.path, which its caller checks"
        return (
            tuple(_as_configured(source, data, data.train_split, _SPLITS.train_split) for source in hub.train),
            tuple(_as_configured(source, data, data.eval_split, _SPLITS.eval_split) for source in hub.eval),
        )
    train = (Source(path, data.train_split, data.config_name),)
    evaluation = (Source(path, data.eval_split, data.config_name),)
    if data.train_split == data.eval_split:
        return train, evaluation
    if Path(path).is_file():
        only = (Source(path, data.train_split, name=Path(path).stem),)
        return ((), only) if hub is not None and not hub.train else (only, ())
    if hub is not None and not hub.train and not _has_split(path, data.train_split):
        return (), evaluation
    if hub is not None and not hub.eval and not _has_split(path, data.eval_split):
        return train, ()
    return train, evaluation


def _as_configured(source: Source, data: Data, split: str, default: str) -> Source:
    """A hub source with the split and config that the configuration names instead of its own."""
    return source._replace(
        split=source.split if split == default else split, config_name=data.config_name or source.config_name
    )


def _has_split(path: str, split: str) -> bool:
    """Whether a folder has files of this split; of a hub dataset that is not known, and taken as no."""
    if not Path(path).is_dir():
        return not is_hub_id(path)
    try:
        return bool(split_files(Path(path), split))
    except DataError:
        return False


class _Reader:
    def __init__(self, data: Data, task: str, prompt_column: Callable[[Row], str], parse: RowParser) -> None:
        self._data, self._task = data, task
        self._prompt_column, self._parse = prompt_column, parse
        self.keys: dict[str, str] = {}
        """Prompt id -> what `data.demonstrations` is matched by."""

    def rows(self, sources: tuple[Source, ...], limit: int | None) -> list[Demonstration]:
        """The first `limit` good rows; ids are `TASK/NAME/(fields.id or the row's place in its source)`."""
        rows: list[Demonstration] = []
        seen: set[str] = set()
        for source in sources:
            left = None if limit is None else limit - len(rows)
            if left == 0:
                break
            report = BadRowReport(source.path, self._data.on_bad_row)
            found = list(islice(self._good_rows(source, report, seen), left))
            report.finish(len(found))
            rows += found
        return rows

    def _good_rows(self, source: Source, report: BadRowReport, seen: set[str]) -> Iterator[Demonstration]:
        id_column, name = self._data.fields.id, source.name or source.split
        for row in read_rows(source.path, report, split=source.split, config_name=source.config_name):
            try:
                key = text_column(row.values, id_column or self._prompt_column(row)).strip()
                prompt_id = f"{self._task}/{name}/{key if id_column else row.position}"
                if prompt_id in seen:
                    raise BadRow(f"{id_column} {key!r} occurs twice")
                demonstration = self._parse(row, prompt_id)
            except BadRow as error:
                report.add(row.place, error)
                continue
            seen.add(prompt_id)
            self.keys[prompt_id] = key
            yield demonstration
