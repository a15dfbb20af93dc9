"""Hidden states from a stage to the next by torch.distributed, point to point, beside the messages that Ray carries.

`nccl` writes straight from GPU to GPU, each stage on a GPU of its own; `gloo` goes through host memory and sockets. The default
needs neither: hidden states then travel within the messages, through shared memory on one machine.

Shapes: T rows, H hidden.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

_TIMEOUT = timedelta(minutes=10)


class Neighbours:
    """A stage's connection to the one before and the one after.

    Args:
        stage: its number, from 0.
        address: HOST:PORT that the first stage listens on.
        hidden_size: H.
    """

    def __init__(
        self,
        transport: Literal["nccl", "gloo"],
        stage: int,
        num_stages: int,
        address: str,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.transport, self.stage, self.hidden_size, self.dtype = transport, stage, hidden_size, dtype
        self.device = device if transport == "nccl" else torch.device("cpu")
        dist.init_process_group(
            transport,
            init_method=f"tcp://{address}",
            rank=stage,
            world_size=num_stages,
            timeout=_TIMEOUT,
            device_id=device if transport == "nccl" else None,
        )
        self._sent: tuple[dist.Work | None, Tensor] | None = None
        # Two NCCL ranks connect in their first exchange, and the sender's call does not return before the receiver has made its
        # own. Later on that would be for ever: a stage receives once the message has come that the sender sends after the states.
        if stage > 0:
            self.receive(1)
        if stage < num_stages - 1:
            self.send(torch.zeros(1, hidden_size, dtype=dtype, device=self.device))

    def receive(self, num_rows: int) -> Tensor:
        """Return the hidden states (T, H) that the stage before sent next."""
        hidden = torch.empty(num_rows, self.hidden_size, dtype=self.dtype, device=self.device)
        dist.recv(hidden, src=self.stage - 1)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Give hidden states to the stage after; returns before they have arrived."""
        if self._sent is not None and self._sent[0] is not None:
            self._sent[0].wait()
        hidden = hidden.to(self.device, copy=True)  # recorded passes write their result to the same place again
        self._sent = dist.isend(hidden, dst=self.stage + 1), hidden

    def close(self) -> None:
        """Leave the other stages, of which some may be dead; the process can connect anew after it."""
        self._sent = None
        if self.transport == "nccl":
            # In order, NCCL would wait for those that are dead.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()


class Letters:
    """Hidden states as messages carry them best: Ray passes an array's bytes on, a tensor it has torch.save pickle.

    From a GPU and to it they go through memory that the driver does not page, several times as fast. What `pack` and `unpack`
    return serves until the next call.

    Args:
        dtype: of the states.
        device: that the stage computes on.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._going, self._coming = (torch.empty(0, dtype=torch.int8) for _ in range(2))
        self._has_come: torch.cuda.Event | None = None

    def pack(self, hidden: Tensor) -> NDArray[np.int8]:
        """Shapes: (T, H) -> (T, bytes of a row)."""
        raw = hidden.contiguous().view(torch.int8)
        if self._device.type == "cuda":
            self._going = _make_room(self._going, raw.numel())
            raw = self._going[: raw.numel()].view(raw.shape).copy_(raw, non_blocking=True)
            torch.cuda.current_stream(self._device).synchronize()
        array: NDArray[np.int8] = raw.numpy()
        return array

    def unpack(self, array: NDArray[np.int8]) -> Tensor:
        """Shapes: (T, bytes of a row) -> (T, H). The message's own memory serves for the next one."""
        if self._device.type != "cuda":
            return torch.from_numpy(array.copy()).view(self._dtype)
        if self._has_come is not None:
            self._has_come.synchronize()  # a stage that hands its states over has not waited for the copy before
        self._coming = _make_room(self._coming, array.size)
        host = self._coming[: array.size].view(array.shape)
        np.copyto(host.numpy(), array)
        hidden = host.to(self._device, non_blocking=True).view(self._dtype)
        self._has_come = self._has_come or torch.cuda.Event()
        self._has_come.record(torch.cuda.current_stream(self._device))
        return hidden


def _make_room(buffer: Tensor, num_bytes: int) -> Tensor:
    return buffer if buffer.numel() >= num_bytes else torch.empty(num_bytes, dtype=torch.int8, pin_memory=True)


def find_free_address(host: str) -> str:
    """Return HOST:PORT of a port that is free now on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"
