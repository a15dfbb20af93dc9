"""Hidden states between two stages on one GPU: they stay there, and the message goes on before they are computed.

A stage copies its states into memory that the next one's process has mapped, and records an event behind them. The message goes
on once all this is queued. So the next stage has read it, and laid out its own work, while this one still computes: what a hop
takes on the host costs hardly any time. It waits for the event itself, not on the GPU: there it would wait for ever where the
stage before has died.

When a stage began and ended is written on the GPU, beside the states, since it does not wait for its own work; the first stage
that does reads it for all. The message's ticket is written with the end: CUDA counts the event of a process that is killed as
done, and without its states the ones after it would answer nonsense.

Imported only where a CUDA tensor is at hand: the CPU build of torch has neither Triton nor cuda-bindings.

Shapes: T rows, H hidden, K stages. Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#interprocess-communication
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from finlora.engine.messages import Parcel
from finlora.errors import ResourceError
from finlora.model.cuda_source import check, runtime

_ALIGNMENT = 256  # bytes
_LEAST_BYTES = 2 * 2**20
"""Of shared memory: CUDA puts smaller pieces into one block, and shares all of it."""
_EAGER_S, _PAUSE_S, _LOOK_EVERY_S = 0.05, 1e-4, 0.02
"""Seconds of asking without pauses, then pauses, and looks whether the stage before still lives."""


@triton.jit
def _stamp(target_ptr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    tl.store(target_ptr, globaltimer())


@triton.jit(do_not_specialize=["ticket"])
def _stamp_done(target_ptr, ticket_ptr, ticket):  # type: ignore[no-untyped-def]  # noqa: ANN001
    tl.store(target_ptr, globaltimer())
    tl.store(ticket_ptr, ticket.to(tl.int64))


class Stamps:
    """When stages began and ended, in nanoseconds of the GPU, and the ticket of the message that they were done with.

    Args:
        numbers: (3, K) int64 on the GPU.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def begin(self, stage: int) -> None:
        """Write the time at which what is queued next begins."""
        _stamp[(1,)](self.numbers[0, stage:])

    def end(self, stage: int, ticket: int) -> None:
        """Write the time at which what is queued so far ends."""
        _stamp_done[(1,)](self.numbers[1, stage:], self.numbers[2, stage:], ticket)

    def read(self, first: int, last: int, ticket: int) -> tuple[float, ...]:
        """Wait for what is queued, and return the seconds of stages `first` to `last`.

        Raises:
            RuntimeError: one of them died before it was done.
        """
        began, ended, tickets = self.numbers.tolist()
        for stage in range(first, last + 1):
            if tickets[stage] != ticket:
                raise RuntimeError(
                    f"stage {stage} died before its hidden states were complete: what came after it is void"
                )
        return tuple((ended[stage] - began[stage]) * 1e-9 for stage in range(first, last + 1))


@dataclass(slots=True)
class _Room:
    """Memory for the parcels of one place."""

    memory: Tensor
    handle: bytes
    event: torch.cuda.Event
    event_handle: bytes


class Sender:
    """The earlier of two stages.

    Args:
        stage: its number, from 0.
        num_stages: K.
        hidden_size: H.
        dtype: of the states.
        device: of both stages.
    """

    def __init__(self, stage: int, num_stages: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._stage, self._num_stages, self._hidden_size = stage, num_stages, hidden_size
        self._dtype, self._device = dtype, device
        self._rooms: dict[int, _Room] = {}
        self._outgrown: list[Tensor] = []
        """Kept: the next stage may have them mapped."""

    @property
    def held_gib(self) -> float:
        """GPU memory of parcels."""
        rooms = [room.memory for room in self._rooms.values()]
        return sum(memory.numel() for memory in [*rooms, *self._outgrown]) / 2**30

    def begin(self, place: int, num_rows: int, before: Stamps | None) -> None:
        """Make room for the states of a place; what is queued from now on computes them.

        Args:
            before: stamps of the stages before this one, where they came with its input.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        room = self._find_room(place, num_rows)
        stamps = _find_stamps(room.memory, self._num_stages)
        if before is not None:
            stamps.numbers.copy_(before.numbers)
        stamps.begin(self._stage)

    def send(self, place: int, ticket: int, hidden: Tensor) -> Parcel:
        """Queue the copy of a place's states (T, H), and return what the next stage finds them by."""
        room = self._rooms[place]
        _find_states(room.memory, self._num_stages, len(hidden), self._hidden_size, self._dtype).copy_(hidden)
        _find_stamps(room.memory, self._num_stages).end(self._stage, ticket)
        room.event.record()
        return Parcel(room.handle, room.event_handle, room.memory.numel(), len(hidden), os.getpid())

    def _find_room(self, place: int, num_rows: int) -> _Room:
        num_bytes = _first_byte(self._num_stages) + num_rows * self._hidden_size * self._dtype.itemsize
        room = self._rooms.get(place)
        if room is not None and room.memory.numel() >= num_bytes:
            return room
        num_bytes = max(_LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        pointer = _allocate(num_bytes)
        handle = bytes(check(runtime.cudaIpcGetMemHandle(pointer)).reserved)
        if room is not None:
            self._outgrown.append(room.memory)
        event = room.event if room else torch.cuda.Event(interprocess=True)
        event.record()  # it has a handle only then
        self._rooms[place] = _Room(_view(pointer, num_bytes, self._device), handle, event, event.ipc_handle())
        return self._rooms[place]


class Receiver:
    """The later one; arguments as for `Sender`."""

    def __init__(self, num_stages: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_stages, self._hidden_size, self._dtype, self._device = num_stages, hidden_size, dtype, device
        self._mapped: dict[bytes, tuple[Any, Tensor]] = {}
        self._events: dict[bytes, torch.cuda.Event] = {}

    def receive(self, parcel: Parcel) -> tuple[Tensor, Stamps]:
        """Return states (T, H) and stamps, which are there once `wait` returns, until their place is used anew.

        Raises:
            RuntimeError: CUDA does not let these processes share memory.
        """
        if parcel.memory not in self._mapped:
            handle = runtime.cudaIpcMemHandle_t()
            handle.reserved = parcel.memory
            pointer = check(runtime.cudaIpcOpenMemHandle(handle, runtime.cudaIpcMemLazyEnablePeerAccess))
            self._mapped[parcel.memory] = pointer, _view(pointer, parcel.num_bytes, self._device)
        if parcel.event not in self._events:
            self._events[parcel.event] = torch.cuda.Event.from_ipc_handle(self._device, parcel.event)
        _, memory = self._mapped[parcel.memory]
        hidden = _find_states(memory, self._num_stages, parcel.num_rows, self._hidden_size, self._dtype)
        return hidden, _find_stamps(memory, self._num_stages)

    def wait(self, parcel: Parcel) -> None:
        """Wait until a parcel that was received is complete.

        Raises:
            RuntimeError: the stage before has died.
        """
        event, began = self._events[parcel.event], time.monotonic()
        next_look = began + _LOOK_EVERY_S
        while not event.query():
            now = time.monotonic()
            if now > next_look:
                if not Path("/proc", str(parcel.pid)).exists():
                    raise RuntimeError(
                        f"the stage before (process {parcel.pid}) is not there, its hidden states will not come"
                    )
                next_look = now + _LOOK_EVERY_S
            if now > began + _EAGER_S:
                time.sleep(_PAUSE_S)

    def close(self) -> None:
        """Let go of what the stage before has shared; it may be dead."""
        self._events.clear()
        for pointer, _ in self._mapped.values():
            runtime.cudaIpcCloseMemHandle(pointer)
        self._mapped.clear()


class _Memory:
    """Bytes on a GPU as torch takes them."""

    def __init__(self, pointer: Any, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (int(pointer), False),
            "version": 3,
        }


def _view(pointer: Any, num_bytes: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Memory(pointer, num_bytes), device=device)


def _first_byte(num_stages: int) -> int:
    """Return where states begin, behind the stamps."""
    return -(-24 * num_stages // _ALIGNMENT) * _ALIGNMENT


def _find_stamps(memory: Tensor, num_stages: int) -> Stamps:
    return Stamps(memory[: 24 * num_stages].view(torch.int64).view(3, num_stages))


def _find_states(memory: Tensor, num_stages: int, num_rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    first = _first_byte(num_stages)
    return memory[first : first + num_rows * hidden_size * dtype.itemsize].view(dtype).view(num_rows, hidden_size)


def _allocate(num_bytes: int) -> Any:
    """Return memory past torch's allocator, whose blocks CUDA shares only as the segments that they are parts of."""
    result = runtime.cudaMalloc(num_bytes)
    if int(result[0]):
        torch.cuda.empty_cache()
        result = runtime.cudaMalloc(num_bytes)
    if int(result[0]):
        raise ResourceError(
            f"the GPU has no {num_bytes / 2**20:,.0f} MiB left for hidden states between stages ({result[0].name}): take a "
            "smaller KV cache, or fewer stages on it."
        )
    return result[1]
