"""Engine thread: runs the engine's steps, serves any number of coroutines, and recovers crashed stages.

Only this thread touches the core. Others pass it calls through a queue; the events of one step reach each of them in one
call. When a stage crashes, every request in flight ends with StageLostError, new ones are refused at once, and the thread
restarts the stages (finlora/serve/live/recovery.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from finlora.engine.engine import EngineCore
from finlora.engine.meter import Totals
from finlora.engine.request import Piece, Request
from finlora.errors import FinloraError, QueueFullError, StageLostError
from finlora.serve.live.handle import AskedEngine, Events
from finlora.serve.live.recovery import Recovery, close_quietly
from finlora.serve.stage_states import AdapterRef, OpenCore, StageFacts

_logger = logging.getLogger(__name__)
_SNAPSHOT_S = 0.5
"""Minimum seconds between two snapshots. When a micro-batch takes longer, each is followed by one."""
_WAIT_S = 0.25
"""Longest wait for a call while there is nothing to compute, in seconds."""
_STUCK_S = 300.0
"""Seconds after which a step counts as hung. The first step on a GPU compiles its kernels and takes a minute."""

Sink = Callable[[Events], None]
"""Callback for the events of requests. Called in the engine's thread, so it must not block."""


class AsyncEngine(AskedEngine):
    """Engine core in a thread, for requests from coroutines and from other processes.

    Args:
        open_core: starts all stages; called again after a crash that could not be repaired.
        max_adapters: adapters held at once.
        check_every_s: seconds between two health checks of idle stages.
    """

    def __init__(self, open_core: Callable[[], OpenCore], max_adapters: int, check_every_s: float) -> None:
        super().__init__()
        self._open_core, self._max_adapters, self._check_every_s = open_core, max_adapters, check_every_s
        self._calls: queue.SimpleQueue[Callable[[EngineCore], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._home: tuple[asyncio.AbstractEventLoop, Sink] | None = None
        """Event loop of this process's coroutines, and the sink that delivers their events."""
        self._last_use: OrderedDict[str, None] = OrderedDict()
        self._closing = threading.Event()
        self._opened: OpenCore | None = None
        self._recovery = Recovery(open_core, self._closing)
        self._first_error: BaseException | None = None
        self._first_try = threading.Event()
        self._next_snapshot = 0.0
        self._read = Totals()
        """Totals of the core's meter at the last snapshot."""
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the stages, and return when all of them run.

        Raises:
            FinloraError: they could not start; nothing runs then.
        """
        self._thread.start()
        self._first_try.wait()
        if self._first_error is not None:
            raise self._first_error

    def close(self) -> None:
        """End all requests and close the stages."""
        self._closing.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread serves requests or restarts stages. False while it waits for a stage that hangs."""
        began = self._step_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < _STUCK_S)

    @property
    def stages(self) -> tuple[StageFacts, ...]:
        """Running stages; empty while a crashed one restarts."""
        opened = self._opened  # read once: the engine's thread may set it to None
        return opened.stages if opened is not None else ()

    def require_ready(self) -> None:
        """Raise StageLostError unless all stages run."""
        if self._opened is None:
            raise StageLostError(f"{self.why_down}: ask again in a few seconds.")

    @property
    def why_down(self) -> str:
        """Why the stages do not run, for error messages."""
        return self._recovery.why_down

    def submit(self, request: Request, adapter: AdapterRef | None, sink: Sink) -> None:
        """Queue a request. `sink` gets its events, the last one an Answer or an error. Thread-safe."""
        self._sinks[request.id] = sink

        def take_on(core: EngineCore) -> None:
            if request.id not in self._sinks:
                return  # cancelled, or ended by a crash, while it was in the queue
            try:
                if adapter is not None:
                    self._ensure_adapter(core, adapter)
                core.submit(request)
            except FinloraError as error:
                self._send([(request.id, error)])

        self._calls.put(take_on)

    def cancel(self, request_id: str) -> None:
        """End a request; its sink gets no further events. Thread-safe."""
        if self._sinks.pop(request_id, None) is not None:
            self._calls.put(lambda core: core.cancel(request_id))

    def leave(self, sink: Sink) -> None:
        """Cancel all requests of a sink that is gone."""
        for name, other in list(self._sinks.items()):
            if other is sink:
                self.cancel(name)

    def _submit(self, request: Request, adapter: AdapterRef | None) -> None:
        self.submit(request, adapter, self._find_home())

    def _find_home(self) -> Sink:
        loop = asyncio.get_running_loop()
        if self._home is None or self._home[0] is not loop:

            def hand_over(events: Events) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed, so nobody waits
                    loop.call_soon_threadsafe(self._deliver, events)

            self._home = loop, hand_over
        return self._home[1]

    def _run(self) -> None:
        opened = self._open_first()
        while opened is not None and not self._closing.is_set():
            # A repaired core keeps its adapters, a new one has none.
            self._last_use = OrderedDict.fromkeys(name for name in self._last_use if name in opened.core.adapters)
            self._opened = opened
            self._first_try.set()
            try:
                self._drive(opened)
            except Exception as error:
                opened = self._recover(opened, error)
        self._recovery.why_down = "the server is shutting down"
        self._opened = None
        if opened is not None:
            close_quietly(opened)
        self._fail_all(StageLostError("the server shut down before the answer was complete: ask again."))

    def _open_first(self) -> OpenCore | None:
        try:
            return self._open_core()
        except Exception as error:
            self._first_error = error
            self._first_try.set()
            return None

    def _recover(self, lost: OpenCore, error: Exception) -> OpenCore | None:
        """End the requests in flight and restart the stages; None if the server closes first."""
        lost_at = time.monotonic()
        _logger.error("A stage crashed: %s: %s", type(error).__name__, error)
        self._opened = self._step_began = None
        nothing = (0.0,) * len(self.snapshot.busy)
        self._note(num_losses=self.snapshot.num_losses + 1, queue=0, active=0, kv_used=0, busy=nothing, bubble=0.0)
        self._fail_all(StageLostError("a stage of the model crashed before the answer was complete: ask again."))
        back = self._recovery.bring_back(lost)
        if back is None:
            return None
        opened, is_repaired = back
        seconds = time.monotonic() - lost_at
        self._note(recovery_s=seconds, num_repairs=self.snapshot.num_repairs + is_repaired)
        how = "only the crashed ones restarted" if is_repaired else "all of them restarted"
        _logger.warning("All stages run again, %.1f s after the crash: %s", seconds, how)
        return opened

    def _drive(self, opened: OpenCore) -> None:
        core = opened.core
        self._read = core.meter.totals()
        next_check = time.monotonic() + self._check_every_s
        while not self._closing.is_set():
            self._take_calls(core)
            if (core.is_idle or core.is_stalled) and time.monotonic() >= next_check:
                opened.check()
                next_check = time.monotonic() + self._check_every_s
            if core.is_idle:
                self._take_snapshot(core)
                continue
            events: Events = []
            self._step_began = time.monotonic()
            if not core.spare_s:
                core.start()
            self._take_more_calls(core)
            answers = core.step(lambda name, piece: events.append((name, piece)))  # noqa: B023
            self._step_began = None
            events += [(answer.request_id, answer) for answer in answers]
            if answers:
                self._recovery.prove()
            self._send(events)
            self._take_snapshot(core)
            if not core.is_stalled:  # stages that just computed need no health check
                next_check = time.monotonic() + self._check_every_s

    def _take_calls(self, core: EngineCore) -> None:
        """Run all queued calls; while there is nothing to compute, wait for the first."""
        try:
            # A stalled core has requests that cannot start: the bounded wait lets their deadlines be checked.
            has_nothing = core.is_idle or core.is_stalled
            call = (
                self._calls.get(timeout=min(self._check_every_s, _WAIT_S)) if has_nothing else self._calls.get_nowait()
            )
            while True:
                call(core)
                call = self._calls.get_nowait()
        except queue.Empty:
            return

    def _take_more_calls(self, core: EngineCore) -> None:
        """Run calls that arrive while the stages compute, for as long as the stages have enough work queued."""
        until = time.monotonic() + core.spare_s
        with contextlib.suppress(queue.Empty):
            while (left := until - time.monotonic()) > 0:
                self._calls.get(timeout=left)(core)

    def _ensure_adapter(self, core: EngineCore, adapter: AdapterRef) -> None:
        """Load an adapter unless it is in memory; evict the least recently used one if there is no room."""
        if adapter.name not in core.adapters:
            while len(core.adapters) >= self._max_adapters:
                idle = [name for name in self._last_use if not core.scheduler.uses_adapter(name)]
                if not idle:
                    raise QueueFullError(
                        f"requests in flight use all {self._max_adapters} adapters that fit (max_adapters): try again later"
                    )
                core.unload_adapter(idle[0])
                del self._last_use[idle[0]]
            core.load_adapter(adapter.name, adapter.folder)
        self._last_use[adapter.name] = None
        self._last_use.move_to_end(adapter.name)

    def _fail_all(self, error: FinloraError) -> None:
        """End every request, queued ones included."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        self._send([(name, error) for name in list(self._sinks)])

    def _send(self, events: Events) -> None:
        """Deliver events, with one call for each sink."""
        shares: dict[Sink, Events] = {}
        for name, event in events:
            is_over = not isinstance(event, Piece)
            sink = self._sinks.pop(name, None) if is_over else self._sinks.get(name)
            if sink is not None:
                shares.setdefault(sink, []).append((name, event))
        for sink, share in shares.items():
            sink(share)

    def _take_snapshot(self, core: EngineCore) -> None:
        now = time.monotonic()
        if now < self._next_snapshot:
            return
        self._next_snapshot = now + _SNAPSHOT_S
        scheduler, reading, self._read = core.scheduler, core.meter.read(self._read), core.meter.totals()
        self._note(
            queue=scheduler.num_waiting,
            active=scheduler.num_active,
            kv_used=scheduler.pool.num_held,
            kv_total=scheduler.pool.num_rows,
            busy=reading.load or (0.0,) * len(self.stages),
            bubble=reading.bubble,
            adapters=tuple(core.adapters),
        )

    def _note(self, **changes: Any) -> None:
        self.snapshot = dataclasses.replace(self.snapshot, **changes)
