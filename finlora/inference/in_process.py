"""Executor whose stages are in this process."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finlora.engine.micro_batch import MicroBatch, Output
from finlora.errors import AdapterError
from finlora.stage.sampling import Stopwatch, Unread
from finlora.stage.stage import Stage


class InProcess:
    """Runs all stages one after the other. A GPU computes while the host prepares the next micro-batch."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.can_follow = stages[-1].device.type == "cuda"
        self._in_flight: deque[tuple[Unread, list[Stopwatch]]] = deque()

    def start(self, batch: MicroBatch) -> None:
        result: Any = None
        # A micro-batch follows only one that was not collected yet.
        sampled = None if batch.follows is None else self._find(batch.follows).tokens
        watches = []
        for stage in self.stages:
            watches.append(Stopwatch(stage.device))
            result = stage.run(batch, result, lambda: sampled)
            watches[-1].stop()
        self._in_flight.append((result, watches))

    def collect(self) -> Output:
        unread, watches = self._in_flight.popleft()
        return dataclasses.replace(unread.read(), stage_seconds=[watch.read() for watch in watches])

    def _find(self, number: int) -> Unread:
        return next(unread for unread, _ in self._in_flight if unread.number == number)

    def load_adapter(self, name: str, folder: Path) -> None:
        try:
            for stage in self.stages:
                stage.load_adapter(name, folder)
        except AdapterError:
            self.unload_adapter(name)  # from the stages before the one that refused it
            raise

    def unload_adapter(self, name: str) -> None:
        for stage in self.stages:
            stage.unload_adapter(name)

    def peak_memory_gib(self) -> float | None:
        return self.stages[0].peak_memory_gib()  # they share a process
