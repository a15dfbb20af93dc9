"""What the last stage has drawn, on its way to the host: nobody waits for it before the next micro-batch is queued.

Shapes: N draws, M scores.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from finlora.engine.microbatch import Output
from finlora.engine.upload import download


class Unread:
    """Tokens and log-probabilities of a micro-batch, of which the device may not be done.

    Args:
        number: of the micro-batch.
        tokens: (N,) int64, what its draws brought.
        log_probs: (N,) of these tokens.
        scored: (M,) of the tokens whose log-probability was asked for.
    """

    def __init__(self, number: int, tokens: Tensor, log_probs: Tensor, scored: Tensor) -> None:
        self.number, self.tokens = number, tokens
        self._read = download(torch.cat([tokens.double(), log_probs.double(), scored.double()]))  # one copy for all

    def read(self) -> Output:
        """Wait for the device, and return what the micro-batch asked for."""
        numbers, count = self._read(), len(self.tokens)
        tokens = zip(map(int, numbers[:count]), numbers[count : 2 * count], strict=True)
        return Output(self.number, list(tokens), numbers[2 * count :])


class Stopwatch:
    """Takes the time that a device computes what is queued between two moments; runs from the first on."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._moments = [self._now()]

    def stop(self) -> None:
        """Count what is queued from now on no more."""
        self._moments.append(self._now())

    def read(self) -> float:
        """Return the seconds, once the device is done."""
        began, ended = self._moments
        if isinstance(began, float) or isinstance(ended, float):
            return ended - began  # type: ignore[operator]
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e-3

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
