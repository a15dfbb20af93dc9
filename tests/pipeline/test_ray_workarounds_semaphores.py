"""Removal of semaphores left behind by ended Ray processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from finlora.pipeline.ray_workarounds import remove_left_semaphores


def test_only_old_semaphores_of_ended_processes_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = process.pid, os.getpid()
    names = (
        *(f"sem.hdr{dead}-1700000000000000001", f"sem.obj{dead}-1700000000000000001", f"sem.hdr{alive}-17"),
        *(f"sem.other{dead}-17", f"sem.hdr{dead}", "plasma"),
    )
    for name in names:
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - 100, time.time() - 100))
    (tmp_path / f"sem.hdr{dead}-18").touch()
    assert remove_left_semaphores(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {*names[2:], f"sem.hdr{dead}-18"}
    assert remove_left_semaphores(tmp_path / "absent") == 0
