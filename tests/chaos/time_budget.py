"""Time budget of a long check: each part runs in its own processes, which are killed at its end.

A part ends when it is done, at its time limit, or at a signal to the check (SIGTERM, SIGINT, SIGHUP). No process stays
behind: the check adopts orphans of its parts (PR_SET_CHILD_SUBREAPER), so that it finds and kills every process ever
started below it.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
_END_S = 10.0
_LOOK_S = 0.5
"""Interval for reaping adopted orphans: until reaped they look alive to a part that waits for their end."""


class StoppedError(Exception):
    """Stop by a signal; `exit_code` is 128 + its number, as in a shell."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Need(NamedTuple):
    """Time of a part, in seconds."""

    least: float
    """Minimum for a meaningful result."""
    usual: float
    """Time without a limit."""


def share_out(needs: Mapping[str, Need], seconds: float) -> dict[str, float]:
    """Return the seconds of each part that fits: its minimum, and a share of the rest in proportion to its usual time.

    Parts that do not fit are not in the result; the largest minimum is dropped first.
    """
    fitting = dict(needs)
    while fitting and sum(need.least for need in fitting.values()) > seconds:
        del fitting[max(fitting, key=lambda part: fitting[part].least)]
    rest = seconds - sum(need.least for need in fitting.values())
    weight = sum(need.usual for need in fitting.values())
    return {part: need.least + rest * need.usual / weight for part, need in fitting.items()}


@contextlib.contextmanager
def note_signals() -> Iterator[list[int]]:
    """Collect SIGNALS in a list instead of interrupting; `run_part` polls the list."""
    asked: list[int] = []
    with _handle(lambda number, _frame: asked.append(number)):
        yield asked


@contextlib.contextmanager
def _handle(handler: Callable[[int, Any], object]) -> Iterator[None]:
    before = {each: signal.signal(each, handler) for each in SIGNALS}
    try:
        yield
    finally:
        for each, earlier in before.items():
            signal.signal(each, earlier)


def run_to_end(check: Callable[[], int]) -> int:
    """Run a check in this process and kill all that it started; returns its exit code, or 128 + the signal."""

    def stop(number: int, _frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise StoppedError(number)

    adopt_orphans()
    try:
        with _handle(stop):
            return check()
    except StoppedError as stop:
        print(f"{stop}: all started processes were killed", flush=True)
        return stop.exit_code
    finally:
        end_all_below()


def adopt_orphans() -> None:
    """Become the subreaper: orphaned descendants become children of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def run_part(command: Sequence[str], seconds: float, asked: Sequence[int] = (), **settings: Any) -> int | None:
    """Run a part and kill all that it started; returns its exit code, None at the time limit.

    Args:
        command: command line of the part.
        seconds: time limit.
        asked: received signals (`note_signals`).
        settings: arguments of subprocess.Popen.

    Raises:
        StoppedError: a signal came; the part was killed.
    """
    adopt_orphans()
    process = None
    until = time.monotonic() + seconds
    try:
        process = subprocess.Popen(command, start_new_session=True, **settings)  # Ctrl-C reaches only the check
        while time.monotonic() < until:
            if asked:
                raise StoppedError(asked[0])
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(_LOOK_S, max(0.0, until - time.monotonic())))
            _reap_orphans(process.pid)
        return None
    finally:
        end_all_below()
        if process is not None:
            process.wait()


def end_all_below() -> None:
    """Kill all descendants, adopted orphans included, and remove their shared memory."""
    pids = set()
    while victims := [each for each in psutil.Process().children(recursive=True) if _is_alive(each)]:
        for victim in victims:
            pids.add(victim.pid)
            with contextlib.suppress(psutil.Error):
                victim.kill()
        psutil.wait_procs(victims, timeout=_END_S)
    _reap_orphans()
    for path in Path("/dev/shm").glob("*"):
        owner = re.search(r"(?:hdr|obj|torch_)(\d+)[-_]", path.name)
        if owner and int(owner[1]) in pids:
            path.unlink(missing_ok=True)


def _reap_orphans(but: int | None = None) -> None:
    for child in psutil.Process().children():
        if child.pid != but:
            with contextlib.suppress(psutil.Error):
                child.wait(timeout=0)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
