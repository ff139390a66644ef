"""The page in a real browser, headless, at desktop and at phone width."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rairl_ray.files import write_json_lines
from rairl_ray.report.report import make_report
from tests.report_material import HOSTILE, add_evaluation, localised_rows, make_rows, make_run

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs a browser: no chromium is installed"),
]

PROBE = """<!DOCTYPE html><title>probe</title><body style="margin:0">
<iframe id="page" src="{page}" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="found"></pre><script>
const frame = document.getElementById("page");
frame.addEventListener("load", () => {{
  const inside = frame.contentDocument, root = inside.documentElement, found = {{}};
  found.client = root.clientWidth; found.scroll = root.scrollWidth;
  found.broken = [...inside.images].filter(image => !image.complete || image.naturalWidth === 0).length;
  found.images = inside.images.length;
  found.smallest = Math.min(...[...inside.images].map(image => image.clientWidth));
  found.hostile = frame.contentWindow.hostile === undefined ? "harmless" : "ran";
  const box = inside.querySelector("[data-numbers]"); box.click();
  const unit = box.closest("details").querySelector("[data-r]");
  found.number = frame.contentWindow.getComputedStyle(unit, "::after").content;
  document.getElementById("found").textContent = Object.entries(found).map(([k, v]) => k + "=" + v).join(";");
}});
</script>"""
"""Reads the page from outside, for the page itself allows no more than its own few lines."""


def chromium(*arguments: str) -> str:
    assert BROWSER is not None
    common = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--hide-scrollbars",
    ]
    command = [BROWSER, *common, "--hide-scrollbars", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full report with many evaluations, long names and hostile samples."""
    run = make_run(tmp_path_factory.mktemp("browser") / ("a-very-long-run-name-" * 6))
    write_json_lines(run.evaluation("final") / "localisation.jsonl", localised_rows())
    hostile = HOSTILE + "<script>window.hostile = 1</script>" + "unbroken" * 60
    for name in ("start", "aime", "math", "from-gsm8k-to-medicine"):
        add_evaluation(run, name, make_rows(text=hostile))
    make_report([str(run.root)])
    return run.report / "index.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_shows_all_images(page: Path, tmp_path: Path, width: int) -> None:
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=page.as_uri(), width=width))
    window = f"--window-size={width + 200},1000"
    dom = chromium(window, "--virtual-time-budget=10000", "--dump-dom", probe.as_uri())
    match = re.search(r'<pre id="found">([^<]+)</pre>', dom)
    assert match, dom[-2000:]
    found = dict(item.split("=", 1) for item in match[1].split(";"))
    assert int(found["client"]) == width
    assert int(found["scroll"]) <= width, "the page is wider than the window"
    assert int(found["images"]) > 20 and found["broken"] == "0"
    assert int(found["smallest"]) >= 250  # figures stay legible
    assert found["hostile"] == "harmless"
    assert re.fullmatch(r'"[+-]\d+\.\d\d"', found["number"])


def test_a_screenshot_has_content(page: Path, tmp_path: Path) -> None:
    from matplotlib.image import imread

    chromium(f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1280,2000", page.as_uri())
    picture = imread(tmp_path / "shot.png")
    assert picture.shape[:2] == (2000, 1280)
    assert picture[..., :3].std() > 0.05
