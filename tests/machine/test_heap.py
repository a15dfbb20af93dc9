"""Free heap memory goes back to the operating system."""

from __future__ import annotations

import pytest

from finlora.machine import heap


def test_free_pages_are_returned():
    psutil = pytest.importorskip("psutil")
    if heap._find_trim() is None:
        pytest.skip("this C library keeps its free memory")
    size, process = 64 * 1024, psutil.Process()
    blocks = [bytes(size) for _ in range(1600)]
    last = blocks[-1]  # above the others, so that the C library returns none by itself
    blocks.clear()
    before = process.memory_info().rss
    heap.return_free_memory()
    assert before - process.memory_info().rss > 50 * 2**20
    assert len(last) == size


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(heap, "_find_trim", lambda: None)
    heap.return_free_memory()
