"""What coroutines ask of an engine, whether it runs in a thread of their process or in another process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from finlora.engine.request import Answer, Piece, Request
from finlora.errors import StageLostError
from finlora.serve.stage_states import AdapterRef, Snapshot, StageFacts

_GRACE_S = 5.0
"""Seconds after its deadline that an answer of the engine is waited for: it ends requests between two steps."""

Event = Piece | Answer | Exception
"""What a request gets: pieces of text, and last its answer or why there is none."""
Events = list[tuple[str, Event]]
"""Each with the id of its request."""


class AskedEngine(ABC):
    """An engine as the paths of a server see it."""

    def __init__(self) -> None:
        self._awaited: dict[str, asyncio.Queue[Event]] = {}
        self.snapshot = Snapshot()
        """How it stood a moment ago."""

    @property
    @abstractmethod
    def stages(self) -> tuple[StageFacts, ...]:
        """Stages that stand now; empty while they are lost."""

    @abstractmethod
    def require_ready(self) -> None:
        """Raise StageLostError while the stages do not stand."""

    @abstractmethod
    def _submit(self, request: Request, adapter: AdapterRef | None) -> None:
        """Have a request answered: `_deliver` gets what comes of it, in the caller's event loop."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request for which nobody waits any more."""

    async def ask(self, request: Request, adapter: AdapterRef | None = None) -> AsyncIterator[Piece | Answer]:
        """Yield the pieces of an answer's text as they come, and last the Answer. Leaving early cancels the request.

        Raises:
            ConfigError: the request can never be answered.
            AdapterError: its adapter does not fit.
            QueueFullError: too many wait, or too many adapters are at work.
            StageLostError: the stages do not stand, or died meanwhile.
        """
        self.require_ready()
        events: asyncio.Queue[Event] = asyncio.Queue()
        self._awaited[request.id] = events
        is_over = False
        try:
            self._submit(request, adapter)
            while True:
                event = await _wait(events, request)
                is_over = not isinstance(event, Piece)
                if isinstance(event, Exception):
                    raise event
                yield event
                if is_over:
                    return
        finally:
            del self._awaited[request.id]
            if not is_over:
                self.cancel(request.id)

    async def answer(self, request: Request, adapter: AdapterRef | None = None) -> Answer:
        """Return the answer alone."""
        async with contextlib.aclosing(self.ask(request, adapter)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Answer):
                    return event
        raise AssertionError("a stream ends with its answer or an error")

    def _deliver(self, brought: Events) -> None:
        for name, event in brought:
            if (events := self._awaited.get(name)) is not None:
                events.put_nowait(event)


async def _wait(events: asyncio.Queue[Event], request: Request) -> Event:
    left = None if request.deadline is None else request.deadline - time.monotonic() + _GRACE_S
    try:
        async with asyncio.timeout(left):
            return await events.get()
    except TimeoutError:
        return StageLostError("the stages of the model gave no sign of life: ask again.")
