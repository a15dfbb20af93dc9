"""Atomic files, sealed records, and scratch folders that are deleted after their process."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from small_disk import small_files

from finlora.durable import (
    append_line,
    follow_umask,
    read_last_line,
    read_lines,
    scratch_folder,
    seal,
    unseal,
    write_whole,
)

RECORD = {"loss": 0.1, "name": "a\u2028b", "rate": 1e-05, "nested": {"n": [1, None, True]}, "bad": float("inf")}


def test_sealed_record_reads_back_and_each_flipped_bit_is_noticed():
    text = json.dumps(seal(RECORD)).encode()
    assert unseal(json.loads(text)) == RECORD
    num_noticed = 0
    for index in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[index // 8] ^= 1 << index % 8
        try:
            found = unseal(json.loads(flipped))
        except ValueError:  # includes UnicodeDecodeError and JSONDecodeError
            num_noticed += 1
        else:
            # The only other bits are the hash's name, which a reader of known fields refuses, and white space.
            assert found == RECORD or found.keys() - RECORD.keys(), flipped
    assert num_noticed > 0.9 * 8 * len(text)


@pytest.mark.parametrize("value", [[1], 3, "text", None])
def test_what_is_no_record_is_refused(value):
    with pytest.raises(ValueError, match="expected a record"):
        unseal(value)


def test_file_is_replaced_whole_or_left(tmp_path):
    path = tmp_path / "file"
    write_whole(path, "old")
    with small_files(2000), pytest.raises(OSError) as caught:  # noqa: PT011  (the number is looked at)
        write_whole(path, "x" * 2001)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208


def test_line_that_does_not_fit_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"text": "x" * 1000})
    before = path.read_bytes()
    with small_files(2000), pytest.raises(OSError, match=r"only \d+ of \d+ bytes were written") as caught:
        append_line(path, {"text": "y" * 1000})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    append_line(path, {"text": "z"})
    assert [record["text"][0] for record in read_lines(path)] == ["x", "z"]


def test_lines_cut_or_changed_are_left_out_and_the_last_whole_one_is_found(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert (read_lines(path), read_last_line(path)) == ([], None)
    for number in range(4):
        append_line(path, {"number": number})
    path.write_bytes(path.read_bytes().replace(b'"number": 2', b'"number": 7')[:-5])
    assert [record["number"] for record in read_lines(path)] == [0, 1]
    assert read_last_line(path) == {"number": 1}
    append_line(path, {"number": 4})
    assert read_last_line(path) == {"number": 4}
    assert read_last_line(path, num_bytes=8) is None


def test_modes_follow_the_umask_and_an_inherited_group_stays(tmp_path, file_mode):
    tmp_path.chmod(0o2755)
    folder = tmp_path / "staging"
    folder.mkdir()
    folder.chmod(0o2700)
    (folder / "weights").touch(mode=0o600)
    follow_umask(folder)
    assert [path.name for path in folder.iterdir()] == ["weights"]
    assert (folder / "weights").stat().st_mode & 0o7777 == file_mode
    assert folder.stat().st_mode & 0o777 == file_mode | (file_mode & 0o444) >> 2
    assert folder.stat().st_mode & 0o2000
    write_whole(tmp_path / "record.json", "{}")
    append_line(tmp_path / "records.jsonl", {"number": 1})
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("record*")} == {file_mode}


def test_scratch_folder_of_a_killed_process_is_swept_and_that_of_a_living_one_is_not(tmp_path):
    work = (
        "import pathlib, sys, time; from finlora.durable import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1]), 'work-') as folder:\n"
        "    (folder / 'file').touch(); print(folder, flush=True); time.sleep(60)\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", work, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        dead, alive = (process.stdout.readline().strip() for process in processes)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        for path in (dead, alive):
            os.utime(path, (time.time() - 100, time.time() - 100))
        with scratch_folder(tmp_path, "work-") as own:
            assert {str(path) for path in tmp_path.iterdir()} == {alive, str(own)}
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
    assert [str(path) for path in tmp_path.iterdir()] == [alive]
