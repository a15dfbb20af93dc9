"""Signals that end a command: Ctrl-C, a stopped job, a closed terminal. `nohup` ignores the last one, and stays obeyed."""

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
"""What asks a command to end: from the keyboard, from `kill` or `ray job stop`, from a terminal that closes."""


def heeded_signals() -> tuple[signal.Signals, ...]:
    """Return those of ENDING that end this process in order: all, but SIGHUP where `nohup` had it ignored.

    SIGINT counts even where it is ignored: a shell script starts each `command &` so, and who sends it by `kill -INT` means it.
    """
    return tuple(
        number for number in ENDING if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def leave_terminal() -> None:
    """Point the standard streams that are a terminal to nothing: what is printed after a hangup would be an error."""
    nothing = os.open(os.devnull, os.O_RDWR)
    try:
        null = os.fstat(nothing).st_rdev
        for descriptor in (0, 1, 2):
            with contextlib.suppress(OSError):
                found = os.fstat(descriptor)
                # Not isatty: a terminal that is gone answers no to it.
                if stat.S_ISCHR(found.st_mode) and found.st_rdev != null:
                    os.dup2(nothing, descriptor)
    finally:
        os.close(nothing)


@contextlib.contextmanager
def without_hangup_for_children() -> Iterator[None]:
    """Let processes that are started inside never get SIGHUP, as Ray keeps SIGINT from its own.

    A closed terminal signals its whole process group. The workers must outlive it to write the checkpoint that this process
    asks for, and end with it. A mask is inherited by each child; a SIGHUP that comes meanwhile waits until the end.
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
    """Turn SIGTERM and SIGHUP inside into an error that unwinds, so that temporary files go and a local Ray ends.

    Whoever can do better, as a training with its checkpoint, sets handlers of its own meanwhile.
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
def keep_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM while Ray is joined: `ray.init` sets its own, which exits with 15 and says nothing.

    A process without a handler keeps Ray's.

    Raises:
        StoppedByError: SIGTERM came inside, while Ray's handler stood.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before in (signal.SIG_DFL, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    except SystemExit as error:
        if error.code == signal.SIGTERM:
            raise StoppedByError(signal.SIGTERM) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


class StoppedByError(BaseException):
    """A signal ends this process now. No Exception, so that nothing that tries again keeps it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number

    def explain(self) -> StoppedError:
        """Return what is shown, with the shell's code of the signal."""
        return StoppedError(
            f"Stopped by {self.number.name}: what was not written yet is lost. The same command starts again, a training or a "
            "search from its last checkpoint.",
            128 + self.number,
        )


def leave_output() -> None:
    """Point standard output to nothing, after its reader has gone: Python writes out what is left when it ends."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):
        os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
