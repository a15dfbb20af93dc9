"""LoRA's updates of one product in packed training: added to the product, and their gradients.

Shapes: T rows, K in, N out of the product, k adapted projections of rank r, which share the product's input x. D is a dropout
mask of each projection's own; w are a projection's columns of the product and s its scale:

    forward    low = D(x) A^T;  y[w] += s low B^T
    backward   low' = s dy[w] B;  dA = low'^T D(x);  dB = s dy[w]^T low;  dD(x) = low' A

`low` is kept between the passes where the layer keeps anything: k r numbers a row. D(x) is as large as k inputs and is computed
again. A and B are cast to the type of the activations at each use, unless the updates hold casts already (packed_model.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from finlora.formula.low_rank import Update

Lows = Tensor | Sequence[Tensor]
"""D(x) A^T of each adapted projection: (k, T, r), or tensors (T, r) where ranks differ."""


def add_updates(out: Tensor, dropped: Tensor, updates: Sequence[Update]) -> Lows:
    """Add the updates to a product in place and return `low`. Shapes: out (T, N), dropped (k, T, K)."""
    lows = multiply_down(dropped, updates)
    add_lows(out, lows, updates)
    return lows


def add_update(out: Tensor, dropped: Tensor, update: Update) -> Lows:
    """As `add_updates`, for the only projection of a product. Shapes: out (T, N), dropped (T, K).

    As one product without a batch, whose long sum cuBLAS can split over a GPU that T rows alone do not fill.
    """
    lows = [multiply_down_of_one(dropped, update)]
    add_lows(out, lows, [update])
    return lows


def multiply_down_of_one(dropped: Tensor, update: Update) -> Tensor:
    """Return `low` of a product's only projection. Shapes: (T, K) -> (T, r)."""
    low: Tensor = dropped @ update.down.to(dropped.dtype).t()
    return low


def add_lows(out: Tensor, lows: Lows, updates: Sequence[Update]) -> None:
    """Add the updates of known `low` to a product in place."""
    for update, low in zip(updates, lows, strict=True):
        out[:, update.columns].addmm_(low, update.up.to(out.dtype).t(), alpha=update.scale)


def multiply_down(dropped: Tensor, updates: Sequence[Update]) -> Lows:
    """Return `low`: one product for all projections where their ranks are equal."""
    if _are_alike(updates):
        return dropped @ _stack_down(updates, dropped.dtype).transpose(1, 2)
    return [multiply_down_of_one(x, update) for x, update in zip(dropped, updates, strict=True)]


def updates_backward(
    grad: Tensor, dropped: Tensor, lows: Lows, updates: Sequence[Update]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of each `low` and, in float32, of A, B, A, B, ... Shapes: grad (T, N), dropped (k, T, K)."""
    low_grads, gradients = [], []
    for update, x, low in zip(updates, dropped, lows, strict=True):
        low_grads.append(low_gradient(grad, update))
        gradients += parameter_gradients(grad, x, low, low_grads[-1], update)
    return low_grads, gradients


def dropped_gradient_of_one(low_grad: Tensor, update: Update) -> Tensor:
    """Return the gradient of D(x) of a product's only projection. Shapes: (T, r) -> (T, K)."""
    return low_grad @ update.down.to(low_grad.dtype)


def low_gradient(grad: Tensor, update: Update) -> Tensor:
    """Return the gradient of a projection's `low`. Shapes: (T, N) -> (T, r)."""
    return (grad[:, update.columns] @ update.up.to(grad.dtype)).mul_(update.scale)


def parameter_gradients(grad: Tensor, dropped: Tensor, low: Tensor, low_grad: Tensor, update: Update) -> list[Tensor]:
    """Return the float32 gradients of a projection's A and B. Shapes: grad (T, N), dropped (T, K), both low (T, r)."""
    grad_up = (grad[:, update.columns].t() @ low).float().mul_(update.scale)
    return [(low_grad.t() @ dropped).float(), grad_up]


def dropped_gradient(low_grads: Sequence[Tensor], updates: Sequence[Update]) -> Tensor:
    """Return the gradient of D(x). Shapes: k of (T, r) -> (k, T, K)."""
    if _are_alike(updates):
        return torch.stack(list(low_grads)) @ _stack_down(updates, low_grads[0].dtype)
    parts = zip(low_grads, updates, strict=True)
    return torch.stack([dropped_gradient_of_one(low_grad, update) for low_grad, update in parts])


def add_input_gradient(grad: Tensor, low_grad: Tensor, update: Update) -> Tensor:
    """Add the gradient of the input of a single projection in place; without dropout. Shapes: (T, K), (T, r) -> (T, K)."""
    return grad.addmm_(low_grad, update.down.to(grad.dtype))


def _are_alike(updates: Sequence[Update]) -> bool:
    return len({update.down.shape[0] for update in updates}) == 1


def _stack_down(updates: Sequence[Update], dtype: torch.dtype) -> Tensor:
    """Shapes: k of (r, K) -> (k, r, K)."""
    return torch.stack([update.down for update in updates]).to(dtype)
