"""The engine in a thread: it drives the core, any number of requests await their text, and lost stages come back.

The thread alone touches the core. Others hand it calls through a queue; what a step brings goes back to each of them in one
piece. When the stages are lost, every request under way ends with StageLostError, later ones are refused at once, and
the thread brings the stages back (finlora/serve/live/recovery.py).
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
"""Least seconds between two snapshots; where a micro-batch takes longer, there is one after each."""
_WAIT_S = 0.25
"""Longest wait for a call while there is nothing to compute."""
_STUCK_S = 300.0
"""Seconds that no step takes: the first one of a GPU, which builds its kernels, takes a minute."""

Sink = Callable[[Events], None]
"""Takes what came of requests, in the engine's thread; must not wait."""


class AsyncEngine(AskedEngine):
    """Requests of coroutines and of other processes, answered by a core in a thread.

    Args:
        open_core: brings the stages up; called again after they were lost and could not be repaired.
        max_adapters: adapters held at once.
        check_every_s: seconds between two looks at idle stages.
    """

    def __init__(self, open_core: Callable[[], OpenCore], max_adapters: int, check_every_s: float) -> None:
        super().__init__()
        self._open_core, self._max_adapters, self._check_every_s = open_core, max_adapters, check_every_s
        self._calls: queue.SimpleQueue[Callable[[EngineCore], None]] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._home: tuple[asyncio.AbstractEventLoop, Sink] | None = None
        """Event loop of this process's coroutines, and what hands it events."""
        self._last_use: OrderedDict[str, None] = OrderedDict()
        self._closing = threading.Event()
        self._opened: OpenCore | None = None
        self._recovery = Recovery(open_core, self._closing)
        self._first_error: BaseException | None = None
        self._first_try = threading.Event()
        self._next_snapshot = 0.0
        self._read = Totals()
        """What the meter of the core at work stood at with the last snapshot."""
        self._step_began: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Bring the stages up, and return when they stand.

        Raises:
            FinloraError: they cannot be had; nothing runs then.
        """
        self._thread.start()
        self._first_try.wait()
        if self._first_error is not None:
            raise self._first_error

    def close(self) -> None:
        """End all requests and let the stages go."""
        self._closing.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Whether the thread answers, or brings the stages back; not where it waits for a stage that gives no sign."""
        began = self._step_began
        return self._thread.is_alive() and (began is None or time.monotonic() - began < _STUCK_S)

    @property
    def stages(self) -> tuple[StageFacts, ...]:
        """Stages that stand now; empty while they are lost."""
        opened = self._opened  # another thread may lose it meanwhile
        return opened.stages if opened is not None else ()

    def require_ready(self) -> None:
        """Raise StageLostError while the stages do not stand."""
        if self._opened is None:
            raise StageLostError(f"{self.why_down}: ask again in a few seconds.")

    @property
    def why_down(self) -> str:
        """What the stages wait for while they do not stand."""
        return self._recovery.why_down

    def submit(self, request: Request, adapter: AdapterRef | None, sink: Sink) -> None:
        """Have a request answered: `sink` gets what comes of it, last an Answer or an error. Safe in every thread."""
        self._sinks[request.id] = sink

        def take_on(core: EngineCore) -> None:
            if request.id not in self._sinks:
                return  # the stages were lost meanwhile, or nobody waits any more
            try:
                if adapter is not None:
                    self._ensure_adapter(core, adapter)
                core.submit(request)
            except FinloraError as error:
                self._send([(request.id, error)])

        self._calls.put(take_on)

    def cancel(self, request_id: str) -> None:
        """End a request: its sink gets nothing from now on. Safe in every thread."""
        if self._sinks.pop(request_id, None) is not None:
            self._calls.put(lambda core: core.cancel(request_id))

    def leave(self, sink: Sink) -> None:
        """End all requests of a sink that takes nothing any more."""
        for name, other in list(self._sinks.items()):
            if other is sink:
                self.cancel(name)

    def _submit(self, request: Request, adapter: AdapterRef | None) -> None:
        self.submit(request, adapter, self._find_home())

    def _find_home(self) -> Sink:
        loop = asyncio.get_running_loop()
        if self._home is None or self._home[0] is not loop:

            def hand_over(events: Events) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended, and with it everyone who waited
                    loop.call_soon_threadsafe(self._deliver, events)

            self._home = loop, hand_over
        return self._home[1]

    def _run(self) -> None:
        opened = self._open_first()
        while opened is not None and not self._closing.is_set():
            # Of adapters, those that went through a repair are still there.
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
        """End what is under way, and bring the stages back; None where the server closes first."""
        lost_at = time.monotonic()
        _logger.error("The stages were lost: %s: %s", type(error).__name__, error)
        self._opened = self._step_began = None
        nothing = (0.0,) * len(self.snapshot.busy)
        self._note(num_losses=self.snapshot.num_losses + 1, queue=0, active=0, kv_used=0, busy=nothing, bubble=0.0)
        self._fail_all(StageLostError("a stage of the model died before the answer was complete: ask again."))
        back = self._recovery.bring_back(lost)
        if back is None:
            return None
        opened, is_repaired = back
        seconds = time.monotonic() - lost_at
        self._note(recovery_s=seconds, num_repairs=self.snapshot.num_repairs + is_repaired)
        how = "the dead one was started alone" if is_repaired else "all were started anew"
        _logger.warning("All stages stand again, %.1f s after the loss: %s", seconds, how)
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
            if not core.is_stalled:  # what has just computed lives
                next_check = time.monotonic() + self._check_every_s

    def _take_calls(self, core: EngineCore) -> None:
        """Carry out all calls at hand; where there is nothing else to do, wait for the first."""
        try:
            # Where requests are left that cannot start, their deadlines are looked at between two waits.
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
        """Carry out calls that come while the stage computes, for as long as it has enough to do without them."""
        until = time.monotonic() + core.spare_s
        with contextlib.suppress(queue.Empty):
            while (left := until - time.monotonic()) > 0:
                self._calls.get(timeout=left)(core)

    def _ensure_adapter(self, core: EngineCore, adapter: AdapterRef) -> None:
        """Load an adapter unless it is there; the one unused for longest gives way."""
        if adapter.name not in core.adapters:
            while len(core.adapters) >= self._max_adapters:
                idle = [name for name in self._last_use if not core.scheduler.uses_adapter(name)]
                if not idle:
                    raise QueueFullError(
                        f"all {self._max_adapters} places for adapters are at work (max_adapters): try again later"
                    )
                core.unload_adapter(idle[0])
                del self._last_use[idle[0]]
            core.load_adapter(adapter.name, adapter.folder)
        self._last_use[adapter.name] = None
        self._last_use.move_to_end(adapter.name)

    def _fail_all(self, error: FinloraError) -> None:
        """End every request, those that were not yet taken on as well."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()
        self._send([(name, error) for name in list(self._sinks)])

    def _send(self, events: Events) -> None:
        """Hand events to those that await them, in one piece to each."""
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
