"""Pages that comments and messages cite are there, and so is the section."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

CITED = re.compile(r"\b(docs/[\w-]+\.md|AGENTS\.md|README\.md)(?: (\d+))?")
FOREIGN = re.compile(r"\b(?:METHOD|DESIGN|RUNTIME)(?:\.md)?\b")
"""Notes that are not part of the repository."""


def texts() -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip("needs git and a checkout to know the project's own files")
    kinds = (".py", ".md", ".yaml", ".sh", ".toml")
    found = [ROOT / name for name in done.stdout.splitlines() if name.endswith(kinds)]
    return [path for path in found if path.is_file() and path != Path(__file__)]


def sections(page: Path) -> set[str]:
    """Numbers of a page's headings (`## 3. ...`) and of its list of decisions or pitfalls (`3. ...`)."""
    return set(re.findall(r"^(?:## )?(\d+)\. ", page.read_text(encoding="utf-8"), flags=re.M))


def test_every_citation_resolves() -> None:
    files = texts()
    assert len(files) > 100
    wrong = []
    for path in files:
        text = path.read_text(encoding="utf-8")
        wrong += [f"{path.relative_to(ROOT)}: cites {name}" for name in FOREIGN.findall(text)]
        for page, number in CITED.findall(text):
            if not (ROOT / page).is_file():
                wrong.append(f"{path.relative_to(ROOT)}: {page} is not there")
            elif number and number not in sections(ROOT / page):
                wrong.append(f"{path.relative_to(ROOT)}: {page} has no section {number}")
    assert wrong == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/method.md", "AGENTS.md"])
def test_numbers_of_a_page_count_up(page: str) -> None:
    """A number that is given twice cites nothing."""
    text = (ROOT / page).read_text(encoding="utf-8")
    numbers = re.findall(r"^(?:## )?(\d+)\. ", text, flags=re.M)
    assert numbers == [str(number) for number in range(1, len(numbers) + 1)]
