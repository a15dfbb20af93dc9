"""Engine interface for coroutines: the same for an engine thread in this process and for one in another process."""

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
"""Seconds to wait for an answer after its deadline: the engine ends late requests only between two steps."""

Event = Piece | Answer | Exception
"""Event of a request: a piece of text, or the last one, its answer or an error."""
Events = list[tuple[str, Event]]
"""Pairs of request id and event."""


class AskedEngine(ABC):
    """Engine as the HTTP endpoints use it."""

    def __init__(self) -> None:
        self._awaited: dict[str, asyncio.Queue[Event]] = {}
        self.snapshot = Snapshot()
        """Recent state of the engine, updated about twice a second while it computes."""

    @property
    @abstractmethod
    def stages(self) -> tuple[StageFacts, ...]:
        """Running stages; empty while a crashed one restarts."""

    @abstractmethod
    def require_ready(self) -> None:
        """Raise StageLostError unless all stages run."""

    @abstractmethod
    def _submit(self, request: Request, adapter: AdapterRef | None) -> None:
        """Queue a request; its events reach `_deliver` in the caller's event loop."""

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """End a request that nobody waits for."""

    async def ask(self, request: Request, adapter: AdapterRef | None = None) -> AsyncIterator[Piece | Answer]:
        """Yield the pieces of an answer's text as they come, and last the Answer. Leaving early cancels the request.

        Raises:
            ConfigError: the request can never be answered.
            AdapterError: its adapter does not fit.
            QueueFullError: the queue is full, or requests in flight use all adapters that fit.
            StageLostError: a stage is down, or crashed meanwhile.
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
        """Return the answer without its pieces of text."""
        async with contextlib.aclosing(self.ask(request, adapter)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Answer):
                    return event
        raise AssertionError("a stream ends with its answer or an error")

    def _deliver(self, events: Events) -> None:
        for name, event in events:
            if (awaited := self._awaited.get(name)) is not None:
                awaited.put_nowait(event)


async def _wait(events: asyncio.Queue[Event], request: Request) -> Event:
    left = None if request.deadline is None else request.deadline - time.monotonic() + _GRACE_S
    try:
        async with asyncio.timeout(left):
            return await events.get()
    except TimeoutError:
        return StageLostError("the stages of the model did not respond in time: ask again.")
