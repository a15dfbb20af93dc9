"""Figures of the scoring benchmark, from samples that were not measured."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys

import pytest
from score_table import Watch, describe_memory, draw, find_rate, read_samples, write_table


def make_samples(parts, run=1, **held):
    """Return a sample each two seconds, after parts of 256 rows."""
    memory = {"driver": 0.5, "engines": {"7": 1.0}, "others": 2.0} | held
    return [{"run": run, "seconds": 2.0 * number, "rows": 256 * count, **memory} for number, count in enumerate(parts)]


def test_rate_counts_from_the_first_part_to_the_last():
    """Four parts of 256 rows in 6 s, start-up before and the writing of the output behind; an interrupted run before it."""
    samples = make_samples([0, 0, 0, 1, 1, 3, 5, 5, 5], run=2)
    assert find_rate(samples) == pytest.approx(4 * 256 / 6)
    assert find_rate(make_samples([0, 1, 2, 3]) + samples) == pytest.approx(4 * 256 / 6)
    assert math.isnan(find_rate(make_samples([0, 0, 1, 1])))


def test_memory_is_that_of_the_largest_engine_and_is_drawn(tmp_path):
    samples = make_samples([0] * 5, engines={"7": 9.0}) + make_samples(range(1, 31), engines={"7": 0.5, "8": 1.0})
    samples[-1]["engines"] = {"7": 1.5}
    found = describe_memory(samples)
    assert [found[name]["engines"] for name in ("first tenth", "middle", "last tenth")] == [1.0, 1.0, 1.5]
    draw(samples, 300.0, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_samples_go_on_after_an_interrupted_run(tmp_path):
    out, path = tmp_path / "scored.csv", tmp_path / "samples.jsonl"
    path.write_text(json.dumps({"run": 1, "seconds": 60.0, "rows": 512}) + "\n")
    (tmp_path / "scored.csv.parts").mkdir()
    for number in range(3):
        (tmp_path / "scored.csv.parts" / f"part-{number:06d}.parquet").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        Watch(process, out, 256, 700, path).sample()
        process.stdin.close()
    first, later = read_samples(path)
    assert first["rows"] == 512
    assert (later["run"], later["rows"]) == (2, 700)
    assert later["seconds"] >= 60
    assert later["driver"] > 0


def test_table_is_the_same_each_time(tmp_path):
    for name in ("a.csv", "b.csv"):
        write_table(tmp_path / name, 50)
    rows = list(csv.reader((tmp_path / "a.csv").read_text().splitlines()))
    assert rows[0] == ["number", "text"]
    assert [row[0] for row in rows[1:]] == [str(number) for number in range(50)]
    assert len({row[1] for row in rows[1:]}) == 50
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
