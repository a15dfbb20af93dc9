"""Hidden states in shared GPU memory, between two stages on one GPU or on two of a machine; messages run ahead of them.

A stage queues its computation, a copy of the hidden states into memory that the next stage's process has mapped, and a write of
the message's ticket behind them. Then it sends the message. The next stage queues a wait for the ticket, and its own computation
behind it: the GPU goes from one to the other without the host, and a hop's time on the host is hidden.

A stage does not wait for its own computation, so its begin and end times are written on the GPU beside the states; the first
later stage that does wait reads the times of all.

With two GPUs the later one reads the earlier one's memory. Not all pairs can, and behind some PCIe bridges they only seem to: a
trial (`GpuLink.offer`) finds out.

Imported only with a CUDA build of torch: the CPU build has neither Triton nor cuda-bindings.

Shapes: T rows, H hidden, K stages.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from finlora.engine.messages import Message, Parcel
from finlora.engine.micro_batch import MicroBatch
from finlora.pipeline.gpu_memory import LEAST_BYTES, Gate, Mapped, Owned, allocate, map_memory, unmap, write_flag
from finlora.pipeline.links import StageInfo, Stamps
from finlora.stage.upload import download

_ALIGNMENT = 256  # bytes
_TRIAL_S = 10.0
_KNOWN = 251
"""Distinct values of a trial's states, all exact in 16 bits."""


@triton.jit
def _stamp(target_ptr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    tl.store(target_ptr, globaltimer())


class GpuStamps:
    """Begin and end times of stages, in nanoseconds of the GPU's clock.

    Args:
        numbers: (2 K,) int64 on the GPU.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def begin(self, stage: int) -> None:
        """Queue a write of the time before the work queued next."""
        _stamp[(1,)](self.numbers[2 * stage :])

    def end(self, stage: int) -> None:
        """Queue a write of the time after the work queued so far."""
        _stamp[(1,)](self.numbers[2 * stage + 1 :])

    def copy(self, first: int, last: int) -> Callable[[], tuple[float, ...]]:
        """Queue a copy to the host; the function returned waits for it and returns the seconds of stages `first` to `last`."""
        wait = download(self.numbers)

        def read() -> tuple[float, ...]:
            found = wait()
            return tuple((found[2 * stage + 1] - found[2 * stage]) * 1e-9 for stage in range(first, last + 1))

        return read


class _Buffer:
    """Layout of a send buffer: stamps, the flag for which the next stage waits, states."""

    def __init__(self, memory: Tensor, num_stages: int) -> None:
        numbers = memory[: 16 * num_stages + 8].view(torch.int64)
        self.stamps, self.flag = GpuStamps(numbers[:-1]), numbers[-1:]
        self._states = memory[_first_byte(num_stages) :]

    def find_states(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        return self._states[: num_rows * hidden_size * dtype.itemsize].view(dtype).view(num_rows, hidden_size)


class GpuLink:
    """Hidden states in this stage's memory, which the next one has mapped, and in that of the stage before."""

    runs_ahead = True

    def __init__(self, stage: StageInfo) -> None:
        self._stage = stage
        self._memories: dict[int, Owned] = {}
        """Of each send buffer."""
        self._outgrown: list[Owned] = []
        """Kept: the next stage may have them mapped."""
        self._mapped: dict[bytes, Mapped] = {}
        self._gate: Gate | None = None
        """Of the stages that receive."""

    @property
    def held_gib(self) -> float:
        """GPU memory of send buffers; the next stage may have them mapped, so they stay when the link is closed."""
        return sum(memory.data.numel() for memory in [*self._memories.values(), *self._outgrown]) / 2**30

    def offer(self, ticket: int) -> Message:
        """Return a message with known hidden states, by which the next stage finds out whether they arrive.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        trial = Message(MicroBatch(0, [0]), ticket=ticket)
        self.reserve(trial, None).begin(self._stage.number)
        return dataclasses.replace(trial, state=self.send(trial, self._make_known()))

    def join(self, offer: Message, rank: int, size: int) -> None:
        """At the later stage, find out whether hidden states arrive.

        Raises:
            RuntimeError: they do not.
        """
        if rank == 0:
            return
        self._gate = self._gate or Gate(self._stage.device)
        hidden, _ = self.receive(offer)
        known = self._make_known()
        # Run once before the wait: loading a kernel may wait for all queued work, and would then block past the timeout.
        _ = (known == known.clone()).all()
        self.wait(offer)
        is_right = (known == hidden).all()
        done, until = torch.cuda.Event(), time.monotonic() + _TRIAL_S
        done.record()
        while not done.query():
            if time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"no hidden states arrived within {_TRIAL_S:.0f} s")
            time.sleep(1e-3)
        if not is_right:
            raise RuntimeError("the hidden states that arrived differ from those that were sent")

    def receive(self, message: Message) -> tuple[Tensor, GpuStamps]:
        """Return states (T, H) and stamps, valid behind `wait` until the sender uses their buffer again.

        Raises:
            RuntimeError: CUDA does not let these processes share memory.
        """
        parcel: Parcel = message.state
        if parcel.memory not in self._mapped:
            self._mapped[parcel.memory] = map_memory(parcel.memory, parcel.num_bytes, self._stage.device)
        buffer = self._find_buffer(parcel)
        return buffer.find_states(parcel.num_rows, self._stage.hidden_size, self._stage.dtype), buffer.stamps

    def wait(self, message: Message) -> None:
        """Queue a wait on the GPU until the hidden states of a received message are complete.

        Raises:
            RuntimeError: the stages were stopped.
        """
        assert self._gate is not None, "join comes first"
        self._gate.wait(self._find_buffer(message.state).flag, message.ticket)

    def reserve(self, message: Message, stamps: Stamps | None) -> GpuStamps:
        """Reserve the message's send buffer; returns its stamps, with those of the stages before.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        assert isinstance(message.work, MicroBatch)
        info, index = self._stage, message.buffer
        num_bytes = _first_byte(info.num_stages) + message.work.num_rows * info.hidden_size * info.dtype.itemsize
        memory = self._memories.get(index)
        if memory is None or memory.data.numel() < num_bytes:
            if memory is not None:
                self._outgrown.append(memory)
            num_bytes = max(LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
            memory = self._memories[index] = allocate(num_bytes, info.device)
        own = _Buffer(memory.data, info.num_stages).stamps
        if stamps is not None:
            own.numbers.copy_(stamps.numbers)
        return own

    def send(self, message: Message, hidden: Tensor) -> Parcel:
        """Queue the copy of states (T, H) into the message's send buffer and the ticket behind it."""
        memory = self._memories[message.buffer]
        buffer = _Buffer(memory.data, self._stage.num_stages)
        buffer.find_states(len(hidden), self._stage.hidden_size, self._stage.dtype).copy_(hidden)
        buffer.stamps.end(self._stage.number)
        write_flag(buffer.flag, message.ticket)
        return Parcel(memory.handle, memory.data.numel(), len(hidden))

    def stop(self) -> None:
        """End all waits, from any thread."""
        if self._gate is not None:
            self._gate.stop()

    def close(self) -> None:
        """Unmap the memory of the stage before, which may be dead."""
        if self._gate is not None:
            self._gate.reopen()
        for memory in self._mapped.values():
            unmap(memory)
        self._mapped.clear()

    def _find_buffer(self, parcel: Parcel) -> _Buffer:
        return _Buffer(self._mapped[parcel.memory].data, self._stage.num_stages)

    def _make_known(self) -> Tensor:
        """Return the states (1, H) of a trial."""
        info = self._stage
        return (torch.arange(info.hidden_size, device=info.device) % _KNOWN).to(info.dtype)[None]


def _first_byte(num_stages: int) -> int:
    """Return the offset of states, behind the stamps and the flag."""
    return -(-(16 * num_stages + 8) // _ALIGNMENT) * _ALIGNMENT
