"""Unix socket server that shares one replica's engine and quota with its HTTP processes, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from typing import Any

from finlora.serve.accounts.quota import Quota
from finlora.serve.live.engine_thread import AsyncEngine, Sink
from finlora.serve.live.handle import Events
from finlora.serve.live.link import Link, listen

_SHOW_EVERY_S = 0.1
"""Seconds between two engine snapshots sent to the HTTP processes. Until they see a lost stage, the hub refuses requests."""


class Hub:
    """Server of the engine and the quota to any number of connected processes.

    Args:
        path: socket file; `start` creates it and `close` removes it.
    """

    def __init__(self, engine: AsyncEngine, quota: Quota, path: Path) -> None:
        self._engine, self._quota, self.path = engine, quota, path
        self._links: set[Link] = set()
        self._loop: asyncio.AbstractEventLoop
        self._closing: asyncio.Event
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hub", daemon=True)

    def start(self) -> None:
        """Accept connections from now on."""
        self._listener = listen(self.path)
        self._thread.start()
        self._listens.wait()

    def close(self) -> None:
        """Close every link, which ends the requests at the other end with StageLostError. A second call does nothing."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        asyncio.run(self._work())

    async def _work(self) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_unix_server(self._serve, sock=self._listener)
        shows = asyncio.ensure_future(self._show())
        self._listens.set()
        await self._closing.wait()
        shows.cancel()
        # A connection that was just accepted has no link yet. If the server closed now, asyncio would leak its socket.
        self._loop.remove_reader(self._listener)
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for link in self._links:
                link.abort()
            await asyncio.wait(others, timeout=0.05)
        server.close()
        await asyncio.sleep(0)  # asyncio closes sockets in the next loop iteration

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link, engine = Link(reader, writer), self._engine
        self._links.add(link)

        def sink(events: Events) -> None:
            with contextlib.suppress(RuntimeError):  # the hub is closed
                self._loop.call_soon_threadsafe(link.put, "events", events)

        link.put("standing", engine.snapshot, engine.stages, engine.why_down)
        try:
            async for message in link.receive():
                self._take(link, sink, *message)
        finally:
            engine.leave(sink)
            self._links.discard(link)
            link.abort()

    def _take(self, link: Link, sink: Sink, kind: str, *rest: Any) -> None:
        """Handle one message. An error is sent back to the request that caused it and ends no other."""
        if kind == "ask":
            request, adapter = rest
            try:
                self._engine.require_ready()
                self._engine.submit(request, adapter, sink)
            except Exception as error:
                link.put("events", [(request.id, error)])
        elif kind == "admit":
            number, key = rest
            try:
                standings = self._quota.take_request(key)
            except Exception as error:
                link.put("admitted", number, error)
            else:
                link.put("admitted", number, standings)
        elif kind == "cancel":
            self._engine.cancel(*rest)
        elif kind == "spend":
            self._quota.take_tokens(*rest)

    async def _show(self) -> None:
        shown: tuple[object, ...] = ()
        while True:
            engine = self._engine
            standing = engine.snapshot, engine.stages, engine.why_down
            if standing != shown:
                shown = standing
                for link in self._links:
                    link.put("standing", *standing)
            await asyncio.sleep(_SHOW_EVERY_S)
