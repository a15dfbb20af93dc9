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


def to_message(hidden: Tensor) -> NDArray[np.int8]:
    """Return hidden states as a message carries them best: Ray passes an array's bytes on, a tensor it has torch.save pickle.

    Shapes: (T, H) of any type -> (T, bytes of a row).
    """
    array: NDArray[np.int8] = hidden.cpu().contiguous().view(torch.int8).numpy()
    return array


def from_message(array: NDArray[np.int8], dtype: torch.dtype) -> Tensor:
    """Return the hidden states (T, H) of a message, whose memory serves for the next one."""
    return torch.from_numpy(array.copy()).view(dtype)


def find_free_address(host: str) -> str:
    """Return HOST:PORT of a port that is free now on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return f"{host}:{probe.getsockname()[1]}"
