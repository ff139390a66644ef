"""The report: tables carry the numbers of the files, every part is there or says why not, the page is safe."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rairl_ray.errors import DataError
from rairl_ray.evaluation.rows import write_rows
from rairl_ray.report.parts import Number, Table
from rairl_ray.report.report import make_report
from rairl_ray.report.tables import cell_text, comma_separated, latex, markdown
from rairl_ray.runfolder import read_summary, write_summary
from tests.report_material import make_rows, make_run, read_csv
from tests.runs import launch

VOID = {"meta", "img", "br", "input", "hr", "link"}


class Page(HTMLParser):
    """The page's references, visible text and elements; every element is closed in order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] not in (["style"], ["script"]):
            self.text += data


@pytest.fixture(scope="module")
def one_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report folder of a complete run."""
    run = make_run(tmp_path_factory.mktemp("runs") / "complete")
    make_report([str(run.root)])
    return run.report


def test_the_page_needs_nothing_else(one_run: Path) -> None:
    page = Page(one_run / "index.html")
    assert page.references
    assert all(reference.startswith(("#", "data:image/")) for reference in page.references)
    assert "url(" not in (one_run / "index.html").read_text()


def test_figures_are_png_and_pdf_with_text_that_stays_text(one_run: Path) -> None:
    pngs, pdfs = sorted((one_run / "figures").glob("*.png")), sorted((one_run / "figures").glob("*.pdf"))
    assert [p.stem for p in pngs] == [p.stem for p in pdfs] != []
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 3000 for p in pngs)
    assert all(p.read_bytes().startswith(b"%PDF") and b"/Type3" not in p.read_bytes() for p in pdfs)


def test_the_table_of_all_metrics_holds_the_summary(one_run: Path) -> None:
    summary = read_summary(one_run.parent / "evaluations" / "final" / "summary.json")
    rows = {row["metric"]: row for row in read_csv(one_run / "tables" / "summary.csv")}
    for label, metric in (("pass@1 (%)", "eval/pass_at_1"), ("best by reward (%)", "eval/rerank_at_1")):
        for column, part in (("final", "value"), ("final low", "low"), ("final high", "high")):
            assert float(rows[label][column]) == pytest.approx(summary[metric][part])
    # Problems 0..5 have 0, 1, 2, 3, 4, 0 right samples of 4; every right one outscores every wrong one.
    assert float(rows["pass@1 (%)"]["final"]) == pytest.approx((1 + 2 + 3 + 4) / 24)
    assert float(rows["best by reward (%)"]["final"]) == pytest.approx(4 / 6)


def test_equal_input_gives_equal_files(one_run: Path, tmp_path: Path) -> None:
    make_report([str(one_run.parent)], str(tmp_path))
    for path in (p for p in one_run.rglob("*") if p.is_file()):
        assert (tmp_path / path.relative_to(one_run)).read_bytes() == path.read_bytes(), path.name


def test_a_path_without_anything_to_report_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder; name a run folder"):
        make_report([str(tmp_path / "absent")])
    with pytest.raises(DataError, match=r"holds nothing to report; looked for a run \(config.yaml"):
        make_report([str(tmp_path)])
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(DataError, match="has no rows; evaluate the run first"):
        make_report([str(tmp_path / "rows.jsonl")])


def test_the_verb_prints_its_paths_and_refuses_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_summary(path, {"eval/pass_at_1": {"value": 0.5, "low": 0.25, "high": 0.75, "n": 8}})
    done = launch("report", str(path), "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert f"page: {tmp_path / 'out' / 'index.html'}" in done.stdout
    assert "missing: Samples: Best and worst samples: " in done.stdout
    [row] = read_csv(tmp_path / "out" / "tables" / "pass_at_k.csv")
    assert (row["pass@1"], row["pass@1 low"], row["pass@1 high"]) == ("0.5", "0.25", "0.75")
    refused = launch("report", str(tmp_path / "nothing"))
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert refused.stderr.startswith(f"rairl: error: {tmp_path / 'nothing'}: no such file or folder")


@pytest.mark.usefixtures("undrawn")
def test_a_file_of_rows_is_enough(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", make_rows())
    make_report([str(tmp_path / "rows.jsonl")], str(tmp_path / "out"))
    rows = {row["metric"]: row for row in read_csv(tmp_path / "out" / "tables" / "summary.csv")}
    assert next(float(v) for k, v in rows["pass@1 (%)"].items() if k != "metric") == pytest.approx(10 / 24)
    assert "has no readable config.yaml" in Page(tmp_path / "out" / "index.html").text


def test_cells_and_table_formats() -> None:
    interval = Number(value=0.511, low=0.485, high=0.537, kind="percent")
    assert cell_text(interval) == "51.1 [48.5, 53.7]"
    assert cell_text(Number(value=0.279, std=0.047, kind="percent")) == "27.9 ± 4.7"
    assert cell_text(Number(value=float("nan"))) == cell_text(None) == "–"
    assert cell_text(Number(value=1e-9, kind="p")) == "< 0.001"
    assert cell_text(Number(value=-0.0001)) == "0.000"
    table = Table(name="t", title="A_b", columns=("x|y", "pass@1"), rows=[("50% & $a_b$ <i>", interval)])
    assert r"50\% \& \$a\_b\$ $<$i$>$ & 51.1 [48.5, 53.7] \\" in latex(table)
    assert r"| x\|y | pass@1 (%) |" in markdown(table) and r"\<i\>" in markdown(table)
    assert comma_separated(table).splitlines()[0] == "x|y,pass@1,pass@1 low,pass@1 high"
    assert re.search(r",0\.511,0\.485,0\.537$", comma_separated(table).splitlines()[1])
