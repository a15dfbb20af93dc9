"""Hidden states between two stages on one GPU, or on two of a machine: the message goes on before they are computed.

A stage copies its states into memory that the next one's process has mapped, and queues that the message's ticket is written
behind them. The message goes on once all this is queued. The next stage queues a wait for the ticket, and its own work behind it:
the GPU goes on from one to the other by itself, and what a hop takes on the host costs no time.

When a stage began and ended is written on the GPU, beside the states, since it does not wait for its own work; the first stage
that does reads it for all.

Of two GPUs the later one reads the earlier one's memory. Not all can, and behind some bridges they seem to: a trial parcel
(`Sender.send_trial`) shows whether states arrive.

Imported only where a CUDA tensor is at hand: the CPU build of torch has neither Triton nor cuda-bindings.

Shapes: T rows, H hidden, K stages.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

from finlora.engine.messages import Parcel
from finlora.pipeline.gpu_memory import LEAST_BYTES, Gate, Mapped, Owned, allocate, map_memory, unmap, write_flag
from finlora.stage.upload import download

_ALIGNMENT = 256  # bytes
_TRIAL_S = 10.0
_KNOWN = 251
"""Different numbers of a trial's states: each has one of its own in 16 bit."""


@triton.jit
def _stamp(target_ptr):  # type: ignore[no-untyped-def]  # noqa: ANN001
    tl.store(target_ptr, globaltimer())


class Stamps:
    """When stages began and ended, in nanoseconds of the GPU.

    Args:
        numbers: (2 K,) int64 on the GPU.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def begin(self, stage: int) -> None:
        """Write the time at which what is queued next begins."""
        _stamp[(1,)](self.numbers[2 * stage :])

    def end(self, stage: int) -> None:
        """Write the time at which what is queued so far ends."""
        _stamp[(1,)](self.numbers[2 * stage + 1 :])

    def copy(self, first: int, last: int) -> Callable[[], tuple[float, ...]]:
        """Queue their way to the host; what is returned waits for it and tells the seconds of stages `first` to `last`."""
        wait = download(self.numbers)

        def read() -> tuple[float, ...]:
            found = wait()
            return tuple((found[2 * stage + 1] - found[2 * stage]) * 1e-9 for stage in range(first, last + 1))

        return read


class _Room:
    """Memory of a place's parcels: stamps, the flag at which the next stage waits, states."""

    def __init__(self, memory: Tensor, num_stages: int) -> None:
        numbers = memory[: 16 * num_stages + 8].view(torch.int64)
        self.stamps, self.flag = Stamps(numbers[:-1]), numbers[-1:]
        self._states = memory[_first_byte(num_stages) :]

    def find_states(self, num_rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
        return self._states[: num_rows * hidden_size * dtype.itemsize].view(dtype).view(num_rows, hidden_size)


class Sender:
    """The earlier of two stages.

    Args:
        stage: its number, from 0.
        num_stages: K.
        hidden_size: H.
        dtype: of the states.
        device: of the stage.
    """

    def __init__(self, stage: int, num_stages: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._stage, self._num_stages, self._hidden_size = stage, num_stages, hidden_size
        self._dtype, self._device = dtype, device
        self._memories: dict[int, Owned] = {}
        """Of each place."""
        self._outgrown: list[Owned] = []
        """Kept: the next stage may have them mapped."""

    @property
    def held_gib(self) -> float:
        """GPU memory of parcels."""
        return sum(memory.data.numel() for memory in [*self._memories.values(), *self._outgrown]) / 2**30

    def begin(self, place: int, num_rows: int, before: Stamps | None) -> None:
        """Make room for the states of a place; what is queued from now on computes them.

        Args:
            before: stamps of the stages before this one, where they came with its input.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        num_bytes = _first_byte(self._num_stages) + num_rows * self._hidden_size * self._dtype.itemsize
        memory = self._memories.get(place)
        if memory is None or memory.data.numel() < num_bytes:
            if memory is not None:
                self._outgrown.append(memory)
            num_bytes = max(LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
            memory = self._memories[place] = allocate(num_bytes, self._device)
        stamps = _Room(memory.data, self._num_stages).stamps
        if before is not None:
            stamps.numbers.copy_(before.numbers)
        stamps.begin(self._stage)

    def send(self, place: int, ticket: int, hidden: Tensor) -> Parcel:
        """Queue the copy of a place's states (T, H), and return what the next stage finds them by."""
        memory = self._memories[place]
        room = _Room(memory.data, self._num_stages)
        room.find_states(len(hidden), self._hidden_size, self._dtype).copy_(hidden)
        room.stamps.end(self._stage)
        write_flag(room.flag, ticket)
        return Parcel(memory.handle, memory.data.numel(), len(hidden))

    def send_trial(self, ticket: int) -> Parcel:
        """Send states that the next stage knows, for `Receiver.take_trial`."""
        self.begin(0, 1, None)
        return self.send(0, ticket, _make_known(self._hidden_size, self._dtype, self._device))


class Receiver:
    """The later one; arguments as for `Sender`."""

    def __init__(self, num_stages: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_stages, self._hidden_size, self._dtype, self._device = num_stages, hidden_size, dtype, device
        self._mapped: dict[bytes, Mapped] = {}
        self._gate = Gate(device)

    def receive(self, parcel: Parcel) -> tuple[Tensor, Stamps]:
        """Return states (T, H) and stamps, which are there for what is queued behind `wait`, until their place is used anew.

        Raises:
            RuntimeError: CUDA does not let these processes share memory.
        """
        if parcel.memory not in self._mapped:
            self._mapped[parcel.memory] = map_memory(parcel.memory, parcel.num_bytes, self._device)
        room = self._find_room(parcel)
        return room.find_states(parcel.num_rows, self._hidden_size, self._dtype), room.stamps

    def wait(self, parcel: Parcel, ticket: int) -> None:
        """Have what is queued from now on wait until a parcel that was received is complete.

        Raises:
            RuntimeError: the stages were told to stop.
        """
        self._gate.wait(self._find_room(parcel).flag, ticket)

    def take_trial(self, parcel: Parcel, ticket: int) -> None:
        """See whether states of the stage before arrive here.

        Raises:
            RuntimeError: they do not.
        """
        hidden, _ = self.receive(parcel)
        known = _make_known(self._hidden_size, self._dtype, self._device)
        # Once before the wait: to load a kernel may wait for all that is queued, and then nobody would look at the clock.
        _ = (known == known.clone()).all()
        self.wait(parcel, ticket)
        is_right = (known == hidden).all()
        done, until = torch.cuda.Event(), time.monotonic() + _TRIAL_S
        done.record()
        while not done.query():
            if time.monotonic() > until:
                self.stop()
                raise RuntimeError(f"nothing arrived within {_TRIAL_S:.0f} s")
            time.sleep(1e-3)
        if not is_right:
            raise RuntimeError("what arrived was not what had been sent")

    def stop(self) -> None:
        """Let nothing that is queued wait any longer; any thread may call it."""
        self._gate.stop()

    def close(self) -> None:
        """Let go of what the stage before has shared, which may be dead; `receive` begins anew."""
        self._gate.reopen()
        for memory in self._mapped.values():
            unmap(memory)
        self._mapped.clear()

    def _find_room(self, parcel: Parcel) -> _Room:
        return _Room(self._mapped[parcel.memory].data, self._num_stages)


def _first_byte(num_stages: int) -> int:
    """Return where states begin, behind the stamps and the flag."""
    return -(-(16 * num_stages + 8) // _ALIGNMENT) * _ALIGNMENT


def _make_known(hidden_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a trial's states (1, H)."""
    return (torch.arange(hidden_size, device=device) % _KNOWN).to(dtype)[None]
