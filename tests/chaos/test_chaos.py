"""Chaos: one fault of each cheap kind loses nothing, and a loss would be seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.chaos import files
from tests.chaos.record import Injection, render_table, seeds

ROOT = Path(__file__).resolve().parents[2]


def test_a_fault_of_each_cheap_kind_loses_nothing(tmp_path):
    """Ten artefacts cut and flipped, five writers killed, held up and out of disk, a training loop broken in five ways."""
    record = tmp_path / "faults.jsonl"
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--parts",
        "files",
        "writers",
        "--rounds",
        "1",
        "--record",
        str(record),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    faults = [json.loads(line) for line in record.read_text().splitlines()]
    assert len({(fault["kind"], fault["target"]) for fault in faults}) == len(faults) == 40
    assert "40 faults" in done.stdout
    assert "0 with a loss" in done.stdout


def test_bit_that_is_flipped_in_silence_counts_as_a_loss(tmp_path, monkeypatch):
    """What would be seen without the hashes of an adapter's files."""
    from finlora.model.contract import Contract

    world = files.make_world(tmp_path)
    (adapter,) = (each for each in files.artefacts_of(world) if each.name == "adapter, safetensors")
    sound = files.damage(adapter, "bit flipped", 1, tmp_path)
    assert (sound.lost, sound.seen.partition(":")[0]) == ("", "AdapterError")
    assert files.damage(adapter, "bit flipped", 1, tmp_path) == sound
    monkeypatch.setattr(Contract, "check_files", lambda *_: None)
    lost = [files.damage(adapter, "bit flipped", seed, tmp_path).lost for seed in range(4)]
    assert "loads with other values, and nothing is said" in lost


def test_table_counts_faults_and_losses_by_kind():
    faults = [
        Injection("killed", "worker", 1, "goes on", recovery_s=3.0),
        Injection("killed", "worker", 2, "goes on", "a step", 5.0),
        Injection("cut", "base", 3, "refused"),
    ]
    assert render_table(faults).splitlines()[2:] == [
        "| killed | worker | 2 | goes on | 1 | 5.0 (at most 5.0) |",
        "| cut | base | 1 | refused | 0 |  |",
    ]


def test_seeds_follow_from_seed_kind_and_target():
    first, again, other = (seeds(0, kind, "base") for kind in ("cut", "cut", "flipped"))
    assert [next(first) for _ in range(3)] == [next(again) for _ in range(3)] != [next(other) for _ in range(3)]
    assert list(seeds(0, "cut", "base", 7)) == [7]
