"""Processes of an acceptance walk's commands: with a time limit, and killed with all that they started.

Every process of a walk has the walk's mark in its environment. So Ray's processes are found even after their parents have
ended, and no other process is ever touched.
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
    """Exit code; 124 at the time limit, as of `timeout`."""
    text: str
    """Standard output and error together."""
    seconds: float


class Process:
    """A running command, with its output in a file.

    Args:
        environment: holds the walk's mark.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
        self.log, self._started = log, time.monotonic()
        with log.open("wb") as stream:
            # Its own session: Ctrl-C at the walk does not reach the command.
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
        """Wait for its end, and kill it at the time limit."""
        try:
            code = self._process.wait(timeout=max(0.1, seconds))
        except subprocess.TimeoutExpired:
            self.end()
            return Done(
                code=124, text=f"{self.text}\nkilled by the walk after {self.seconds:.0f} s", seconds=self.seconds
            )
        return Done(code=code, text=self.text, seconds=self.seconds)

    def end(self) -> None:
        """Send SIGTERM, and kill its group if it does not end."""
        if self.is_running:
            self.send(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(timeout=_GRACE_S)


def marked_processes(mark: str) -> dict[int, str]:
    """Return pid and command line of each live process with the mark."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() in variables:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def end_marked(mark: str) -> dict[int, str]:
    """Kill all processes with the mark, and return them."""
    found = marked_processes(mark)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return found
