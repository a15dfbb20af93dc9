"""Hidden states within the messages that Ray carries: through shared memory on one machine, over the network between two.

Works between any two stages, and is the default where they cannot share GPU memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from finlora.engine.messages import Message
from finlora.pipeline.links import StageInfo, Stamps


class MessageLink:
    """Hidden states as arrays of bytes: Ray passes an array's bytes on, and would pickle a tensor by torch.save.

    Copies from and to a GPU use page-locked host memory, which is several times as fast. What `send` and `receive` return is
    valid until their next call.
    """

    runs_ahead = False
    held_gib = 0.0

    def __init__(self, stage: StageInfo) -> None:
        self._dtype, self._device = stage.dtype, stage.device
        self._sent, self._received = (torch.empty(0, dtype=torch.int8) for _ in range(2))
        self._is_uploaded: torch.cuda.Event | None = None

    def offer(self, ticket: int) -> None:
        """Return nothing: the messages need no connection of their own."""

    def join(self, offer: Any, rank: int, size: int) -> None:
        pass

    def receive(self, message: Message) -> tuple[Tensor, None]:
        """Return the states of a message on the device. Shapes: (T, bytes of a row) -> (T, H).

        They are copied out of the message's memory, which Ray uses for the next one.
        """
        array: NDArray[np.int8] = message.state
        if self._device.type != "cuda":
            return torch.from_numpy(array.copy()).view(self._dtype), None
        if self._is_uploaded is not None:
            self._is_uploaded.synchronize()  # a stage that runs ahead has not waited for the copy before
        self._received = _make_room(self._received, array.size)
        host = self._received[: array.size].view(array.shape)
        np.copyto(host.numpy(), array)
        hidden = host.to(self._device, non_blocking=True).view(self._dtype)
        self._is_uploaded = self._is_uploaded or torch.cuda.Event()
        self._is_uploaded.record(torch.cuda.current_stream(self._device))
        return hidden, None

    def wait(self, message: Message) -> None:
        pass

    def reserve(self, message: Message, stamps: Stamps | None) -> Stamps | None:
        return stamps

    def send(self, message: Message, hidden: Tensor) -> NDArray[np.int8]:
        """Return states as bytes on the host, once they are computed. Shapes: (T, H) -> (T, bytes of a row)."""
        raw = hidden.contiguous().view(torch.int8)
        if self._device.type == "cuda":
            self._sent = _make_room(self._sent, raw.numel())
            raw = self._sent[: raw.numel()].view(raw.shape).copy_(raw, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        array: NDArray[np.int8] = raw.numpy()
        return array

    def stop(self) -> None:
        pass

    def close(self) -> None:
        pass


def _make_room(buffer: Tensor, num_bytes: int) -> Tensor:
    return buffer if buffer.numel() >= num_bytes else torch.empty(num_bytes, dtype=torch.int8, pin_memory=True)
