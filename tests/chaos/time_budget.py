"""A time budget over the parts of a long check: each part runs in processes of its own, which end with it.

What ends a part is its end, its time, or a signal to the check (SIGTERM, SIGINT, SIGHUP). No process stays behind: the check
adopts orphans of its parts (PR_SET_CHILD_SUBREAPER), so that all that was ever started below it can be found and killed.
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
"""Between two looks for adopted processes that have ended: until then they look alive to a part that waits for their end."""


class StoppedError(Exception):
    """A signal came; `exit_code` is what a shell would count."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class Need(NamedTuple):
    """Seconds of a part."""

    least: float
    """Below that it would end before it has shown anything."""
    usual: float
    """What it takes where nobody hurries it."""


def share_out(needs: Mapping[str, Need], seconds: float) -> dict[str, float]:
    """Return the seconds of each part that fits into a budget: its least, and of the rest a share by its usual time.

    A part for which there is no room is not in the answer; those that need most are left out first.
    """
    fitting = dict(needs)
    while fitting and sum(need.least for need in fitting.values()) > seconds:
        del fitting[max(fitting, key=lambda part: fitting[part].least)]
    rest = seconds - sum(need.least for need in fitting.values())
    weight = sum(need.usual for need in fitting.values())
    return {part: need.least + rest * need.usual / weight for part, need in fitting.items()}


@contextlib.contextmanager
def note_signals() -> Iterator[list[int]]:
    """Yield a list into which SIGNALS go while inside: `run_part` looks into it, so that nothing else is interrupted."""
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
    """Run a whole check in this process and end all that it started; returns its exit code, or that of a signal that came."""

    def stop(number: int, _frame: object) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)  # the next one must not disturb the end
        raise StoppedError(number)

    adopt_orphans()
    try:
        with _handle(stop):
            return check()
    except StoppedError as stop:
        print(f"{stop}: all that was started has been ended", flush=True)
        return stop.exit_code
    finally:
        end_all_below()


def adopt_orphans() -> None:
    """Become the parent of every process below whose own parent ends, so that none is lost from sight."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def run_part(command: Sequence[str], seconds: float, asked: Sequence[int] = (), **settings: Any) -> int | None:
    """Run a part and end all that it started; returns its exit code, None where its time was over first.

    Args:
        command: what to run.
        seconds: time until it is ended.
        asked: signals that came (`note_signals`).
        settings: of subprocess.Popen.

    Raises:
        StoppedError: a signal came; the part has been ended.
    """
    adopt_orphans()
    process = None
    until = time.monotonic() + seconds
    try:
        process = subprocess.Popen(command, start_new_session=True, **settings)  # Ctrl-C comes to the check alone
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
    """Kill every process below this one, orphans that it adopted too, and remove the shared memory that they left."""
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
