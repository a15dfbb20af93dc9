"""Launch of this package's kernels: which tensors take them, and which GPUs may begin one before the last has ended.

One function, so that tests run these paths on a processor by emulations of Triton, FlashAttention and CUDA graphs.

A pass of few rows is a thousand kernels of some microseconds, and between two of them a GPU stands still for one or two more. A
kernel that is launched so is brought to the processors as soon as all blocks of the one before have begun; it waits by itself
before it reads what that one writes, and can load what nobody writes, its weights, meanwhile.

Each of these kernels waits before it ends. So what any kernel before has written is there after the wait, too.

Source: https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#programmatic-dependent-launch-and-synchronization
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterator

import torch
from torch import Tensor


def takes_kernels(tensor: Tensor) -> bool:
    """Return whether kernels are launched for a tensor: on a GPU."""
    return tensor.is_cuda


@contextlib.contextmanager
def capture_graph(
    graph: torch.cuda.CUDAGraph, pool: torch.cuda.MemPool, stream: torch.cuda.Stream | None = None
) -> Iterator[None]:
    """Capture what is launched inside into a graph, with Python's garbage collector off.

    A collection there may free an earlier module's graphs and memory pool. CUDA refuses these calls in a capture, which is lost
    then, and torch leaves its random generator in the state of a capture: all later random numbers of the process are refused.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool.id, stream=stream):  # type: ignore[arg-type]
            yield
    finally:
        if is_on:
            gc.enable()


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Return whether a device has it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
