"""Drives requests through the stages: the scheduler decides, an executor computes, texts are put together.

One thread calls it. Whatever holds the stages, in this process or in others, is an `Executor`.
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
"""Share of a micro-batch's time for which more requests are waited for, and the most seconds."""


class Executor(Protocol):
    """Computes micro-batches in the order in which they are started."""

    can_follow: bool
    """Whether a micro-batch that follows another can be started before that one is back."""

    def start(self, batch: MicroBatch) -> None:
        """Send a micro-batch into the first stage.

        Raises:
            StageLostError: a stage in another process is lost, and with it all that is under way.
        """
        ...

    def collect(self) -> Output:
        """Wait for the oldest micro-batch under way; errors as `start`."""
        ...

    def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter on every stage, or on none.

        Raises:
            AdapterError: the folder does not hold one that fits.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter from every stage."""
        ...

    def peak_memory_gib(self) -> float | None:
        """Return the most memory that all stages together took since they were loaded, in GiB; None where unknown."""
        ...


OnPiece = Callable[[str, Piece], None]
"""Called with a request's id and what it has gained."""


class EngineCore:
    """Requests in, answers and their texts out.

    Args:
        tokenizer: of the base.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler, tokenizer: PreTrainedTokenizerFast) -> None:
        self.executor, self.scheduler, self.tokenizer = executor, scheduler, tokenizer
        self.adapters: dict[str, Path] = {}
        self.meter = BubbleMeter()
        self._forecast, self._sizes = Forecast(), deque[int]()
        self._began = 0.0
        """When the oldest micro-batch under way came to be computed."""
        self._texts: dict[str, Detokeniser] = {}
        self._untold: dict[str, list[Token]] = {}
        """Tokens of each request since its last piece."""
        self._ended: list[Answer] = []
        self.is_stalled = False
        """The last `step` found nothing to compute and nothing to tell, though requests are left: another would find the same."""

    def load_adapter(self, name: str, folder: Path) -> None:
        """Make an adapter available under a name; requests at work go on.

        Raises:
            AdapterError: the name is taken, or the folder does not hold an adapter that fits.
        """
        if name in self.adapters:
            raise AdapterError(f"an adapter {name!r} is loaded already, from {self.adapters[name]}: unload it first.")
        self.executor.load_adapter(name, folder)
        self.adapters[name] = folder

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter.

        Raises:
            AdapterError: there is none of that name, or requests still use it.
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
        """Take a request on.

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
            self._untold[request.id] = []

    def cancel(self, request_id: str) -> None:
        """End a request; its answer comes with a later `step`."""
        self._end(request_id, "cancelled")

    @property
    def is_idle(self) -> bool:
        """Whether no request is left."""
        scheduler = self.scheduler
        return not (scheduler.num_waiting or scheduler.num_active or scheduler.num_in_flight or self._ended)

    @property
    def spare_s(self) -> float:
        """Seconds between `start` and `step` in which more requests may come at no cost: the one stage computes for longer.

        The next micro-batch then waits ahead with all that came. After `step` it would have them too, but the stage would stand
        still meanwhile; before, only the first of them.
        """
        scheduler = self.scheduler
        if scheduler.limits.max_in_flight > 1 or scheduler.num_in_flight != 1 or scheduler.is_decoding:
            return 0.0
        busy_s = _BUSY_SHARE * self._forecast.tell(self._sizes[0])
        return min(_MOST_SPARE_S, max(0.0, self._began + busy_s - time.monotonic()))

    def start(self) -> None:
        """Start what can be started; `step` does so too, and waits for it."""
        while (batch := self.scheduler.next_batch()) is not None:
            self.meter.start(batch.num_rows)
            if not self._sizes:
                self._began = time.monotonic()
            self._sizes.append(batch.num_rows)
            self.executor.start(batch)

    def step(self, on_piece: OnPiece | None = None) -> list[Answer]:
        """Start what can be started, wait for the oldest micro-batch, and return the answers that are complete.

        Args:
            on_piece: gets new text of generated answers, the last piece before the answer is returned.
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
                self._untold[request_id].append(token)
                self._tell(request_id, text.push(token.id), on_piece)
                if text.is_stopped:
                    self._end(request_id, "stop")
        ended, self._ended = self._ended, []
        self.is_stalled = not (has_work or ended or self.is_idle)
        return [self._close(answer, on_piece) for answer in ended]

    def _tell(self, request_id: str, text: str, on_piece: OnPiece | None) -> None:
        if text:
            tokens, self._untold[request_id] = self._untold[request_id], []
            if on_piece is not None:
                on_piece(request_id, Piece(text, tokens))

    def _close(self, answer: Answer, on_piece: OnPiece | None) -> Answer:
        """Hand out the rest of an answer's text."""
        text = self._texts.pop(answer.request_id, None)
        if text is None:
            return answer
        self._tell(answer.request_id, text.finish(), on_piece)
        del self._untold[answer.request_id]
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
