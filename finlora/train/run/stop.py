"""Stop of a run by a signal to its driver: all workers write a checkpoint at one step, then end.

The driver writes the signal's name into the run's `stop` file. After a step worker 0 reads the file and tells the others,
so that all stop at the same step. They ask only at steps at which 0/1 Adam has just exchanged (with AdamW: at every
step): workers have waited for each other there anyway, and their weights agree as in every checkpoint. So a run of 0/1
Adam may go on for up to `optim.max_local_steps` steps after the signal. Before the first step there is nothing to save,
and the driver ends at once.

The file exists, empty, from the run's start: on NFS another machine sees new content at its next open(), but may overlook
a new file for a minute.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from finlora.errors import StoppedError
from finlora.machine.signals import handled_signals, leave_terminal

_READ_EVERY_S = 0.5


@contextlib.contextmanager
def stop_on_signals(
    path: Path, announce: Callable[[str], None], has_begun: Callable[[], bool] = lambda: True
) -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP inside into a request to the workers; a second one ends this process at once.

    Outside the main thread, where Python allows no handlers, nothing changes. A SIGHUP that `nohup` ignores stays ignored.

    Args:
        path: the run's `stop` file; emptied at the start.
        announce: shows a line to the user.
        has_begun: whether a step was done that a checkpoint could save.

    Raises:
        StoppedError: a signal came before that.
    """
    path.write_text("", encoding="utf-8")
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    was_asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal was_asked
        if number == signal.SIGHUP:
            leave_terminal()
            if was_asked:  # a closing terminal may signal twice: its shell and itself
                return
        if was_asked:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            sys.exit(128 + number)
        was_asked = True
        name = signal.Signals(number).name
        path.write_text(name, encoding="utf-8")
        if not has_begun():
            raise describe_stop(path, 0, 0)
        announce(f"{name}: stopping after a checkpoint of this step. Once more ends at once, without one.")

    before = {number: signal.signal(number, ask) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def describe_stop(path: Path, step: int, total_steps: int) -> StoppedError:
    """Return the error that ends the driver after its workers stopped at `step`, with the shell's exit code of the signal."""
    name = path.read_text(encoding="utf-8").strip()
    number = signal.Signals[name] if name in signal.Signals.__members__ else signal.SIGTERM
    if step:
        words = f"at step {step:,} of {total_steps:,}, which is saved: the same command resumes there."
    else:
        words = "before the first step: there was nothing to save. The same command starts again."
    return StoppedError(f"Stopped by {name} {words}", 128 + number)


class StopRequest:
    """Worker's side of the stop request; equal on all workers.

    Args:
        path: the run's `stop` file.
        worker: this worker's rank.
        world_size: number of workers.
    """

    def __init__(self, path: Path, worker: int, world_size: int) -> None:
        self._path = path
        self._worker = worker
        self._world_size = world_size
        # Over gloo: neither the GPU nor its stream takes part.
        self._group = dist.new_group(backend="gloo") if world_size > 1 and dist.get_backend() != "gloo" else None
        self._is_asked = False
        self._next_read = 0.0

    def is_asked(self) -> bool:
        """Return whether to stop now. Collective: every worker calls it after the same steps."""
        if self._worker == 0 and not self._is_asked and time.monotonic() >= self._next_read:
            self._is_asked = self._path.read_bytes().strip() != b""
            self._next_read = time.monotonic() + _READ_EVERY_S
        if self._world_size > 1:
            flag = torch.tensor([self._is_asked], dtype=torch.uint8)
            dist.broadcast(flag, src=0, group=self._group)
            self._is_asked = bool(flag.item())
        return self._is_asked
