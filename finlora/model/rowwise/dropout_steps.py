"""Dropout of o's and down's LoRA inputs on a GPU, one Triton kernel for each step and its gradient.

Shapes: T rows, K columns, I intermediate. Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from finlora.model.rowwise.elementwise_steps import lay_out


@triton.jit(do_not_specialize=["num_rows"])
def _drop(x_ptr, keep_ptr, out_ptr, num_rows, num_columns, share, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None]
    keep = tl.load(keep_ptr + offsets, mask=is_there, other=0).to(tl.int32)
    wide = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + offsets, tl.where((keep & 1) == 1, wide / share, 0.0).to(out_ptr.dtype.element_ty), mask=is_there
    )


@triton.jit(do_not_specialize=["num_rows"])
def _drop_gradient(
    grad_ptr, dropped_ptr, keep_ptr, out_ptr, num_rows, num_columns, share, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None]
    keep = tl.load(keep_ptr + offsets, mask=is_there, other=0).to(tl.int32)
    grad = tl.load(grad_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    dropped = tl.load(dropped_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    total = grad + tl.where((keep & 1) == 1, dropped / share, 0.0)
    tl.store(out_ptr + offsets, total.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_and_drop(
    x_ptr, keep_ptr, out_ptr, dropped_ptr, num_rows, num_columns, share, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    wide_rows = rows.to(tl.int64)[:, None]
    sources, targets = wide_rows * (2 * num_columns) + columns[None], wide_rows * num_columns + columns[None]
    first = tl.load(x_ptr + sources, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + sources + num_columns, mask=is_there, other=0.0).to(tl.float32)
    keep = tl.load(keep_ptr + targets, mask=is_there, other=0).to(tl.int32)
    gated = (first * tl.sigmoid(first)).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (gated * second).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + targets, out, mask=is_there)
    dropped = tl.where((keep & 1) == 1, out.to(tl.float32) / share, 0.0)
    tl.store(dropped_ptr + targets, dropped.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_and_drop_gradient(
    grad_ptr, grad_dropped_ptr, x_ptr, keep_ptr, out_ptr, dropped_ptr, num_rows, num_columns, share,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    wide_rows = rows.to(tl.int64)[:, None]
    both, one = wide_rows * (2 * num_columns) + columns[None], wide_rows * num_columns + columns[None]
    is_kept = (tl.load(keep_ptr + one, mask=is_there, other=0).to(tl.int32) & 1) == 1
    grad = tl.load(grad_ptr + one, mask=is_there, other=0.0).to(tl.float32)
    grad_dropped = tl.load(grad_dropped_ptr + one, mask=is_there, other=0.0).to(tl.float32)
    grad += tl.where(is_kept, grad_dropped / share, 0.0)
    first = tl.load(x_ptr + both, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + both + num_columns, mask=is_there, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(first)
    slope = sigmoid * (1.0 + first * (1.0 - sigmoid))
    tl.store(out_ptr + both, (grad * second * slope).to(out_ptr.dtype.element_ty), mask=is_there)
    tl.store(out_ptr + both + num_columns, (grad * first * sigmoid).to(out_ptr.dtype.element_ty), mask=is_there)
    gated = (first * sigmoid).to(out_ptr.dtype.element_ty).to(tl.float32)
    gated = (gated * second).to(out_ptr.dtype.element_ty).to(tl.float32)
    dropped = tl.where(is_kept, gated / share, 0.0)
    tl.store(dropped_ptr + one, dropped.to(out_ptr.dtype.element_ty), mask=is_there)


def drop_rows(x: Tensor, keep: Tensor, share: float) -> Tensor:
    """As `finlora.model.layers.elementwise.drop`; `share` of the numbers is kept."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid, sizes = lay_out(*x.shape)
    _drop[grid](x, keep, out, *x.shape, share, **sizes)
    return out


def drop_backward_rows(grad: Tensor, dropped: Tensor, keep: Tensor, share: float) -> Tensor:
    """As `finlora.model.layers.elementwise.drop_backward`; `share` of the numbers is kept."""
    grad, dropped = grad.contiguous(), dropped.contiguous()
    out = torch.empty_like(grad)
    grid, sizes = lay_out(*grad.shape)
    _drop_gradient[grid](grad, dropped, keep, out, *grad.shape, share, **sizes)
    return out


def gate_and_drop_rows(gate_up: Tensor, keep: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """As `finlora.model.layers.elementwise.gate_and_drop`; `share` of the numbers is kept."""
    gate_up = gate_up.contiguous()
    out, dropped = (torch.empty(keep.shape, dtype=gate_up.dtype, device=gate_up.device) for _ in range(2))
    grid, sizes = lay_out(*keep.shape)
    _gate_and_drop[grid](gate_up, keep, out, dropped, *keep.shape, share, **sizes)
    return out, dropped


def gate_and_drop_backward_rows(
    grad: Tensor, dropped: Tensor, gate_up: Tensor, keep: Tensor, share: float
) -> tuple[Tensor, Tensor]:
    """As `finlora.model.layers.elementwise.gate_and_drop_backward`; `share` of the numbers is kept."""
    grad, dropped, gate_up = grad.contiguous(), dropped.contiguous(), gate_up.contiguous()
    out, copy = torch.empty_like(gate_up), torch.empty_like(grad)
    grid, sizes = lay_out(*grad.shape)
    _gate_and_drop_gradient[grid](grad, dropped, gate_up, keep, out, copy, *grad.shape, share, **sizes)
    return out, copy
