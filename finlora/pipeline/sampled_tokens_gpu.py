"""Return of sampled tokens to the first stage over CUDA IPC, on one GPU or two of a machine, without the host.

The last stage writes a micro-batch's tokens into memory that the first has mapped, and then its ticket. The first stage queues a
wait for the ticket, and its computation behind it, before the tokens are sampled.

Imported only with a CUDA build of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finlora.engine.micro_batch import Output
from finlora.errors import ResourceError
from finlora.pipeline.gpu_memory import LEAST_BYTES, Gate, Mapped, Owned, allocate, map_memory, unmap, write_flag
from finlora.pipeline.links import StageInfo

_SLOTS = 32
"""Micro-batches whose tokens are kept: more than can be in flight."""
_WIDTH = LEAST_BYTES // 8 // _SLOTS - 1
"""Most tokens of a micro-batch."""
_MARK = 0x66696E6C6F7261
"""Written at the end of the memory: behind some PCIe bridges a GPU does not read what another one wrote."""


class GpuTokenLink:
    """The last stage's memory, which the first has mapped."""

    runs_ahead = True

    def __init__(self, stage: StageInfo) -> None:
        self._stage = stage
        self._owned: Owned | None = None
        """At the last stage. Kept: the first may have it mapped."""
        self._mapped: Mapped | None = None
        """At the first stage."""
        self._gate: Gate | None = None

    @property
    def held_gib(self) -> float:
        """Of the last stage; the first may have the memory mapped, so it stays when the link is closed."""
        return 0.0 if self._owned is None else LEAST_BYTES / 2**30

    def offer(self) -> bytes | None:
        """Return the handle of the last stage's memory; the first stage has nothing to offer.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        if self._stage.is_first:
            return None
        if self._owned is None:
            self._owned = allocate(LEAST_BYTES, self._stage.device)
            self._owned.data.view(torch.int64)[-1:].fill_(_MARK)
            torch.cuda.current_stream(self._stage.device).synchronize()
        return self._owned.handle

    def join(self, offer: bytes | None) -> None:
        """Map the last stage's memory at the first.

        Raises:
            RuntimeError: CUDA does not let these processes share memory, or wait for each other on the GPU.
        """
        if offer is None:
            return
        self._gate = self._gate or Gate(self._stage.device)
        self._mapped = map_memory(offer, LEAST_BYTES, self._stage.device)
        if int(self._mapped.data.view(torch.int64)[-1]) != _MARK:
            raise RuntimeError("the memory does not hold what the last stage wrote")
        self._gate.wait(_find_flag(self._mapped.data), 0)  # raises if CUDA lacks such waits

    def drain(self) -> None:
        """Do nothing: the last stage overwrites the oldest tokens."""

    def receive(self, ticket: int) -> Tensor:
        """Queue a wait on the GPU for a micro-batch's tokens, and return their slot; what follows them in it is undefined.

        Raises:
            RuntimeError: `stop` was called.
        """
        assert self._gate is not None, "join comes first"
        assert self._mapped is not None
        self._gate.wait(_find_flag(self._mapped.data), ticket)
        return _find_slot(self._mapped.data, ticket)

    def send_sampled(self, ticket: int, tokens: Tensor) -> None:
        """Queue that a micro-batch's tokens (N,) int64 are written for the first stage.

        Raises:
            ResourceError: they are too many.
        """
        assert self._owned is not None, "offer comes first"
        if len(tokens) > _WIDTH:
            raise ResourceError(
                f"{len(tokens):,} requests have a next token in one micro-batch, {_WIDTH:,} is the most: lower max_batch_tokens"
            )
        _find_slot(self._owned.data, ticket)[: len(tokens)].copy_(tokens)
        write_flag(_find_flag(self._owned.data), ticket)

    def send_read(self, ticket: int, output: Output | None) -> None:
        """Do nothing: the first stage has the tokens by then."""

    def stop(self) -> None:
        """End all waits, from any thread."""
        if self._gate is not None:
            self._gate.stop()

    def close(self) -> None:
        """Unmap the memory of the last stage, which may be dead."""
        if self._gate is not None:
            self._gate.reopen()
        if self._mapped is not None:
            unmap(self._mapped)
            self._mapped = None


def _find_slot(memory: Tensor, ticket: int) -> Tensor:
    """Shapes: (bytes,) uint8 -> (_WIDTH,) int64."""
    numbers = memory.view(torch.int64)
    first = 1 + ticket % _SLOTS * _WIDTH
    return numbers[first : first + _WIDTH]


def _find_flag(memory: Tensor) -> Tensor:
    """Return the flag that holds the newest ticket. Shapes: (bytes,) uint8 -> (1,) int64."""
    return memory.view(torch.int64)[:1]
