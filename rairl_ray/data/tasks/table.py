"""Splits of a table: a folder, a file or a hub dataset, read row by row with a task's own parser."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from rairl_ray.config.schema import Data
from rairl_ray.data.rows import BadRow, BadRowReport, Row, read_rows, text_column
from rairl_ray.data.tasks.experts import with_demonstrations
from rairl_ray.data.tasks.generated import is_held_out
from rairl_ray.errors import DataError
from rairl_ray.types import Demonstration

RowParser = Callable[[Row, str], Demonstration]
"""(row, prompt id) -> demonstration; raises BadRow."""

_log = logging.getLogger(__name__)


def read_splits(
    data: Data, task: str, source: str, prompt_column: str, parse: RowParser
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(train, eval) of at most `data.limit` and `data.eval_limit` rows, in the order of the file.

    A single file is split by a keyed hash of its questions (one in ten held out), unless `data.train_split`
    and `data.eval_split` are equal, which says: the same rows for both.
    """
    reader = _Reader(data, task, source, prompt_column, parse)
    same = data.train_split == data.eval_split
    if Path(source).is_file() and not same:
        rows = reader.rows(Path(source).stem, data.train_split, None)
        train = [row for row in rows if not is_held_out(row.prompt.question)][: data.limit]
        evaluation = [row for row in rows if is_held_out(row.prompt.question)][: data.eval_limit]
        if not train or not evaluation:
            raise DataError(
                f"data.path={source}: {len(rows)} rows are too few to hold some out; give a folder with "
                f"{data.train_split} and {data.eval_split} files, or set data.eval_split={data.train_split}"
            )
        _log.info("%s: one file; %d rows to train on, %d held out", source, len(train), len(evaluation))
    else:
        train = reader.rows(data.train_split, data.train_split, data.limit)
        evaluation = reader.rows(data.eval_split, data.eval_split, data.eval_limit)
    if data.demonstrations is not None:
        train = with_demonstrations(train, [reader.keys[row.prompt.id] for row in train], data)
    return train, evaluation


class _Reader:
    def __init__(self, data: Data, task: str, source: str, prompt_column: str, parse: RowParser) -> None:
        self._data, self._task, self._source = data, task, source
        self._prompt_column, self._parse = prompt_column, parse
        self.keys: dict[str, str] = {}
        """Prompt id -> what `data.demonstrations` is matched by."""

    def rows(self, name: str, split: str, limit: int | None) -> list[Demonstration]:
        """The first `limit` good rows; ids are `TASK/NAME/(fields.id or the row's place in its source)`."""
        report = BadRowReport(self._source, self._data.on_bad_row)
        rows = list(islice(self._good_rows(name, split, report), limit))
        report.finish(len(rows))
        return rows

    def _good_rows(self, name: str, split: str, report: BadRowReport) -> Iterator[Demonstration]:
        seen: set[str] = set()
        id_column = self._data.fields.id
        for row in read_rows(self._source, report, split=split, config_name=self._data.config_name):
            try:
                key = text_column(row.values, id_column or self._prompt_column).strip()
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
