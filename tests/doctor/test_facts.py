"""Parsing of `nvidia-smi`, and the round trip of a machine's facts between processes and versions."""

from __future__ import annotations

import json
import subprocess

import pytest

from finlora.doctor import facts

QUERY = "0, NVIDIA RTX A6000, 49140, 3, 535.183.01\n1, NVIDIA RTX A6000, 49140, 20480, 535.183.01\n"
# Of a server with two pairs of linked cards, as nvidia-smi 535 prints it; NS: not supported, CNS: chipset not supported.
TOPOLOGY = """ \t\x1b[4mGPU0\tGPU1\tGPU2\tGPU3\x1b[0m
 GPU0\tX\tOK\tCNS\tCNS
 GPU1\tOK\tX\tCNS\tCNS
 GPU2\tCNS\tCNS\tX\tOK
 GPU3\tCNS\tCNS\tOK\tX

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
"""


def test_gpus_are_read():
    gpus, driver = facts.parse_gpus(QUERY)
    assert driver == "535.183.01"
    assert [(gpu.index, gpu.name, round(gpu.total_gib, 1), gpu.used_gib > 1) for gpu in gpus] == [
        (0, "NVIDIA RTX A6000", 48.0, False),
        (1, "NVIDIA RTX A6000", 48.0, True),
    ]
    assert facts.parse_gpus("0, NVIDIA GB10, [N/A], [N/A], 580.1\n")[0][0].total_gib == 0.0
    assert facts.parse_gpus("") == ((), "")


def test_pairs_without_peer_access_are_read():
    assert facts.parse_no_peer(TOPOLOGY) == ("0-2", "0-3", "1-2", "1-3")
    assert facts.parse_no_peer(TOPOLOGY.replace("CNS", "OK")) == ()
    assert facts.parse_no_peer("") == ()


@pytest.mark.parametrize(
    ("outcome", "problem"),
    [
        (
            subprocess.CompletedProcess([], 9, "Failed to initialize NVML: Driver/library\nversion mismatch", ""),
            "version mism",
        ),
        (subprocess.TimeoutExpired("nvidia-smi", 20), "nvidia-smi does not answer within 20 s"),
        (OSError(8, "Exec format error"), "nvidia-smi cannot be run (Exec format error)"),
        (subprocess.CompletedProcess([], 0, "what?", ""), "nvidia-smi answers 'what?'"),
    ],
)
def test_driver_that_does_not_answer_is_named(monkeypatch, outcome, problem):
    def run(*_, **__):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(facts.shutil, "which", lambda _name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(facts.subprocess, "run", run)
    assert problem in facts.rebuild(facts.gather()).gpu_problem


def test_facts_of_this_machine_survive_json_and_another_version(tmp_path):
    values = json.loads(json.dumps(facts.gather([str(tmp_path / "runs" / "x")], [str(tmp_path / "absent")])))
    found = facts.rebuild(values | {"of_a_newer_version": 1})
    assert found.packages["ray"]
    assert found.disks[0].path == str(tmp_path / "runs" / "x")
    assert found.disks[0].free_gib > 0
    assert found.disks[0].problem == ""
    assert list(found.missing) == [str(tmp_path / "absent")]
    assert not (tmp_path / "runs").exists()
    assert facts.rebuild({}).host == ""


def test_file_instead_of_a_folder_is_named(tmp_path):
    (tmp_path / "runs").write_text("")
    assert facts.look_at(tmp_path / "runs" / "x").problem == f"{tmp_path / 'runs'} is not a folder"
