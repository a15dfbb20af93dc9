"""Waiting for a message of a Ray compiled graph without a core at full load for each that waits.

Ray reads a channel by asking for it again and again without a pause: an idle server with four stages kept four cores busy, and
stages on CPU took turns with others that only waited. Here a reader asks without a pause for as long as the next message is
near, and with growing pauses after that.

Source of what is replaced: https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/experimental/channel/shared_memory_channel.py
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from ray.exceptions import RayChannelTimeoutError
from ray.experimental.channel.shared_memory_channel import CompositeChannel

EAGER_S = {"cuda": 0.25, "cpu": 0.0}
"""Seconds of waiting without pauses: on a GPU a hop takes least so, on CPU the cores have others to compute for."""
_SHARE, _LEAST_S, _MOST_S = 0.1, 5e-5, {"cuda": 1e-3, "cpu": 5e-3}
"""A pause is a tenth of what was waited so far, within bounds."""

_Read = Callable[[CompositeChannel, float | None], Any]


def wait_with_pauses(device: str) -> None:
    """Have this process's reads of channels pause; a later call changes how soon.

    Args:
        device: `cuda` or `cpu`, that the stages compute on.
    """
    plain = getattr(CompositeChannel.read, "__wrapped__", CompositeChannel.read)
    CompositeChannel.read = _pausing(plain, EAGER_S[device], _MOST_S[device])


def _pausing(plain: _Read, eager_s: float, most_s: float) -> _Read:
    # Of waits that go on: Ray asks for slices of one.
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
