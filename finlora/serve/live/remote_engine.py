"""Engine client of an HTTP process, over a link to the process of the same replica that runs the engine."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

from finlora.engine.request import Request
from finlora.errors import StageLostError
from finlora.serve.accounts.keys import KeyRecord
from finlora.serve.accounts.quota import Standings
from finlora.serve.live.handle import AskedEngine
from finlora.serve.live.link import Link, connect
from finlora.serve.stage_states import AdapterRef, StageFacts

_GONE = "the process that runs the model is gone"


class RemoteEngine(AskedEngine):
    """Counterpart of `AsyncEngine` in another process. It also counts the keys' quota in the hub.

    Args:
        link: to the hub; `follow` must run while requests are in flight.
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link: Link | None = link
        self._stages: tuple[StageFacts, ...] = ()
        self._why_down = "the model is being loaded"
        self._numbers = itertools.count()
        self._admissions: dict[int, asyncio.Future[Standings]] = {}

    @classmethod
    async def open(cls, path: Path) -> RemoteEngine:
        """Connect to the hub at a socket.

        Raises:
            OSError: no hub listens there.
        """
        return cls(await connect(path))

    async def follow(self) -> None:
        """Deliver what the hub sends until the hub is gone; then end all requests with StageLostError."""
        if self._link is None:
            return  # closed before this started
        async for kind, *rest in self._link.receive():
            if kind == "events":
                self._deliver(*rest)
            elif kind == "standing":
                self.snapshot, self._stages, self._why_down = rest
            elif kind == "admitted":
                number, outcome = rest
                if (admission := self._admissions.get(number)) is not None and not admission.done():
                    if isinstance(outcome, Exception):
                        admission.set_exception(outcome)
                    else:
                        admission.set_result(outcome)
        self.close()

    def close(self) -> None:
        """Disconnect from the hub and end all requests with StageLostError."""
        if self._link is None:
            return
        self._link.abort()
        self._link, self._stages, self._why_down = None, (), _GONE
        lost = StageLostError(f"{_GONE}: ask again.")
        self._deliver([(name, lost) for name in self._awaited])
        for admission in self._admissions.values():
            if not admission.done():
                admission.set_exception(lost)

    @property
    def stages(self) -> tuple[StageFacts, ...]:
        return self._stages

    def require_ready(self) -> None:
        if not self._stages:
            raise StageLostError(f"{self._why_down}: ask again in a few seconds.")

    def _submit(self, request: Request, adapter: AdapterRef | None) -> None:
        if self._link is not None:
            self._link.put("ask", request, adapter)

    def cancel(self, request_id: str) -> None:
        if self._link is not None:
            self._link.put("cancel", request_id)

    async def admit(self, key: KeyRecord) -> Standings:
        """Count a request of a key in the hub, which counts for all processes, and return what is left.

        Raises:
            QuotaError: the key has used its requests or tokens of the minute.
            StageLostError: the hub is gone.
        """
        if key.requests_per_minute is None and key.tokens_per_minute is None:
            return {}
        if self._link is None:
            self.require_ready()
            raise AssertionError("no stage runs without a link")
        number = next(self._numbers)
        admission: asyncio.Future[Standings] = asyncio.get_running_loop().create_future()
        self._admissions[number] = admission
        try:
            self._link.put("admit", number, key)
            return await admission
        finally:
            del self._admissions[number]

    def take_tokens(self, key: KeyRecord, count: int) -> None:
        """Count computed tokens of a key."""
        if key.tokens_per_minute is not None and self._link is not None:
            self._link.put("spend", key, count)
