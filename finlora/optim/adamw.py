"""AdamW that clips the gradients' norm in its step, by torch's multi-tensor functions.

DeepSpeed clips parameter by parameter and shares the norm with the other workers, although each holds the same mean already: for
the 180 tensors of a small base's adapter these launches took as long as the step's forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class ClippedAdamW(torch.optim.AdamW):
    """torch's AdamW over gradients whose joint 2-norm is at most `max_grad_norm`; 0: no clipping.

    Args:
        parameters: or groups of them, as torch takes them.
    """

    def __init__(self, parameters: Sequence[Any], *, max_grad_norm: float, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._max_grad_norm = max_grad_norm

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Clip the gradients in place, then update. Takes no closure: its gradients would come after the clipping."""
        if closure is not None:
            raise ValueError("ClippedAdamW takes no closure")
        if self._max_grad_norm:
            torch.nn.utils.clip_grad_norm_(
                [parameter for group in self.param_groups for parameter in group["params"]], self._max_grad_norm
            )
        super().step()
