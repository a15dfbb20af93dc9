"""Fuzz targets on a few mutated inputs by hypothesis; `python -m tests.fuzz` runs the same targets for minutes."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, run_one

ROOT = Path(__file__).resolve().parents[2]
PIECES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from(
        [
            b"",
            b"[" * 3000,
            b"9" * 5000,
            b"&a *a",
            b"\xed\xa0\x80",
            b"\\ud800",
            b"\0",
            b"NaN",
            b"1e999",
            b"../",
            b"-1",
            b"{}",
        ]
    ),
)
SLOW_S = 20.0


def broken(data: bytes) -> st.SearchStrategy[bytes]:
    """The input with up to four parts replaced."""
    parts = st.tuples(st.integers(0, len(data)), st.integers(0, 12), PIECES)

    def replace(changes: list[tuple[int, int, bytes]]) -> bytes:
        text = data
        for start, size, piece in changes:
            text = text[:start] + piece + text[start + size :]
        return text

    return st.lists(parts, min_size=1, max_size=4).map(replace)


@pytest.mark.parametrize("name", TARGETS)
def test_broken_input_ends_in_our_own_errors_and_in_time(name):
    target = TARGETS[name]
    seeds = target.seeds()
    for seed in seeds:
        run_one(target, seed)

    @settings(max_examples=20, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(seeds).flatmap(broken))
    def hold(data):
        started = time.monotonic()
        run_one(target, data)
        assert time.monotonic() - started < SLOW_S

    hold()


def test_script_runs_without_atheris_names_its_seed_and_replays(tmp_path):
    command = [sys.executable, "-m", "tests.fuzz", "--targets", "manifest", "--engine", "random"]
    command += ["--found", str(tmp_path)]
    few = ["--minutes", "2", "--inputs", "50", "--seed", "5"]
    done = subprocess.run([*command, *few], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("seed 5, inputs by random, 1 targets in at most 2 minutes in total: 120 s each")
    assert re.search(r"^manifest +50 inputs ", done.stdout, flags=re.MULTILINE)
    assert "1 of 1 targets in " in done.stdout
    assert "no failures" in done.stdout
    (tmp_path / "input").write_bytes(b"{")
    again = subprocess.run(
        [*command, "--replay", str(tmp_path / "input")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "no error, or one of FinLoRA's own" in again.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--targets", "none"], cwd=ROOT, capture_output=True, text=True
    )
    assert (wrong.returncode, "unknown target none" in wrong.stderr) == (2, True)
