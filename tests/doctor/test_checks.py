"""Findings from invented facts of GPU clusters."""

from __future__ import annotations

import dataclasses

import pytest

from finlora.doctor.checks import check_nodes, exit_code
from finlora.doctor.facts import Disk, Gpu, NodeFacts

VERSIONS = {"finlora": "0.1.0", "ray": "2.60.0", "torch": "2.13.0", "bitsandbytes": "0.50.2"}
H200 = tuple(Gpu(index=index, name="NVIDIA H200", total_gib=139.8, used_gib=0.0) for index in range(2))
HEAD = NodeFacts(
    host="head",
    python="3.11.7",
    packages=VERSIONS,
    torch_cuda="12.8",
    driver="570.86",
    driver_cuda="12.8",
    gpus=H200,
    bnb_binaries=("126", "128"),
    shm_gib=64.0,
    open_files=65536,
    disks=(Disk(path="/runs", free_gib=900.0, used_share=0.1),),
)
NODE = dataclasses.replace(HEAD, host="node", ray_gpus=2.0, skew_s=0.0)


def look(*nodes, wanted=0.0):
    """Return the lines of warnings and faults, and the exit code."""
    findings = list(check_nodes(nodes, gpus_wanted=wanted))
    lines = [f"{each.level} {each.check}: {each.found} -> {each.advice}" for each in findings if each.level != "ok"]
    return lines, exit_code(findings)


def test_good_cluster_has_no_findings():
    assert look(HEAD, dataclasses.replace(HEAD, ray_gpus=2.0, skew_s=0.0), NODE, wanted=4.0) == ([], 0)
    findings = list(check_nodes([HEAD, NODE], gpus_wanted=2.0))
    assert "head: Python 3.11.7, finlora 0.1.0, ray 2.60.0, torch 2.13.0, bitsandbytes 0.50.2" in findings[0].found


@pytest.mark.parametrize(
    ("change", "level", "words"),
    [
        (
            {"python": "3.10.1"},
            "fault",
            "versions: node: Python 3.10.1 there, 3.11.7 here -> install the same environment",
        ),
        ({"packages": VERSIONS | {"ray": "2.9.3"}}, "fault", "versions: node: ray 2.9.3 there, 2.60.0 here"),
        ({"packages": VERSIONS | {"torch": "2.11"}}, "warning", "versions: node: torch 2.11 there, 2.13.0 here"),
        (
            {"torch_cuda": ""},
            "fault",
            "CUDA: node: torch 2.13.0 is a CPU build -> install the CUDA build: `make setup TO",
        ),
        ({"driver_cuda": ""}, "fault", "CUDA: node: libcuda.so.1 is missing"),
        (
            {"driver_cuda": "11.8"},
            "fault",
            "CUDA: node: torch is built for CUDA 12.8, driver 570.86 runs 11.8 -> update",
        ),
        ({"driver_cuda": "12.4"}, "warning", "CUDA: node: torch is built for CUDA 12.8, driver 570.86 runs 12.4"),
        ({"bnb_binaries": ("126",)}, "fault", "bitsandbytes: node: has no binary for torch's CUDA 12.8 (only 126)"),
        (
            {"gpu_problem": "nvidia-smi says: Driver/library version mismatch"},
            "fault",
            "GPUs: node: nvidia-smi says: Driver/l",
        ),
        (
            {"ray_gpus": 1.0},
            "warning",
            "GPUs: node: the driver lists 2 (NVIDIA H200 140 GiB, NVIDIA H200 140 GiB), Ray was told",
        ),
        ({"no_peer": ("0-1",)}, "warning", "peer access: node: GPUs 0-1 do not reach each other's memory"),
        ({"gpus": (dataclasses.replace(H200[0], used_gib=80.0), H200[1])}, "warning", "in use already: 0 (80.0 GiB)"),
        (
            {"shm_gib": 0.0625},
            "warning",
            "/dev/shm: node: 0.06 GiB -> give the container more, for example `--shm-size=8g`",
        ),
        ({"shm_gib": None}, "warning", "/dev/shm: node: missing"),
        (
            {"open_files": 1024},
            "warning",
            "open files: node: at most 1024 -> raise the limit, for example `ulimit -n 65536`",
        ),
        ({"skew_s": -3600.0}, "warning", "clock: node: 3600 s behind -> run a time service"),
        ({"missing": ("/data",)}, "fault", "files: node: /data does not exist -> put it where every node sees it"),
    ],
)
def test_what_is_wrong_on_a_node_is_reported_with_what_to_do(change, level, words):
    lines, code = look(HEAD, dataclasses.replace(NODE, **change), wanted=1.0)
    assert [line for line in lines if line.startswith(f"{level} ") and words in line]
    if level == "fault":
        assert code in (2, 5)
    else:
        assert (len(lines), code) == (1 + ("head is not a node" in " ".join(lines)), 0)


def test_gpus_that_are_not_there_are_a_fault_and_a_submitting_machine_without_any_is_none():
    lines, code = look(HEAD, NODE, wanted=8.0)
    assert "fault GPUs: the config asks for 8 GPUs, but there are 2 -> set train.num_workers" in "\n".join(lines)
    assert code == 5
    laptop = dataclasses.replace(HEAD, host="laptop", gpus=(), torch_cuda="", driver_cuda="", packages=VERSIONS)
    lines, code = look(laptop, NODE, wanted=2.0)
    assert lines == [
        "warning GPUs: laptop is not a node of the cluster -> submit commands as jobs, `ray job submit ...`"
    ]
    assert code == 0


@pytest.mark.parametrize(("visible", "level"), [("", "fault"), ("-1", "fault"), ("0", "warning")])
def test_hidden_gpus_are_reported(visible, level):
    lines, _ = look(dataclasses.replace(HEAD, visible=visible), wanted=1.0)
    assert lines[0].startswith(
        f"{level} GPUs: head: NVIDIA H200 140 GiB, NVIDIA H200 140 GiB; CUDA_VISIBLE_DEVICES={visible!r}"
    )


@pytest.mark.parametrize(
    ("disk", "level", "code", "words"),
    [
        (
            {"problem": "Read-only file system"},
            "fault",
            2,
            "/runs cannot be written (Read-only file system) -> give another",
        ),
        ({"free_gib": 0.01}, "fault", 5, "/runs has 0.0 GiB free -> free disk space"),
        ({"free_gib": 2.0}, "warning", 0, "/runs has 2.0 GiB free, 10% used"),
        ({"used_share": 0.97}, "warning", 0, "/runs has 900.0 GiB free, 97% used"),
    ],
)
def test_disk_without_room_is_reported(disk, level, code, words):
    there = dataclasses.replace(HEAD.disks[0], **disk)
    lines, found = look(dataclasses.replace(HEAD, disks=(there,)))
    assert lines[0].startswith(level)
    assert words in lines[0]
    assert found == code


def test_a_machine_without_gpus_is_well_where_none_is_wanted():
    bare = dataclasses.replace(HEAD, gpus=(), torch_cuda="", driver_cuda="", bnb_binaries=())
    assert look(bare) == ([], 0)
