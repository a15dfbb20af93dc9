"""Signals that end a command: clean exit with the shell's code; ignored ones stay ignored; Ray's processes survive a hangup."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from finlora.machine.signals import (
    ENDING,
    StoppedByError,
    end_in_order,
    handled_signals,
    hold_sigterm,
    without_hangup_for_children,
)


@pytest.fixture(autouse=True)
def handlers_of_a_new_process():
    """A Ray instance that another test has started leaves a handler of SIGTERM; a runner may ignore SIGINT and SIGHUP."""
    before = {number: signal.getsignal(number) for number in ENDING}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signal_unwinds_and_has_the_shells_code(number, code):
    with pytest.raises(StoppedByError) as stop, end_in_order():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_DFL
    explained = stop.value.explain()
    assert explained.exit_code == code
    assert str(explained).startswith(f"Stopped by {number.name}: unwritten work is lost.")


def test_signal_has_the_shells_code_during_and_after_what_sets_a_handler_of_its_own():
    """As `ray.init` does, whose handler exits with 15."""

    def join():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))

    def leave(then):
        with end_in_order():
            with hold_sigterm():
                join()
                if then == "during":
                    os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    for then in ("during", "after"):
        with pytest.raises(StoppedByError) as stop:
            leave(then)
        assert stop.value.explain().exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with hold_sigterm():  # a user's program without a handler
        join()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    with pytest.raises(SystemExit, match="3"), end_in_order(), hold_sigterm():
        sys.exit(3)


def test_signal_that_comes_while_ray_joins_waits_for_its_end():
    done = []

    def join():
        with end_in_order(), hold_sigterm() as is_held:
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(is_held)

    with pytest.raises(StoppedByError):
        join()
    assert done == [True]
    with hold_sigterm() as is_held:  # a user's program without a handler
        assert not is_held


def test_ignored_hangup_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with end_in_order():
            assert handled_signals() == ENDING[:2]
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_interrupt_counts_in_a_background_command_of_a_script():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a script's `command &`
    try:
        assert handled_signals() == ENDING
    finally:
        signal.signal(signal.SIGINT, before)


def test_child_started_inside_does_not_hear_of_a_hangup():
    code = "import signal; print(signal.SIGHUP in signal.pthread_sigmask(signal.SIG_BLOCK, []))"
    with without_hangup_for_children():
        inside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    outside = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert (inside.strip(), outside.strip()) == ("True", "False")


def test_hangup_leaves_the_terminal_so_that_printing_is_no_error():
    """The terminal is closed, as with its window; files and pipes stay open."""
    master, terminal = pty.openpty()
    code = (
        "import os, sys\nfrom finlora.machine.signals import leave_terminal\nsys.stdin.readline()\n"
        "null = os.stat(os.devnull).st_rdev\nbefore = os.fstat(1).st_rdev == null\nleave_terminal()\n"
        "os.write(1, b'x')\nprint(before, os.fstat(1).st_rdev == null, file=sys.stderr)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=terminal, stderr=subprocess.PIPE, text=True
    )
    os.close(terminal)
    os.close(master)
    _, said = child.communicate("go\n", timeout=60)
    assert (child.returncode, said) == (0, "False True\n")
