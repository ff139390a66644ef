"""Reading rows: places, bad rows, formats, hub datasets."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from rairl_ray.config.schema import Data, Fields
from rairl_ray.data.rows import (
    BadRow,
    BadRowReport,
    column,
    is_hub_id,
    optional_text_column,
    read_rows,
    text_column,
)
from rairl_ray.data.tasks import make_task
from rairl_ray.errors import DataError

ROWS = [{"prompt": f"question {i}", "target": f"step\n#### {i}", "answer": str(i)} for i in range(30)]


def _write(path: Path, lines: list[str | dict]) -> Path:
    path.write_text(
        "".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8"
    )
    return path


def _folder(path: Path, train: list[str | dict], test: list[str | dict] | None = None) -> Data:
    _write(path / "train.jsonl", train)
    _write(path / "test.jsonl", test or ROWS[:3])
    return Data(task="jsonl", path=str(path))


BAD_LINES = [
    ('{"prompt": "x", ', r"not valid JSON \("),
    ("[1, 2]", r"holds list \[1, 2\], not an object"),
    ('{"target": "x"}', r"no column 'prompt' \(there are: target\)"),
    ('{"prompt": ""}', "column 'prompt' is empty"),
    ('{"prompt": {"a": 1}}', "column 'prompt' holds dict"),
    ('{"prompt": true}', "column 'prompt' holds bool true"),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ("[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:20] for _, reason in BAD_LINES])
def test_a_bad_row_is_one_line_with_its_place_and_a_remedy(tmp_path, line: str, reason: str) -> None:
    data = _folder(tmp_path, [*ROWS[:16], line, *ROWS[16:]])
    with pytest.raises(DataError, match=rf"train\.jsonl:17: .*{reason}") as error:
        make_task(data)
    assert "\n" not in str(error.value) and "data.on_bad_row=skip" in str(error.value)


def test_bytes_that_are_no_text_are_a_bad_row(tmp_path) -> None:
    data = _folder(tmp_path, ROWS)
    with (tmp_path / "train.jsonl").open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:31: not UTF-8 text \(byte 13\)"):
        make_task(data)


def test_all_bad_rows_are_reported_and_the_first_twenty_shown(tmp_path) -> None:
    data = _folder(tmp_path, [*ROWS, *["oops"] * 25])
    with pytest.raises(DataError) as error:
        make_task(data)
    message = str(error.value)
    assert all(f"train.jsonl:{n}: not valid JSON" in message for n in range(31, 51))
    assert "train.jsonl:51" not in message and "and 5 more" in message


def test_skip_counts_and_names_the_lines_and_keeps_the_ids_of_the_others(tmp_path, caplog) -> None:
    data = _folder(tmp_path, [ROWS[0], "oops", "", ROWS[1], "{}"]).model_copy(update={"on_bad_row": "skip"})
    task = make_task(data)
    assert [row.prompt.id for row in task.train] == ["jsonl/train/0", "jsonl/train/3"]
    assert "skipped 2 bad rows" in caplog.text
    assert "train.jsonl:2" in caplog.text and "train.jsonl:5" in caplog.text


def test_no_good_row_is_an_error_even_when_skipping(tmp_path) -> None:
    data = _folder(tmp_path, ["oops"]).model_copy(update={"on_bad_row": "skip"})
    with pytest.raises(DataError, match="no good row is left"):
        make_task(data)
    _write(tmp_path / "train.jsonl", [])
    with pytest.raises(DataError, match="no rows; give a file with at least one"):
        make_task(data)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_all_formats_give_the_same_task(tmp_path, suffix: str) -> None:
    reference = make_task(_folder(tmp_path, ROWS))
    folder = tmp_path / "other"
    folder.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:3])):
        path = folder / f"{split}{suffix}"
        if suffix == ".jsonl":
            path.write_text(
                "\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8"
            )  # mark, blank lines
        elif suffix == ".json":
            path.write_text(json.dumps(rows))
        elif suffix == ".csv":
            lines = [f'{r["prompt"]},"{r["target"]}",{r["answer"]}' for r in rows]
            path.write_text("\n".join(["prompt,target,answer", *lines]))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    task = make_task(Data(task="jsonl", path=str(folder)))
    assert [(r.prompt.question, r.prompt.answer, r.completion) for r in task.train] == [
        (r.prompt.question, r.prompt.answer, r.completion) for r in reference.train
    ]
    if suffix != ".jsonl":
        assert task.train == reference.train and task.data_hash == reference.data_hash


def test_parquet_shards_have_ids_of_their_own(tmp_path) -> None:
    for shard in range(2):
        rows = ROWS[shard * 5 : shard * 5 + 5]
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), tmp_path / f"train-0000{shard}-of-00002.parquet"
        )
    rows = list(read_rows(str(tmp_path), BadRowReport("x", "fail"), split="train"))
    assert [row.position for row in rows] == list(range(10))
    assert rows[7].place.endswith("train-00001-of-00002.parquet: row 3")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", "[{},\n{]", r"x\.json:2: not valid JSON"),
        ("x.json", "{}", r"must hold a list of objects"),
        ("x.csv", "prompt,target\na,b,c\n", r"x\.csv:2: not 2 columns"),
        ("x.csv", 'prompt\n"a\nb"\nc\n"oops', r"x\.csv:\d: not valid CSV"),
        ("x.parquet", "nonsense", "not a parquet file"),
        ("x.xlsx", "nonsense", r"unknown format \.xlsx"),
    ],
)
def test_unreadable_files(tmp_path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        make_task(Data(task="jsonl", path=str(tmp_path / name)))
    assert "\n" not in str(error.value)


def test_csv_lines_count_newlines_inside_quotes(tmp_path) -> None:
    (tmp_path / "x.csv").write_text('prompt,answer\n"a\nb",1\nc\n')
    report = BadRowReport("x", "fail")
    rows = list(read_rows(str(tmp_path / "x.csv"), report, split="train"))
    assert len(rows) == 1 and report.found[0][0].endswith("x.csv:4")


def test_missing_files_folders_and_splits(tmp_path) -> None:
    with pytest.raises(DataError, match=r"data\.path=.*none\.jsonl: no such file or folder; give a"):
        make_task(Data(task="jsonl", path=str(tmp_path / "none.jsonl")))
    _write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no test\.jsonl .* in it, only train\.jsonl; set data\.train_split"):
        make_task(Data(task="jsonl", path=str(tmp_path)))


def test_hub_ids_look_like_ids() -> None:
    assert is_hub_id("openai/gsm8k") and is_hub_id("squad")
    assert not any(map(is_hub_id, ["data/train.jsonl", "/data/x", "./x", "../x/y", "a/b/c", "~/x", "x.csv"]))


def test_a_hub_dataset_that_cannot_be_loaded_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"data\.path=nobody/nothing: dataset \(config main, split train\)"
    ) as error:
        make_task(Data(task="gsm8k", path="nobody/nothing", config_name="main"))
    assert "\n" not in str(error.value) and "local path" in str(error.value)


def test_hub_reader_reads_what_datasets_loads(tmp_path, monkeypatch) -> None:
    """A dataset repository on disk, through the hub's own client."""
    repository = tmp_path / "owner" / "name"
    repository.mkdir(parents=True)
    _write(repository / "train.jsonl", ROWS)
    from rairl_ray.data import rows

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = list(rows._read_hub(str(repository), "train", None))
    assert [row.values["answer"] for row in found] == [row["answer"] for row in ROWS]
    assert found[4].place.endswith("[train]: row 5") and found[4].position == 4


def test_columns_reach_into_nested_rows() -> None:
    row = {"a": {"b": [{"c": "deep"}]}, "x.y": "flat", "n": 3.0, "none": None, "blank": " "}
    assert text_column(row, "a.b.0.c") == "deep"
    assert text_column(row, "x.y") == "flat"
    assert text_column(row, "n") == "3"
    assert optional_text_column(row, "none") is None and optional_text_column(row, "blank") is None
    assert optional_text_column(row, "gone") is None
    for name in ("a.b.1.c", "a.c", "gone", "none"):
        with pytest.raises(BadRow):
            text_column(row, name)
    with pytest.raises(BadRow, match=r"no column 'a\.c'"):
        column(row, "a.c")


def test_named_columns_must_exist_and_ids_be_unique(tmp_path) -> None:
    data = _folder(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"train\.jsonl:1: no column 'cot'"):
        make_task(data.model_copy(update={"fields": Fields(demonstration="cot")}))
    twice = [{"id": 1, **ROWS[0]}, {"id": 1, **ROWS[1]}]
    data = _folder(tmp_path, twice, twice[:1]).model_copy(update={"fields": Fields(id="id")})
    with pytest.raises(DataError, match=r"train\.jsonl:2: id '1' occurs twice"):
        make_task(data)
