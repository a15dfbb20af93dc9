"""When the last stage reads what it has drawn.

At once, where the next message comes only after it. Where all stages hand over on GPUs (hidden_states_gpu.py) messages run
ahead of what is computed, and the last stage reads behind the next one: what a message takes on the host is then no time in which
its GPU stands still. Each message then brings the answer to the one before it, the first one an empty one; an empty message asks
for the last answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from finlora.engine.messages import Message
from finlora.stage.sampling import Unread


@dataclasses.dataclass(frozen=True, slots=True)
class Queued:
    """State of a message that the last stage has worked on and not read."""

    result: Unread
    read_seconds: Callable[[], tuple[float, ...]]
    """Waits for the last stage, and returns the seconds of the stages of which the message does not say any."""


class Reader:
    """Reads the last stage's answers; of an earlier stage it lets all pass."""

    def __init__(self) -> None:
        self.is_late = False
        """Whether to read behind the next message."""
        self._left: Message | None = None

    def take(self, answer: Message) -> Message:
        """Return what goes on now: this answer, or the one before it."""
        if self.is_late:
            answer, self._left = self._left or Message(None), None if answer.is_empty else answer
        if not isinstance(answer.state, Queued):
            return answer
        output = answer.state.result.read()
        return dataclasses.replace(answer, state=output, seconds=answer.seconds + answer.state.read_seconds())

    def forget(self) -> None:
        """Read at once from now on; what was left is void."""
        self.is_late, self._left = False, None
