"""Traffic of a worker for the optimiser: bytes, rounds and seconds, counted without a GPU sync.

Counted are DeepSpeed's all-reduce of the gradients and the exchanges of 0/1 Adam, not the few numbers that workers share
for a progress record.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

GRADIENT_BYTES = 4
"""Bytes of a gradient element: DeepSpeed reduces the adapter's gradients in float32."""


def ring_bytes(num_elements: int, world_size: int) -> int:
    """Return the bytes each rank sends in one float32 ring all-reduce: 2 (n - 1) / n * 4 N."""
    return 2 * (world_size - 1) * GRADIENT_BYTES * num_elements // world_size


@dataclass(frozen=True, kw_only=True, slots=True)
class Wire:
    """Traffic of one worker since the run's first step, over all resumes. Steps repeated after a crash count once."""

    rounds: int = 0
    """Rounds of communication; 0 with one worker."""
    bytes_sent: int = 0
    bytes_adam: int = 0
    """Bytes that a float32 ring all-reduce of the gradients at each step would send: 2 (n - 1) / n * 4 N."""
    seconds: float = 0.0
    """Seconds in those rounds, the wait for slower workers included. The smallest over workers is the network's own time."""


@runtime_checkable
class SelfCounting(Protocol):
    """Optimiser that does its own communication and counts it, as ZeroOneAdam."""

    @property
    def num_syncs(self) -> int: ...

    @property
    def bytes_sent(self) -> int: ...

    @property
    def bytes_adam(self) -> int: ...


class WireClock:
    """Clock of the communication calls on one device.

    On a GPU, where calls only queue work, a pair of CUDA events is recorded around each call. They are read with the sum, when
    a progress record waits for the device anyway. On a CPU the calls block, and a wall clock suffices.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time of the calls inside."""
        if self._is_cuda:
            make: Any = torch.cuda.Event  # untyped in torch
            start, end = make(enable_timing=True), make(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pairs.append((start, end))
        else:
            started = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - started

    def read_seconds(self) -> float:
        """Return the sum so far; waits for calls in flight on the GPU."""
        for start, end in self._pairs:
            end.synchronize()
            self._seconds += start.elapsed_time(end) / 1000
        self._pairs.clear()
        return self._seconds


class WireMeter:
    """Counter of one worker's traffic.

    Args:
        clock: shared with 0/1 Adam, which runs it around its own calls.
        num_elements: N, trainable parameters.
        world_size: n, workers.
    """

    def __init__(self, clock: WireClock, num_elements: int, world_size: int) -> None:
        self.clock = clock
        self._world_size = world_size
        self._bytes_a_round = ring_bytes(num_elements, world_size)
        self._rounds = 0
        self._seconds_before = 0.0

    def watch(self, engine: Any) -> None:
        """Count and time the gradient all-reduce of a DeepSpeedEngine at ZeRO stage 0, one a step.

        `allreduce_gradients` also runs after each backward pass without sending; the call watched here is the one that sends.
        """
        if self._world_size == 1:
            return
        reduce = engine.buffered_allreduce_fallback

        def reduce_watched(*args: Any, **kwargs: Any) -> None:
            with self.clock.running():
                reduce(*args, **kwargs)
            self._rounds += 1

        engine.buffered_allreduce_fallback = reduce_watched

    def resume(self, wire: Wire) -> None:
        """Continue from the counts of a checkpoint."""
        self._rounds = wire.rounds
        self._seconds_before = wire.seconds

    def read(self, optimizer: torch.optim.Optimizer) -> Wire:
        """Return the traffic so far; on a GPU it waits for calls in flight."""
        seconds = self._seconds_before + self.clock.read_seconds()
        if isinstance(optimizer, SelfCounting):
            return Wire(
                rounds=optimizer.num_syncs,
                bytes_sent=optimizer.bytes_sent,
                bytes_adam=optimizer.bytes_adam,
                seconds=seconds,
            )
        num_bytes = self._rounds * self._bytes_a_round
        return Wire(rounds=self._rounds, bytes_sent=num_bytes, bytes_adam=num_bytes, seconds=seconds)
