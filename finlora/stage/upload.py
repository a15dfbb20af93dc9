"""Numbers of a micro-batch on their way to the device and back, without a wait: a GPU may still be at work on what was queued."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def pin(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers on the host, where a copy to the device need not be waited for."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")


def upload(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers on the device, as soon as what is queued there is done; the host goes on at once."""
    return pin(numbers, device, dtype).to(device, non_blocking=True)


def download(numbers: Tensor) -> Callable[[], list[Any]]:
    """Asynchronous copy to the host of what is queued so far; what is returned waits for it and gives the numbers.

    Copied now and not when it is read: that would wait for all that is queued until then.
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


def fill_drawn(ids: Tensor, drawn: Tensor) -> None:
    """Put drawn tokens where ids stand for them: -1 - D for token D. Shapes: (T,) changed in place, (N,)."""
    ids.copy_(torch.where(ids < 0, drawn[(-1 - ids).clamp(min=0)], ids))
