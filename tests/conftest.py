"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("shared machine", deadline=None)  # a busy neighbour is no fault of the code
settings.load_profile("shared machine")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real datasets beside the project; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real datasets in ../shared/data, which are not here")
    return folder


@pytest.fixture(scope="session")
def shared_faults() -> Path:
    """Folder of faults that were found, as small inputs; tests that need it are skipped where it is absent."""
    folder = ROOT.parent / "shared" / "faults"
    if not folder.is_dir():
        pytest.skip("needs the collected faults in ../shared/faults, which are not here")
    return folder
