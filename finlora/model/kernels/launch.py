"""Launch of this package's kernels: which tensors use them, CUDA graph capture, and programmatic dependent launch.

A pass of few rows is a thousand kernels of some microseconds, with one or two microseconds of idle GPU between two of them. A
kernel launched with overlap starts as soon as all blocks of the kernel before have started. It loads its weights, which no kernel
writes, and waits (`gdc_wait`) before it reads what the kernel before writes.

Each of these kernels waits before it ends, so after the wait the results of all earlier kernels are visible too.

Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import contextlib
import functools
import gc
import time
from collections.abc import Iterator

import torch
from torch import Tensor

_compiled_s = 0.0


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Count the time inside as compilation or capture (`seconds_compiled`)."""
    global _compiled_s
    started = time.monotonic()
    try:
        yield
    finally:
        _compiled_s += time.monotonic() - started


def seconds_compiled() -> float:
    """Return the seconds that this process has compiled kernels and captured graphs so far."""
    return _compiled_s


def takes_kernels(tensor: Tensor) -> bool:
    """Return whether this package's kernels run for a tensor: on a GPU.

    The only such check: tests replace it to run these paths on CPU, by emulations of Triton, FlashAttention and CUDA graphs.
    """
    return tensor.is_cuda


@contextlib.contextmanager
def capture_graph(
    graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Capture the kernels launched inside into a graph, with Python's garbage collector off.

    A collection may free graphs and memory pools of an earlier module. CUDA refuses these calls during a capture. Then
    the capture fails, and torch leaves its random generator in the state of a capture, in which it refuses all random numbers.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        with compiling(), torch.cuda.graph(graph, pool=pool.id, stream=stream):  # type: ignore[arg-type]
            yield
    finally:
        if is_on:
            gc.enable()


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Return whether a device supports programmatic dependent launch: Hopper and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
