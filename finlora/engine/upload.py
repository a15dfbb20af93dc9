"""Numbers of a micro-batch on their way to the device, without a wait: a GPU may still be at work on what was queued before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pin(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers on the host, where a copy to the device need not be waited for."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")


def upload(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """Return numbers on the device, as soon as what is queued there is done; the host goes on at once."""
    return pin(numbers, device, dtype).to(device, non_blocking=True)


def fill_drawn(ids: Tensor, drawn: Tensor) -> None:
    """Put drawn tokens where ids stand for them: -1 - D for token D. Shapes: (T,) changed in place, (N,)."""
    ids.copy_(torch.where(ids < 0, drawn[(-1 - ids).clamp(min=0)], ids))
