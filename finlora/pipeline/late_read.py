"""Late read of sampled tokens: the last stage queues a micro-batch before it waits for the one before.

Where all links run ahead (finlora/pipeline/links.py), the GPU then computes while the host handles a message. Each message
returns the answer to the one before it, the first message an empty one; an empty message fetches the last answer. Elsewhere the
last stage reads at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from finlora.engine.messages import Message
from finlora.stage.sampling import Unread


@dataclasses.dataclass(frozen=True, slots=True)
class Queued:
    """State of a message whose output the last stage has queued and not read."""

    result: Unread
    read_seconds: Callable[[], tuple[float, ...]]
    """Waits for the last stage, and returns the seconds of all stages that the message lacks."""


class Reader:
    """Reads the last stage's outputs; answers of other stages pass unchanged."""

    def __init__(self) -> None:
        self.is_late = False
        """Whether to read an output with the next message."""
        self._unread: Message | None = None

    def take(self, answer: Message) -> Message:
        """Return the answer to send now: this one, or the one before it."""
        if self.is_late:
            answer, self._unread = self._unread or Message(None), None if answer.is_empty else answer
        if not isinstance(answer.state, Queued):
            return answer
        output = answer.state.result.read()
        return dataclasses.replace(answer, state=output, seconds=answer.seconds + answer.state.read_seconds())

    def forget(self) -> None:
        """Read at once from now on, and drop an unread output."""
        self.is_late, self._unread = False, None
