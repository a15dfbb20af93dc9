"""A forked process that a fault may kill, and a small private disk for it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CLONE_NEWNS = 0x20000


class Child:
    """A forked process that runs one function; `words` holds the traceback of what it raised."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        self._code: int | None = None
        self._said = ""
        if self.pid == 0:
            os.close(self._read)
            try:
                work()
                os._exit(0)
            except BaseException:
                os.write(write, traceback.format_exc()[-2000:].encode())
                os._exit(1)
        os.close(write)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> None:
        if self._code is None:
            _, status = os.waitpid(self.pid, 0)
            self._end(status)

    @property
    def is_over(self) -> bool:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._end(status)
        return self._code is not None

    @property
    def words(self) -> str:
        return self._said

    def _end(self, status: int) -> None:
        self._code = os.waitstatus_to_exitcode(status)
        with os.fdopen(self._read, "rb") as stream:
            self._said = stream.read().decode()


def mount(disk: Path) -> bool:
    """Mount an 8 MiB tmpfs in a mount namespace of this process. Returns False where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0:
        return False
    quiet: dict[str, Any] = {"capture_output": True, "check": False}
    subprocess.run(["mount", "--make-rprivate", "/"], **quiet)
    return subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], **quiet).returncode == 0
