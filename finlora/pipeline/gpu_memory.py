"""GPU memory shared between processes by CUDA IPC, and stream-ordered waits for a flag in it.

A wait is queued like a kernel: the GPU goes on once the number is written, and the host does not block. If the process that
writes has crashed, the wait would never end; `Gate.stop` writes the number instead.

Imported only with a CUDA build of torch: the CPU build has no cuda-bindings.

Sources: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#interprocess-communication,
https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__MEMOP.html
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finlora.errors import ResourceError
from finlora.model.kernels.compile_cuda import check, driver, runtime

LEAST_BYTES = 2 * 2**20
"""Least size of shared memory: CUDA puts smaller allocations into one block, and shares the whole block."""


class Owned(NamedTuple):
    """Memory that this process has allocated."""

    data: Tensor
    """(bytes,) uint8, zero at first."""
    handle: bytes
    """IPC handle by which other processes map it."""


class Mapped(NamedTuple):
    """Memory that another process has allocated."""

    data: Tensor
    pointer: Any


def allocate(num_bytes: int, device: torch.device) -> Owned:
    """Allocate memory outside torch's allocator, whose blocks CUDA shares only as whole segments.

    Raises:
        ResourceError: the GPU's memory is full.
    """
    result = runtime.cudaMalloc(num_bytes)
    if int(result[0]):
        torch.cuda.empty_cache()
        result = runtime.cudaMalloc(num_bytes)
    if int(result[0]):
        raise ResourceError(
            f"the GPU has no {num_bytes / 2**20:,.0f} MiB left for what passes between stages ({result[0].name}): take a "
            "smaller KV cache, or fewer stages on it."
        )
    memory = _view(result[1], num_bytes, device)
    memory.zero_()
    torch.cuda.current_stream(device).synchronize()  # another process may read it at once
    return Owned(memory, bytes(check(runtime.cudaIpcGetMemHandle(result[1])).reserved))


def map_memory(handle: bytes, num_bytes: int, device: torch.device) -> Mapped:
    """Map memory that another process has allocated.

    Raises:
        RuntimeError: CUDA does not let these processes share memory.
    """
    of_cuda = runtime.cudaIpcMemHandle_t()
    of_cuda.reserved = handle
    pointer = check(runtime.cudaIpcOpenMemHandle(of_cuda, runtime.cudaIpcMemLazyEnablePeerAccess))
    return Mapped(_view(pointer, num_bytes, device), pointer)


def unmap(memory: Mapped) -> None:
    """Unmap it once all queued work is done; the process that owns it may be dead."""
    torch.cuda.synchronize(memory.data.device)
    runtime.cudaIpcCloseMemHandle(memory.pointer)


def write_flag(flag: Tensor, number: int) -> None:
    """Queue a write of a number behind all work queued so far. Shapes: flag (1,) int64."""
    _write(torch.cuda.current_stream(flag.device), flag, number)


class Gate:
    """Waits of one stage for flags whose numbers grow."""

    def __init__(self, device: torch.device) -> None:
        # Created now, since creating a stream waits for all queued work. Its priority lets it overtake a blocked stream.
        self._device, self._stream = device, torch.cuda.Stream(device, priority=-1)
        self._lock, self._is_stopped = threading.Lock(), False
        self._waits: dict[int, tuple[Tensor, int]] = {}

    def wait(self, flag: Tensor, number: int) -> None:
        """Queue a wait until the flag's number is at least `number`. Shapes: flag (1,) int64.

        Raises:
            RuntimeError: `stop` was called.
        """
        with self._lock:
            if self._is_stopped:
                raise RuntimeError("the stages were stopped: the data that this one waits for will not arrive")
            self._waits[flag.data_ptr()] = flag, number
            stream = driver.CUstream(torch.cuda.current_stream(self._device).cuda_stream)
            at_least = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
            check(driver.cuStreamWaitValue64(stream, flag.data_ptr(), number, at_least))

    def stop(self) -> None:
        """End all queued waits, from any thread; the data they waited for is void."""
        with self._lock, torch.cuda.device(self._device):
            self._is_stopped = True
            for flag, number in self._waits.values():
                _write(self._stream, flag, number)
            self._stream.synchronize()

    def reopen(self) -> None:
        """Allow waits again, for other flags or greater numbers."""
        with self._lock:
            self._waits.clear()
            self._is_stopped = False


def _write(stream: torch.cuda.Stream, flag: Tensor, number: int) -> None:
    check(driver.cuStreamWriteValue64(driver.CUstream(stream.cuda_stream), flag.data_ptr(), number, 0))


class _Memory:
    """Bytes on a GPU in the form that torch accepts."""

    def __init__(self, pointer: Any, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (int(pointer), False),
            "version": 3,
        }


def _view(pointer: Any, num_bytes: int, device: torch.device) -> Tensor:
    return torch.as_tensor(_Memory(pointer, num_bytes), device=device)
