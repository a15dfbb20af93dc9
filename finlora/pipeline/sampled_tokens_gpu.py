"""Drawn tokens on their way from the last stage back to the first, on one GPU or two of a machine, past the host.

The last stage writes a micro-batch's tokens where the first has that memory mapped, and its ticket behind them; what the first
computes with them is queued before they are there. Elsewhere they go by finlora/pipeline/sampled_tokens.py.

Imported only where a CUDA tensor is at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finlora.errors import ResourceError
from finlora.pipeline.gpu_memory import LEAST_BYTES, Gate, Mapped, Owned, allocate, map_memory, unmap, write_flag

_SLOTS = 32
"""Micro-batches whose tokens are kept: more than can be under way."""
_WIDTH = LEAST_BYTES // 8 // _SLOTS - 1
"""Tokens of one."""
_MARK = 0x66696E6C6F7261
"""Stands at the end of the memory: behind some bridges a GPU reads something else than another one wrote."""


class LastBoard:
    """The last stage's end."""

    def __init__(self, device: torch.device) -> None:
        self._memory: Owned = allocate(LEAST_BYTES, device)
        self._memory.data.view(torch.int64)[-1:].fill_(_MARK)
        torch.cuda.current_stream(device).synchronize()
        self.handle = self._memory.handle
        self.held_gib = LEAST_BYTES / 2**30

    def write(self, ticket: int, tokens: Tensor) -> None:
        """Queue that a micro-batch's tokens (N,) int64 go back.

        Raises:
            ResourceError: they are too many.
        """
        if len(tokens) > _WIDTH:
            raise ResourceError(
                f"{len(tokens):,} requests have a next token in one micro-batch, {_WIDTH:,} is the most: lower max_batch_tokens"
            )
        _find_slot(self._memory.data, ticket)[: len(tokens)].copy_(tokens)
        write_flag(_find_flag(self._memory.data), ticket)


class FirstBoard:
    """The first stage's end.

    Raises:
        RuntimeError: CUDA does not let these processes share memory, or wait for each other on the GPU.
    """

    def __init__(self, handle: bytes, device: torch.device) -> None:
        self._gate = Gate(device)
        self._memory: Mapped = map_memory(handle, LEAST_BYTES, device)
        if int(self._memory.data.view(torch.int64)[-1]) != _MARK:
            raise RuntimeError("what was read was not what had been written")
        self._gate.wait(_find_flag(self._memory.data), 0)  # whether CUDA has such waits

    def wait(self, ticket: int) -> Tensor:
        """Have what is queued from now on wait for a micro-batch's tokens, and return them with whatever lies behind them.

        Raises:
            RuntimeError: `stop` was called.
        """
        self._gate.wait(_find_flag(self._memory.data), ticket)
        return _find_slot(self._memory.data, ticket)

    def stop(self) -> None:
        """Let nothing that is queued wait any longer; any thread may call it."""
        self._gate.stop()

    def close(self) -> None:
        """Let go of the memory."""
        unmap(self._memory)


def _find_slot(memory: Tensor, ticket: int) -> Tensor:
    """Shapes: (bytes,) uint8 -> (_WIDTH,) int64."""
    numbers = memory.view(torch.int64)
    first = 1 + ticket % _SLOTS * _WIDTH
    return numbers[first : first + _WIDTH]


def _find_flag(memory: Tensor) -> Tensor:
    """Return where the ticket is written whose tokens came last. Shapes: (bytes,) uint8 -> (1,) int64."""
    return memory.view(torch.int64)[:1]
