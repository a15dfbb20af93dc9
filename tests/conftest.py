"""Fixtures shared by all tests: the reference data when present, and one local Ray instance."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with reference copies of the real data; tests that use it skip on machines without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the reference data is not on this machine")
    return folder
