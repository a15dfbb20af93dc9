"""RMSNorm of many rows, its dropped copies and their gradients on a GPU, one Triton kernel each.

A program holds whole rows, and its blocks and warps depend on the row's width alone: a row's sum is added in the same order
whatever the other rows, in any process. A resumed run sees other packs first, and its sums must not round differently: in
bfloat16 that changes the loss of 16 examples by up to 0.04 (SmolLM2-135M).

Shapes: T rows, H columns, k copies. Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""Numbers that a program holds, at least one row."""
_MOST_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _normalise(
    x_ptr, weight_ptr, keep_ptr, out_ptr, dropped_ptr, num_rows, num_columns, eps, share,
    COPIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_column = columns < num_columns
    is_there = (rows < num_rows)[:, None] & is_column[None]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None]
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    wide = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / num_columns + eps)
    unit = (wide * inverse[:, None]).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (weight[None] * unit).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=is_there)
    if COPIES > 0:
        keep = tl.load(keep_ptr + offsets, mask=is_there, other=0).to(tl.int32)
        scaled = out.to(tl.float32) / share
        for copy in tl.static_range(COPIES):
            dropped = tl.where(((keep >> copy) & 1) == 1, scaled, 0.0).to(out_ptr.dtype.element_ty)
            targets = (rows.to(tl.int64) + copy * num_rows)[:, None] * num_columns + columns[None]
            tl.store(dropped_ptr + targets, dropped, mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_gradient(
    grad_ptr, dropped_ptr, x_ptr, weight_ptr, residual_ptr, keep_ptr, out_ptr, num_rows, num_columns, eps, share,
    COPIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_column = columns < num_columns
    is_there = (rows < num_rows)[:, None] & is_column[None]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None]
    total = tl.load(grad_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    if COPIES > 0:
        keep = tl.load(keep_ptr + offsets, mask=is_there, other=0).to(tl.int32)
        kept = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for copy in tl.static_range(COPIES):
            sources = (rows.to(tl.int64) + copy * num_rows)[:, None] * num_columns + columns[None]
            part = tl.load(dropped_ptr + sources, mask=is_there, other=0.0).to(tl.float32)
            kept += tl.where(((keep >> copy) & 1) == 1, part / share, 0.0)
        total += kept
    weight = tl.load(weight_ptr + columns, mask=is_column, other=0.0).to(tl.float32)
    wide = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / num_columns + eps)
    scaled, unit = total * weight[None], wide * inverse[:, None]
    mean = tl.sum(scaled * unit, 1) / num_columns
    residual = tl.load(residual_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    out = residual + inverse[:, None] * (scaled - unit * mean[:, None])
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _normalise_heads(
    x_ptr, weight_ptr, num_rows, num_heads, row_stride, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    numbers, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    rows, heads = numbers // num_heads, numbers % num_heads
    is_there = (rows < num_rows)[:, None] & (columns < width)[None]
    offsets = (rows.to(tl.int64) * row_stride + heads * width)[:, None] + columns[None]
    weight = tl.load(weight_ptr + heads[:, None] * width + columns[None], mask=is_there, other=0.0).to(tl.float32)
    wide = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    unit = (wide * inverse[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(x_ptr + offsets, (weight * unit).to(x_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_heads_gradient(
    grad_ptr, x_ptr, weight_ptr, num_rows, num_heads, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    numbers, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    is_there = (numbers < num_rows)[:, None] & (columns < width)[None]
    offsets = numbers.to(tl.int64)[:, None] * width + columns[None]
    heads = numbers % num_heads
    weight = tl.load(weight_ptr + heads[:, None] * width + columns[None], mask=is_there, other=0.0).to(tl.float32)
    wide = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    scaled = tl.load(grad_ptr + offsets, mask=is_there, other=0.0).to(tl.float32) * weight
    unit = wide * inverse[:, None]
    out = inverse[:, None] * (scaled - unit * (tl.sum(scaled * unit, 1) / width)[:, None])
    tl.store(grad_ptr + offsets, out.to(grad_ptr.dtype.element_ty), mask=is_there)


def normalise_heads_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `finlora.model.layers.elementwise.normalise_heads`; the heads of a row lie side by side."""
    (num_heads, width), num_rows = weight.shape, len(x)
    block = triton.next_power_of_2(width)
    rows = max(1, _NUMBERS // block)
    _normalise_heads[(triton.cdiv(num_rows * num_heads, rows),)](
        x, weight, num_rows, num_heads, x.stride(0), width, eps, ROWS=rows, BLOCK=block, num_warps=4
    )
    return x


def normalise_heads_backward_rows(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `finlora.model.layers.elementwise.normalise_heads_backward`, for contiguous tensors."""
    num_heads, width = weight.shape
    num_rows = len(x) * num_heads
    block = triton.next_power_of_2(width)
    rows = max(1, _NUMBERS // block)
    _norm_heads_gradient[(triton.cdiv(num_rows, rows),)](
        grad, x, weight, num_rows, num_heads, width, eps, ROWS=rows, BLOCK=block, num_warps=4
    )
    return grad


def normalise_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `finlora.model.layers.elementwise.normalise`."""
    x = x.contiguous()
    out = torch.empty_like(x)
    grid, sizes = _lay_out(x)
    _normalise[grid](x, weight, x, out, out, *x.shape, eps, 1.0, COPIES=0, **sizes)
    return out


def normalise_and_drop_rows(
    x: Tensor, weight: Tensor, eps: float, keep: Tensor, num_copies: int, share: float
) -> tuple[Tensor, Tensor]:
    """As `finlora.model.layers.elementwise.normalise_and_drop`; `share` of the numbers is kept."""
    x = x.contiguous()
    out, dropped = torch.empty_like(x), torch.empty(num_copies, *x.shape, dtype=x.dtype, device=x.device)
    grid, sizes = _lay_out(x)
    _normalise[grid](x, weight, keep, out, dropped, *x.shape, eps, share, COPIES=num_copies, **sizes)
    return out, dropped


def normalise_backward_rows(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """As `finlora.model.layers.elementwise.normalise_backward`."""
    grad, x, residual = grad.contiguous(), x.contiguous(), residual.contiguous()
    out = torch.empty_like(x)
    grid, sizes = _lay_out(x)
    _norm_gradient[grid](grad, grad, x, weight, residual, x, out, *x.shape, eps, 1.0, COPIES=0, **sizes)
    return out


def normalise_and_drop_backward_rows(
    grad: Tensor, dropped: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor, keep: Tensor, share: float
) -> Tensor:
    """As `finlora.model.layers.elementwise.normalise_and_drop_backward`; `share` of the numbers is kept."""
    grad, dropped, x, residual = grad.contiguous(), dropped.contiguous(), x.contiguous(), residual.contiguous()
    out = torch.empty_like(x)
    grid, sizes = _lay_out(x)
    _norm_gradient[grid](
        grad, dropped, x, weight, residual, keep, out, *x.shape, eps, share, COPIES=len(dropped), **sizes
    )
    return out


def _lay_out(x: Tensor) -> tuple[tuple[int], dict[str, int]]:
    """Return the grid for rows (T, H), and the sizes of a program, which depend on H alone."""
    num_rows, num_columns = x.shape
    block = triton.next_power_of_2(num_columns)
    rows = max(1, _NUMBERS // block)
    warps = min(_MOST_WARPS, max(4, block // 1024))
    return (triton.cdiv(num_rows, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": warps}
