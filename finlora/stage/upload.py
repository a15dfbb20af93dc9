"""Asynchronous copies of a micro-batch's numbers to the device and back, which do not wait for the GPU's queue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pin(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers on the host, in pinned memory where the device is a GPU: only from there a copy is asynchronous."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")


def upload(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers on the device, copied in the order of its queue; the host does not wait."""
    return pin(numbers, device, dtype).to(device, non_blocking=True)


def download(numbers: Tensor) -> Callable[[], list[Any]]:
    """Start an asynchronous copy to the host; the function returned waits for it and gives the numbers.

    The copy is queued now: queued at the read, it would wait for all work queued until then.
    """
    if not numbers.is_cuda:
        return numbers.clone().tolist
    on_host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True).copy_(numbers, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def read() -> list[Any]:
        done.synchronize()
        return on_host.tolist()

    return read


def fill_sampled(ids: Tensor, sampled: Tensor) -> None:
    """Replace placeholders by sampled tokens, in place: id -1 - D by token D. Shapes: (T,), (N,)."""
    ids.copy_(torch.where(ids < 0, sampled[(-1 - ids).clamp(min=0)], ids))
