"""Inference engine: a scheduler fills micro-batches, an executor computes them, and answers and their texts are streamed.

Not thread-safe. An `Executor` holds the stages, in this process or in others.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from finlora.engine.detokenise import Detokeniser
from finlora.engine.meter import BubbleMeter, Forecast
from finlora.engine.micro_batch import MicroBatch, Output
from finlora.engine.request import Answer, Finish, Piece, Request, Token
from finlora.engine.scheduler import Scheduler
from finlora.errors import AdapterError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


_BUSY_SHARE, _MOST_SPARE_S = 0.75, 0.1
"""Share of a micro-batch's time for which the engine waits for more requests, and the most seconds."""


class Executor(Protocol):
    """Stages that compute micro-batches in the order in which they are started."""

    can_follow: bool
    """Whether a micro-batch that follows another can be started before that one is collected."""

    def start(self, batch: MicroBatch) -> None:
        """Send a micro-batch to the first stage.

        Raises:
            StageLostError: a stage in another process is lost, and with it all micro-batches in flight.
        """
        ...

    def collect(self) -> Output:
        """Wait for the oldest micro-batch in flight; errors as `start`."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter on every stage, or on none.

        Raises:
            AdapterError: the folder holds no adapter that fits.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter from every stage."""
        ...

    def peak_memory_gib(self) -> float | None:
        """Return the peak memory of all stages together since they were loaded, in GiB; None: unknown."""
        ...


OnPiece = Callable[[str, Piece], None]
"""Called with a request's id and new text."""


class EngineCore:
    """Engine over one executor.

    Args:
        tokenizer: of the base model.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, tokenizer: PreTrainedTokenizerFast) -> None:
        self.executor, self.scheduler, self.tokenizer = executor, scheduler, tokenizer
        self.adapters: dict[str, Path] = {}
        self.meter = BubbleMeter()
        self._forecast, self._sizes = Forecast(), deque[int]()
        self._began = 0.0
        """When the oldest micro-batch in flight started to be computed."""
        self._texts: dict[str, Detokeniser] = {}
        self._unstreamed: dict[str, list[Token]] = {}
        """Tokens of each request since its last piece."""
        self._ended: list[Answer] = []
        self.is_stalled = False
        """Requests are left, but the last `step` had nothing to compute and no answer: no further progress is possible."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter under a name; active requests go on.

        Raises:
            AdapterError: the name is in use, or the folder holds no adapter that fits.
        """
        if name in self.adapters:
            raise AdapterError(f"an adapter {name!r} is loaded already, from {self.adapters[name]}: unload it first.")
        self.executor.load_adapter(name, folder)
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter.

        Raises:
            AdapterError: none of that name is loaded, or requests still use it.
        """
        self._require(name)
        if self.scheduler.uses_adapter(name):
            raise AdapterError(
                f"requests still use adapter {name!r}: let them end, or cancel them, before it is unloaded."
            )
        self.scheduler.forget_adapter(name)
        self.executor.unload_adapter(name)
        del self.adapters[name]

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            AdapterError: its adapter is not loaded.
            ConfigError: it can never be answered.
            QueueFullError: too many are waiting.
        """
        if request.adapter is not None:
            self._require(request.adapter)
        self.scheduler.submit(request)
        if not request.choices:
            self._texts[request.id] = Detokeniser(self.tokenizer, request.sampling.stop)
            self._unstreamed[request.id] = []

    def cancel(self, request_id: str) -> None:
        """End a request; a later `step` returns its answer."""
        self._end(request_id, "cancelled")

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        scheduler = self.scheduler
        return not (scheduler.num_waiting or scheduler.num_active or scheduler.num_in_flight or self._ended)

    @property
    def spare_s(self) -> float:
        """Seconds between `start` and `step` for which waiting for more requests costs nothing: the only stage is busy longer.

        The next micro-batch then holds all that arrived, and is ready when the stage is. Filled earlier it would hold fewer, and
        filled after `step` the stage would idle meanwhile.
        """
        scheduler = self.scheduler
        if scheduler.limits.max_in_flight > 1 or scheduler.num_in_flight != 1 or scheduler.is_decoding:
            return 0.0
        busy_s = _BUSY_SHARE * self._forecast.estimate(self._sizes[0])
        return min(_MOST_SPARE_S, max(0.0, self._began + busy_s - time.monotonic()))

    def start(self) -> None:
        """Start all micro-batches that can be in flight; `step` calls it too."""
        while (batch := self.scheduler.next_batch()) is not None:
            self.meter.start(batch.num_rows)
            if not self._sizes:
                self._began = time.monotonic()
            self._sizes.append(batch.num_rows)
            self.executor.start(batch)

    def step(self, on_piece: OnPiece | None = None) -> list[Answer]:
        """Start micro-batches, wait for the oldest in flight, and return the answers that are complete.

        Args:
            on_piece: called with new text of generated answers; with the last piece before the answer is returned.
        """
        self._ended += self.scheduler.expire(time.monotonic())
        self.start()
        has_work = self.scheduler.num_in_flight > 0
        if has_work:
            output = self.executor.collect()
            self._began = time.monotonic()
            self._forecast.add(self._sizes.popleft(), sum(output.stage_seconds))
            self.meter.end(output.stage_seconds)
            tokens, answers = self.scheduler.complete(output)
            self._ended += answers
            for request_id, token in tokens:
                text = self._texts[request_id]
                self._unstreamed[request_id].append(token)
                self._stream(request_id, text.push(token.id), on_piece)
                if text.is_stopped:
                    self._end(request_id, "stop")
        ended, self._ended = self._ended, []
        self.is_stalled = not (has_work or ended or self.is_idle)
        return [self._close(answer, on_piece) for answer in ended]

    def _stream(self, request_id: str, text: str, on_piece: OnPiece | None) -> None:
        if text:
            tokens, self._unstreamed[request_id] = self._unstreamed[request_id], []
            if on_piece is not None:
                on_piece(request_id, Piece(text, tokens))

    def _close(self, answer: Answer, on_piece: OnPiece | None) -> Answer:
        """Stream the rest of an answer's text, and return the answer."""
        text = self._texts.pop(answer.request_id, None)
        if text is None:
            return answer
        self._stream(answer.request_id, text.finish(), on_piece)
        del self._unstreamed[answer.request_id]
        # The token that completes a stop string may also be the last one allowed.
        return dataclasses.replace(answer, finish="stop") if text.is_stopped else answer

    def _end(self, request_id: str, finish: Finish) -> None:
        answer = self.scheduler.end(request_id, finish)
        if answer is not None:
            self._ended.append(answer)

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            loaded = ", ".join(sorted(self.adapters)) or "none"
            raise AdapterError(f"adapter {name!r} is not loaded; loaded are: {loaded}.")
