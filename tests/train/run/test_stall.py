"""Watchdog: a stalled worker ends, a working one is left alone."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from finlora.config import TrainConfig
from finlora.errors import ConfigError
from finlora.train.run.stall import EXIT_CODE, StallGuard


def test_worker_that_does_nothing_is_ended_and_reported():
    said, is_ended = [], threading.Event()

    def end(message):
        said.append(message)
        is_ended.set()

    with StallGuard(0.2, end):
        assert is_ended.wait(30)
    assert "nothing was done for 0.2 s" in said[0]
    assert "train.max_stall_s" in said[0]


@pytest.mark.parametrize("max_stall_s", [20.0, None])
def test_worker_that_goes_on_is_left_alone(max_stall_s):
    said = []
    before = threading.active_count()
    with StallGuard(max_stall_s, said.append) as guard:
        for _ in range(5):
            time.sleep(0.02)
            guard.tick()
    assert said == []
    assert threading.active_count() == before


def test_process_that_hangs_ends():
    code = "import time; from finlora.train.run.stall import StallGuard; StallGuard(0.3).__enter__(); time.sleep(100)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == EXIT_CODE
    assert done.stderr.startswith("finlora: nothing was done for 0.3 s")


def test_setting_is_checked():
    with pytest.raises(ConfigError, match=r"train.max_stall_s=0: expected more than 0, or null"):
        TrainConfig(max_stall_s=0)
