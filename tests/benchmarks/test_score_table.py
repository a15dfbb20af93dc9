"""Figures of the scoring benchmark, from samples that were not measured."""

from __future__ import annotations

import csv
import math

import pytest
from score_table import describe_memory, draw, find_rate, write_table


def make_samples(parts, **held):
    """Return a sample each two seconds."""
    memory = {"driver": 0.5, "engines": 1.0, "others": 2.0} | held
    return [{"seconds": 2.0 * number, "parts": float(count), **memory} for number, count in enumerate(parts)]


def test_rate_counts_from_the_first_part_to_the_last():
    """Four parts of 256 rows in 6 s, start-up before and the writing of the output behind."""
    assert find_rate(make_samples([0, 0, 0, 1, 1, 3, 5, 5, 5]), 256) == pytest.approx(4 * 256 / 6)
    assert math.isnan(find_rate(make_samples([0, 0, 1, 1]), 256))


def test_memory_is_that_of_the_sealed_parts_and_is_drawn(tmp_path):
    samples = make_samples([0] * 5, engines=9.0) + make_samples(range(1, 31))
    samples[-1]["engines"] = 1.5
    found = describe_memory(samples)
    assert [found[name]["engines"] for name in ("first tenth", "middle", "last tenth")] == [1.0, 1.0, 1.5]
    draw(samples, 256, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_table_is_the_same_each_time(tmp_path):
    for name in ("a.csv", "b.csv"):
        write_table(tmp_path / name, 50)
    rows = list(csv.reader((tmp_path / "a.csv").read_text().splitlines()))
    assert rows[0] == ["number", "text"]
    assert [row[0] for row in rows[1:]] == [str(number) for number in range(50)]
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
