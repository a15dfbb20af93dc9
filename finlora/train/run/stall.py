"""Watchdog that kills a stalled worker, so that Ray Train restarts all workers from the last checkpoint.

A worker can hang without an error: in a collective that another worker never joins, in the start of a thread without memory
(CPython waits for it without limit), in a GPU driver that lost its GPU. The others then wait for it, and Ray sees all alive.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again


class StallGuard:
    """Context manager inside which `tick` must be called at least every `max_stall_s` seconds.

    Args:
        max_stall_s: longest time between two ticks; None: no limit.
        end: takes a message and does not return. The default ends the process without clean-up, which could hang too.
    """

    def __init__(self, max_stall_s: float | None, end: Callable[[str], object] | None = None) -> None:
        self._max_stall_s, self._end = max_stall_s, end or _end_process
        self._is_over = threading.Event()
        self._last = 0.0
        # Created before memory can run out; it only waits and compares.
        self._thread = threading.Thread(target=self._watch, name="StallGuard", daemon=True)

    def __enter__(self) -> StallGuard:
        self.tick()
        if self._max_stall_s is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def tick(self) -> None:
        """Report progress: a pass, a step, a checkpoint."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        assert self._max_stall_s is not None
        message = (
            f"finlora: nothing was done for {self._max_stall_s:g} s: this worker hangs, or waits for one that does. It ends, and "
            "the run goes on from its last checkpoint. If a pass or a checkpoint may take longer, set train.max_stall_s higher.\n"
        )
        while not self._is_over.wait(min(1.0, self._max_stall_s / 4)):
            if time.monotonic() - self._last > self._max_stall_s:
                self._end(message)
                return


def _end_process(message: str) -> None:
    os.write(2, message.encode())
    os._exit(EXIT_CODE)
