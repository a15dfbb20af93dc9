"""Workarounds for Ray's compiled graphs: channel reads that do not spin, leaked semaphores, and errors of dead stages.

Ray reads a channel in a loop without pauses: an idle server with four stages kept four cores busy, and stages on CPU competed
with others that only waited. Here a reader spins only as long as the next message is likely to come soon, and pauses longer and
longer after that.

Source of what is replaced: https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/experimental/channel/shared_memory_channel.py
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from ray.exceptions import RayActorError, RayChannelTimeoutError, RayError, RayTaskError
from ray.experimental.channel.shared_memory_channel import CompositeChannel

from finlora.errors import FinloraError, ResourceError, StageLostError

EAGER_S = {"cuda": 0.25, "cpu": 0.0}
"""Seconds of waiting without pauses: on a GPU that makes a hop fastest, on CPU other stages need the cores."""
_SHARE, _LEAST_S, _MOST_S = 0.1, 5e-5, {"cuda": 1e-3, "cpu": 5e-3}
"""A pause is a tenth of the wait so far, within bounds."""

_Read = Callable[[CompositeChannel, float | None], Any]


def wait_with_pauses(device: str) -> None:
    """Make this process's channel reads pause; a later call changes how soon.

    Args:
        device: `cuda` or `cpu`, on which the stages compute.
    """
    plain = getattr(CompositeChannel.read, "__wrapped__", CompositeChannel.read)
    CompositeChannel.read = _pausing(plain, EAGER_S[device], _MOST_S[device])


def _pausing(plain: _Read, eager_s: float, most_s: float) -> _Read:
    # Start of each wait: Ray splits one into several reads.
    began: WeakKeyDictionary[CompositeChannel, float] = WeakKeyDictionary()

    @functools.wraps(plain)
    def read(channel: CompositeChannel, timeout: float | None = None) -> Any:
        now = time.monotonic()
        since = began.setdefault(channel, now)
        until = math.inf if timeout is None or timeout == -1 else now + timeout
        left = min(since + eager_s, until) - now
        while True:
            try:
                message = plain(channel, max(0.0, left))
            except RayChannelTimeoutError:
                now = time.monotonic()
                if now >= until:
                    raise
            else:
                del began[channel]
                return message
            time.sleep(min(max(_SHARE * (now - since), _LEAST_S), most_s))
            left = 0.0

    return read


_NAME = re.compile(r"sem\.(?:hdr|obj)(\d+)-\d+")
_YOUNG_S = 60.0
"""Age from which one is removed: containers may share the folder, where a process id says nothing, but a name is needed only
until both ends of its channel have opened it."""


def remove_left_semaphores(folder: Path = Path("/dev/shm")) -> int:
    """Remove semaphores whose node process is dead, and return their number; those of other users stay."""
    num_removed = 0
    for path in folder.glob("sem.*"):
        match = _NAME.fullmatch(path.name)
        if match is None or Path("/proc", match[1]).exists():
            continue
        with contextlib.suppress(OSError):  # another process removed it first, or it is another user's
            status = path.stat()
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > _YOUNG_S:
                path.unlink()
                num_removed += 1
    return num_removed


@contextmanager
def translate_ray_errors() -> Iterator[None]:
    """Turns Ray's errors inside the block into ours.

    Raises:
        ResourceError: a stage could not be loaded.
        StageLostError: a stage is dead, has failed, or has not answered in time.
    """
    try:
        yield
    except RayError as error:
        if isinstance(error, FinloraError):  # raised by a stage: Ray gives it both classes
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        # The last line of a stage's error follows its traceback; the first line of a dead stage's precedes Ray's guesses.
        if isinstance(error, RayActorError) and error.actor_init_failed:
            reason = said[-1].removeprefix(f"{ResourceError.__module__}.")
            raise ResourceError(f"a stage of the model cannot be loaded: {reason}") from error
        reason = said[-1] if isinstance(error, RayTaskError) else said[0]
        raise StageLostError(
            f"a stage of the model was lost ({reason}): ask again; if it happens again, the worker's log in the Ray dashboard "
            "says whether memory was short."
        ) from error
