"""Seconds of a command's start by phase, with a simulated clock."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from finlora.machine.start_clock import StartClock, describe_start, find_process_start, read_boot_clock


class Clock:
    seconds = 100.0

    def __call__(self):
        return self.seconds


def test_each_phase_ends_where_the_next_begins():
    now, names = Clock(), []
    clock = StartClock("imports", 90.0, now=now, on_phase=names.append)
    clock.enter("base")
    now.seconds = 103.5
    clock.enter("first step")
    now.seconds = 104.0
    assert clock.seconds == {"imports": 10.0, "base": 3.5}
    clock.end()
    now.seconds = 200.0
    clock.enter("later")
    clock.end()
    assert clock.seconds == {"imports": 10.0, "base": 3.5, "first step": 0.5}
    assert names == ["base", "first step"]
    assert clock.is_ended


def test_phase_that_comes_again_is_summed():
    now = Clock()
    clock = StartClock("imports", now=now)
    for name in ("base", "imports", "base"):
        now.seconds += 2.0
        clock.enter(name)
    now.seconds += 1.0
    clock.end()
    assert clock.seconds == {"imports": 4.0, "base": 3.0}


def test_phases_of_a_worker_are_taken_out_of_the_wait_for_it():
    now = Clock()
    clock = StartClock("imports", 97.0, now=now)
    clock.enter("worker")
    now.seconds = 120.0
    clock.end()
    clock.add({"base": 4.0, "first step": 2.5}, "worker", waited=10.0)
    assert clock.seconds == {"imports": 3.0, "worker": 3.5, "base": 4.0, "first step": 2.5}
    assert describe_start(clock.seconds) == "Started in 13.0 s: imports 3.0, worker 3.5, base 4.0, first step 2.5"


def test_worker_that_counts_more_than_passed_leaves_nothing_negative():
    clock = StartClock("worker", 99.5, now=Clock())
    clock.end()
    clock.add({"base": 4.0}, "worker")
    assert clock.seconds == {"worker": 0.0, "base": 4.0}


def test_start_of_a_process_lies_before_its_first_line():
    before = read_boot_clock()
    program = (
        "import time; time.sleep(0.2)\n"
        "from finlora.machine.start_clock import find_process_start, read_boot_clock\n"
        "print(find_process_start(), read_boot_clock())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    started, first_line = map(float, run.stdout.split())
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before - tick <= started
    assert first_line - started >= 0.2 - tick


@pytest.mark.parametrize("now", [0.0, 5.0])
def test_start_that_lies_in_the_future_counts_as_now(monkeypatch, now):
    """Containers may count both clocks from different moments."""
    monkeypatch.setattr(time, "clock_gettime", lambda _clock: now)
    assert find_process_start() == now
