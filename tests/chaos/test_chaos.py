"""Fault injection: one fault of each kind without Ray loses nothing, and a real loss is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import files
from tests.chaos.record import Injection, render_table, seeds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One artefact of each kind; each test restores what it damages."""
    return files.make_world(tmp_path_factory.mktemp("world"))


def test_ten_damaged_artefacts_load_as_written_or_are_refused(world):
    """Each truncated and bit-flipped once."""
    found = [
        files.damage(artefact, kind, next(seeds(0, kind, artefact.name)), world.folder)
        for artefact in files.artefacts_of(world)
        for kind in ("cut short", "bit flipped")
    ]
    assert len({(fault.kind, fault.target) for fault in found}) == len(found) == 20
    assert [fault for fault in found if fault.lost] == []


def test_one_fault_of_each_kind_of_writers_loses_nothing(tmp_path):
    """Five writers killed, paused and out of disk; five faults of a training loop."""
    record = tmp_path / "faults.jsonl"
    command = [sys.executable, "-m", "tests.chaos", "--parts", "writers", "--rounds", "1", "--record", str(record)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    faults = [json.loads(line) for line in record.read_text().splitlines()]
    assert len({(fault["kind"], fault["target"]) for fault in faults}) == len(faults) == 20
    assert "20 faults" in done.stdout
    assert "0 with a loss" in done.stdout


def test_flipped_bit_without_an_error_counts_as_a_loss(world, tmp_path, monkeypatch):
    """An adapter whose file hashes are not checked loads with other values."""
    from finlora.model.contract import Contract

    (adapter,) = (each for each in files.artefacts_of(world) if each.name == "adapter, safetensors")
    sound = files.damage(adapter, "bit flipped", 1, tmp_path)
    assert (sound.lost, sound.seen.partition(":")[0]) == ("", "AdapterError")
    assert files.damage(adapter, "bit flipped", 1, tmp_path) == sound
    monkeypatch.setattr(Contract, "check_files", lambda *_: None)
    lost = [files.damage(adapter, "bit flipped", seed, tmp_path).lost for seed in range(4)]
    assert "loads with other values, without an error" in lost


def test_table_counts_faults_and_losses_by_kind():
    faults = [
        Injection("killed", "worker", 1, "resumes", recovery_s=3.0),
        Injection("killed", "worker", 2, "resumes", "a step", 5.0),
        Injection("cut", "base", 3, "refused"),
    ]
    assert render_table(faults).splitlines()[2:] == [
        "| killed | worker | 2 | resumes | 1 | 5.0 (at most 5.0) |",
        "| cut | base | 1 | refused | 0 |  |",
    ]


def test_seeds_follow_from_seed_kind_and_target():
    first, again, other = (seeds(0, kind, "base") for kind in ("cut", "cut", "flipped"))
    assert [next(first) for _ in range(3)] == [next(again) for _ in range(3)] != [next(other) for _ in range(3)]
    assert list(seeds(0, "cut", "base", 7)) == [7]
