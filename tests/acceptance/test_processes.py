"""Commands of the walk end in time, with all that they started."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from acceptance.processes import MARK, Process, end_marked, marked_processes

FOREVER = "import time\nwhile True: time.sleep(0.1)"


@pytest.fixture
def start(tmp_path):
    """Start Python code with its own mark; kills what is left of it."""
    mark = f"test-{os.getpid()}-{time.monotonic_ns()}"

    def run(code):
        process = Process([sys.executable, "-c", code], {**os.environ, MARK: mark}, tmp_path, tmp_path / "log")
        process.mark = mark
        return process

    yield run
    end_marked(mark)


def test_end_of_a_command_is_its_code_output_and_time(start):
    done = start("import sys\nprint('out', flush=True)\nsys.stderr.write('err')\nsys.exit(7)").wait(60)
    assert (done.code, done.text) == (7, "out\nerr")
    assert done.seconds > 0


def test_command_over_its_time_is_ended_and_says_so(start):
    process = start(FOREVER)
    done = process.wait(0.5)
    assert done.code == 124
    assert "killed by the walk after" in done.text
    assert not process.is_running


def test_signal_reaches_the_command_alone(start):
    process = start(FOREVER)
    process.send(signal.SIGTERM)
    assert process.wait(60).code == -signal.SIGTERM


def test_what_a_command_left_behind_in_another_session_is_found_by_its_mark(start):
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {FOREVER!r}], start_new_session=True)"
    process = start(code)
    assert process.wait(60).code == 0
    (left,) = marked_processes(process.mark).values()
    assert "while True" in left
    assert list(end_marked(process.mark).values()) == [left]
    until = time.monotonic() + 30
    while marked_processes(process.mark):
        assert time.monotonic() < until
        time.sleep(0.05)
