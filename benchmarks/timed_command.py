"""Command in a process of its own, timed from outside: its start, the end of its first optimiser step, and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 15.0
"""Time that a stopped command has to end by itself."""
_POLL_SECONDS = 0.02


class StoppedByLimitError(Exception):
    """The time limit, or a signal, ended a command."""


class CommandError(Exception):
    """A command failed; the message holds its exit code and last line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """Moments of a command, as time.time() gives them."""

    started: float
    ended: float
    first_step: float | None
    """End of the first optimiser step. None: none was seen."""

    @property
    def wall(self) -> float:
        """Seconds of the whole process."""
        return self.ended - self.started


def run_command(
    command: Sequence[str],
    log: Path,
    folder: Path,
    environment: dict[str, str],
    stop: threading.Event,
    first_step: Path | None = None,
) -> Timing:
    """Run a command in a session of its own, in a folder.

    Args:
        log: gets its output.
        first_step: file that the command fills when its first step has ended. Later writes do not count.

    Raises:
        StoppedByLimitError: `stop` was set; the command and what it started are ended.
        CommandError: it failed.
    """
    seen: float | None = None
    if stop.is_set():
        raise StoppedByLimitError
    with log.open("wb") as stream:
        started = time.time()
        process = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        while process.poll() is None:
            if seen is None and first_step is not None:
                seen = _find_time(first_step)
            if stop.wait(_POLL_SECONDS):
                _end(process)
                raise StoppedByLimitError
    ended = time.time()
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no message"]
        raise CommandError(f"exit {process.returncode}: {lines[-1][:300]} ({log})")
    if seen is None and first_step is not None:
        seen = _find_time(first_step)
    return Timing(started=started, ended=ended, first_step=seen)


def _find_time(path: Path) -> float | None:
    """Return when a file was written; None where it is missing or still empty."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime if status.st_size else None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command by SIGTERM, then what is left of its session by SIGKILL."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
