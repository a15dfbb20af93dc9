"""Clock of a command's start: seconds of each phase, from the start of its process to its first result."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

_WORDS = {"data": "reading the data", "base": "loading the base", "adapter": "preparing the adapter"}


class StartClock:
    """Seconds of consecutive phases.

    Args:
        started: when the first phase began, by `now`. None: now.
        now: clock in seconds.
        on_phase: called with the name of each phase that begins.
    """

    def __init__(
        self,
        first: str,
        started: float | None = None,
        *,
        now: Callable[[], float] | None = None,
        on_phase: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._now, self.on_phase = now or read_boot_clock, on_phase
        self._name: str | None = first
        self._since = self.started = self._now() if started is None else started
        self._seconds: dict[str, float] = {}

    def enter(self, name: str) -> None:
        """End the current phase, and begin another. After `end` nothing is counted."""
        if self._name is None:
            return
        self._count()
        self._name = name
        self.on_phase(name)

    def end(self, at: float | None = None) -> None:
        """End the last phase, now or at a moment of the clock."""
        if self._name is not None:
            self._count(at)
            self._name = None

    @property
    def is_ended(self) -> bool:
        return self._name is None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase that has ended, in order."""
        return dict(self._seconds)

    def add(self, more: Mapping[str, float], within: str, waited: float = 0.0) -> None:
        """Put phases that another process counted behind the phase that lasted meanwhile, which keeps the rest of its seconds.

        Args:
            within: the phase here.
            waited: seconds of it that belong to no start.
        """
        whole = self._seconds.pop(within, 0.0)
        self._seconds[within] = max(0.0, whole - waited - sum(more.values()))
        self._seconds |= more

    def _count(self, at: float | None = None) -> None:
        assert self._name is not None
        now = self._now() if at is None else at
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + now - self._since
        self._since = now


def describe_start(seconds: Mapping[str, float]) -> str:
    """Return one line: `Started in 23.4 s: imports 6.1, Ray 4.0, ...`."""
    parts = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items())
    return f"Started in {sum(seconds.values()):.1f} s: {parts}"


def name_first(what: str, device: str) -> str:
    """Return the name of the last phase, `first step`: on a GPU kernels are compiled in it that are not kept yet."""
    return f"compiling and {what}" if device == "cuda" else what


def describe_phase(name: str) -> str:
    """Return what a user is told while a phase lasts."""
    return _WORDS.get(name, name)


def read_boot_clock() -> float:
    """Return the seconds since this machine started, the same in all of its processes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def find_process_start() -> float:
    """Return when this process started, by `read_boot_clock`; now, where the system does not say."""
    try:
        # The name in parentheses may hold spaces; the start is field 22. Source: proc_pid_stat(5).
        ticks = Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        started = int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return read_boot_clock()
    now = read_boot_clock()
    return started if now - started >= 0 else now  # in some containers the two clocks differ
