"""Commands of an acceptance walk as processes: bounded in time, and ended with all that they started.

Every process below a walk carries the walk's mark in its environment. So those that Ray starts are found by it when the
processes between have ended; no other process is ever touched.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "FINLORA_ACCEPTANCE"
_GRACE_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Done:
    """A command that has ended."""

    code: int
    """Exit code; 124 where it ran out of time, as `timeout` says it."""
    text: str
    """Standard output and error together."""
    seconds: float


class Process:
    """A command under way, its output in a file.

    Args:
        environment: holds the walk's mark.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
        self.log, self._started = log, time.monotonic()
        with log.open("wb") as stream:
            # A session of its own: Ctrl-C at the walk is not Ctrl-C at the command.
            self._process = subprocess.Popen(
                command, env=dict(environment), cwd=folder, stdout=stream, stderr=stream, start_new_session=True
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def text(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float) -> Done:
        """Return how it ended; end it where it takes longer."""
        try:
            code = self._process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.end()
            return Done(
                code=124, text=f"{self.text}\nended by the walk after {self.seconds:.0f} s", seconds=self.seconds
            )
        return Done(code=code, text=self.text, seconds=self.seconds)

    def end(self) -> None:
        """Ask it to end, and kill its group where it does not."""
        if self.is_running:
            self.send(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(timeout=_GRACE_S)


def marked_processes(mark: str) -> dict[int, str]:
    """Return pid and command line of each live process that carries the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() in variables:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended, or is another user's
            continue
    return found


def end_marked(mark: str) -> dict[int, str]:
    """Kill what carries the mark, and return what it was."""
    found = marked_processes(mark)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found
