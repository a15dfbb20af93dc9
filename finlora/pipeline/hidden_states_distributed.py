"""Hidden states by torch.distributed, point to point, beside the messages that Ray carries.

`nccl` writes from GPU to GPU, each stage on a GPU of its own; `gloo` goes through host memory and sockets. All stages join one
process group.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from finlora.engine.messages import Message
from finlora.engine.micro_batch import MicroBatch
from finlora.pipeline.links import StageInfo, Stamps

_TIMEOUT = timedelta(minutes=10)


class DistributedLink:
    """A stage's connection to the one before and the one after.

    Args:
        backend: of torch.distributed.
    """

    runs_ahead = False
    held_gib = 0.0

    def __init__(self, stage: StageInfo, backend: Literal["nccl", "gloo"]) -> None:
        self._stage, self._backend = stage, backend
        self._device = stage.device if backend == "nccl" else torch.device("cpu")
        self._sent: tuple[dist.Work | None, Tensor] | None = None
        self._rank, self._is_joined = 0, False

    def offer(self, ticket: int) -> str:
        """Return HOST:PORT of a port that is free now on this machine, for the process group to meet at."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{self._stage.host}:{probe.getsockname()[1]}"

    def join(self, offer: str, rank: int, size: int) -> None:
        dist.init_process_group(
            self._backend,
            init_method=f"tcp://{offer}",
            rank=rank,
            world_size=size,
            timeout=_TIMEOUT,
            device_id=self._device if self._backend == "nccl" else None,
        )
        self._rank, self._is_joined = rank, True
        # Two NCCL ranks connect in their first exchange, and the sender's call returns only after the receiver's. Later that
        # would be a deadlock: a stage receives states once it has the message, which the sender sends after the states.
        if rank > 0:
            self._receive(1)
        if rank < size - 1:
            self._send(torch.zeros(1, self._stage.hidden_size, dtype=self._stage.dtype, device=self._device))

    def receive(self, message: Message) -> tuple[Tensor, None]:
        """Return the states (T, H) that the stage before sent next; nccl: on the GPU, gloo: on the host."""
        assert isinstance(message.work, MicroBatch)
        return self._receive(message.work.num_rows), None

    def wait(self, message: Message) -> None:
        pass

    def reserve(self, message: Message, stamps: Stamps | None) -> Stamps | None:
        return stamps

    def send(self, message: Message, hidden: Tensor) -> None:
        """Send states, once they are computed; returns before they have arrived, and nothing for the message to carry."""
        self._send(hidden)
        if self._stage.device.type == "cuda":
            torch.cuda.current_stream(self._stage.device).synchronize()  # the stage's seconds end with its computation

    def stop(self) -> None:
        pass

    def close(self) -> None:
        """Leave the other stages, of which some may be dead."""
        self._sent = None
        if not self._is_joined:
            return
        self._is_joined = False
        if self._backend == "nccl":
            dist.distributed_c10d._abort_process_group()  # to destroy it in order would wait for dead stages
        else:
            dist.destroy_process_group()

    def _receive(self, num_rows: int) -> Tensor:
        hidden = torch.empty(num_rows, self._stage.hidden_size, dtype=self._stage.dtype, device=self._device)
        dist.recv(hidden, src=self._rank - 1)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        if self._sent is not None and self._sent[0] is not None:
            self._sent[0].wait()
        hidden = hidden.to(self._device, copy=True)  # a replayed CUDA graph overwrites its output
        self._sent = dist.isend(hidden, dst=self._rank + 1), hidden
