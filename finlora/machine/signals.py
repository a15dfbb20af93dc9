"""Signals that end a command: Ctrl-C, a stopped job, a closed terminal (unless `nohup` ignores it)."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from finlora.errors import StoppedError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""From the keyboard, from `kill` or `ray job stop`, from a terminal that closes."""


def handled_signals() -> tuple[signal.Signals, ...]:
    """Return the signals of ENDING that this process handles: all, except SIGHUP under `nohup`.

    SIGINT is handled even where it is ignored: a shell script ignores it for each `command &`, but `kill -INT` is meant.
    """
    return tuple(
        number for number in ENDING if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def leave_terminal() -> None:
    """Redirect standard streams that are a terminal to /dev/null: printing after a hangup is an error."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        null = os.fstat(nothing).st_rdev
        for descriptor in (0, 1, 2):
            with contextlib.suppress(OSError):
                found = os.fstat(descriptor)
                # Not isatty: it is false for a closed terminal.
                if stat.S_ISCHR(found.st_mode) and found.st_rdev != null:
                    os.dup2(nothing, descriptor)
    finally:
        os.close(nothing)


@contextlib.contextmanager
def without_hangup_for_children() -> Iterator[None]:
    """Block SIGHUP for processes that are started inside, as Ray does with SIGINT.

    A closed terminal signals its whole process group. The workers must survive it to write the checkpoint that this process
    asks for, and end with this process. Children inherit the mask; a SIGHUP that comes meanwhile waits until the end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def end_in_order() -> Iterator[None]:
    """Raise SIGTERM and SIGHUP inside as an error, so that temporary files are deleted and a local Ray ends.

    A training, which writes a checkpoint first, sets its own handlers meanwhile.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        raise StoppedByError(signal.Signals(number))

    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def hold_sigterm() -> Iterator[bool]:
    """Hold SIGTERM back until the end of `ray.init`: Ray's native code crashes where Python leaves it while it joins.

    Yields whether it is held back; a process without a handler keeps Ray's. What sets a handler inside is overruled at the end.

    Raises:
        StoppedByError: SIGTERM came meanwhile.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before in (signal.SIG_DFL, None) or threading.current_thread() is not threading.main_thread():
        yield False
        return
    came = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: came.set())
    try:
        yield True
    except SystemExit as error:
        if error.code != signal.SIGTERM:
            raise
        came.set()  # a handler that was set inside has answered it
    finally:
        signal.signal(signal.SIGTERM, before)
        if came.is_set():
            raise StoppedByError(signal.SIGTERM)


class StoppedByError(BaseException):
    """A signal ends this process now. Not an Exception, so that no retry catches it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    def explain(self) -> StoppedError:
        """Return the error for the user, with the shell's exit code of the signal."""
        return StoppedError(
            f"Stopped by {self.number.name}: unwritten work is lost. Run the same command again; a training or a search "
            "continues from its last checkpoint.",
            128 + self.number,
        )


def leave_output() -> None:
    """Redirect standard output to /dev/null after its reader has gone: Python flushes it at exit."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
