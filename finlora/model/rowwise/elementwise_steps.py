"""Gate, rotation and dropout masks of a Llama layer on a GPU, one Triton kernel each.

Shapes: T rows, H hidden, I intermediate, h heads of width d.

Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_NUMBERS = 2048
"""Numbers that a program computes."""
_MOST_COLUMNS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _gate(x_ptr, out_ptr, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    wide_rows = rows.to(tl.int64)[:, None]
    sources = x_ptr + wide_rows * (2 * num_columns) + columns[None]
    first = tl.load(sources, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(sources + num_columns, mask=is_there, other=0.0).to(tl.float32)
    gated = (first * tl.sigmoid(first)).to(out_ptr.dtype.element_ty).to(tl.float32)
    out = (gated * second).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide_rows * num_columns + columns[None], out, mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _gate_gradient(grad_ptr, x_ptr, out_ptr, num_rows, num_columns, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    wide_rows = rows.to(tl.int64)[:, None]
    both = wide_rows * (2 * num_columns) + columns[None]
    grad = tl.load(grad_ptr + wide_rows * num_columns + columns[None], mask=is_there, other=0.0).to(tl.float32)
    first = tl.load(x_ptr + both, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + both + num_columns, mask=is_there, other=0.0).to(tl.float32)
    share = tl.sigmoid(first)
    slope = share * (1.0 + first * (1.0 - share))
    tl.store(out_ptr + both, (grad * second * slope).to(out_ptr.dtype.element_ty), mask=is_there)
    tl.store(out_ptr + both + num_columns, (grad * first * share).to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _rotate(
    x_ptr, cosine_ptr, sine_ptr, out_ptr, num_rows, num_heads, row_stride, half,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numbers, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)  # numbers of heads
    is_there = (numbers < num_rows * num_heads)[:, None] & (columns < half)[None]
    rows, heads = (numbers // num_heads).to(tl.int64)[:, None], (numbers % num_heads)[:, None]
    sources = x_ptr + rows * row_stride + heads * (2 * half) + columns[None]
    angles = rows * (2 * half) + columns[None]
    first = tl.load(sources, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(sources + half, mask=is_there, other=0.0).to(tl.float32)
    cosine = tl.load(cosine_ptr + angles, mask=is_there, other=0.0).to(tl.float32)
    sine = tl.load(sine_ptr + angles, mask=is_there, other=0.0).to(tl.float32)
    targets = out_ptr + numbers.to(tl.int64)[:, None] * (2 * half) + columns[None]
    tl.store(targets, (first * cosine - second * sine).to(out_ptr.dtype.element_ty), mask=is_there)
    tl.store(targets + half, (second * cosine + first * sine).to(out_ptr.dtype.element_ty), mask=is_there)


@triton.jit
def _mix(bits):
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387
    return bits ^ ((bits >> 16) & 0xFFFF)


@triton.jit(do_not_specialize=["num_rows", "threshold"])
def _draw_keep(
    seed_ptr, out_ptr, num_rows, num_columns, threshold, COPIES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None]
    seed = tl.load(seed_ptr)
    bits = _mix(_mix((rows[:, None] * num_columns + columns[None]) ^ seed) + seed)
    keep = tl.zeros((ROWS, BLOCK), dtype=tl.int32)
    for copy in tl.static_range(COPIES):
        if copy % 2 == 0 and copy > 0:
            bits = _mix(bits + 0x3779B97F)
        keep = keep | ((((bits >> (16 * (copy % 2))) & 0xFFFF) >= threshold).to(tl.int32) << copy)
    targets = out_ptr + rows.to(tl.int64)[:, None] * num_columns + columns[None]
    tl.store(targets, keep.to(tl.uint8), mask=is_there)


def gate_rows(gate_up: Tensor) -> Tensor:
    """As `finlora.model.layers.elementwise.gate`."""
    gate_up = gate_up.contiguous()
    num_rows, num_columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, num_columns, dtype=gate_up.dtype, device=gate_up.device)
    grid, sizes = lay_out(num_rows, num_columns)
    _gate[grid](gate_up, out, num_rows, num_columns, **sizes)
    return out


def gate_backward_rows(grad: Tensor, gate_up: Tensor) -> Tensor:
    """As `finlora.model.layers.elementwise.gate_backward`."""
    grad, gate_up = grad.contiguous(), gate_up.contiguous()
    out = torch.empty_like(gate_up)
    grid, sizes = lay_out(*grad.shape)
    _gate_gradient[grid](grad, gate_up, out, *grad.shape, **sizes)
    return out


def rotate_rows(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As `finlora.model.layers.elementwise.rotate`; x may be a part of wider rows."""
    num_rows, num_heads, width = x.shape
    if x.stride()[1:] != (width, 1):
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(width // 2)
    rows = max(1, _NUMBERS // (2 * block))
    _rotate[(triton.cdiv(num_rows * num_heads, rows),)](
        x, cosine.contiguous(), sine.contiguous(), out, num_rows, num_heads, x.stride(0), width // 2,
        ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def draw_keep_rows(seed: Tensor, num_rows: int, num_columns: int, num_copies: int, threshold: int) -> Tensor:
    """As `finlora.model.layers.elementwise.draw_keep`, bit for bit."""
    out = torch.empty(num_rows, num_columns, dtype=torch.uint8, device=seed.device)
    grid, sizes = lay_out(num_rows, num_columns)
    _draw_keep[grid](seed, out, num_rows, num_columns, threshold, COPIES=num_copies, **sizes)
    return out


def lay_out(num_rows: int, num_columns: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of blocks for rows and columns, and the sizes of a block, which depend on the columns alone."""
    block = min(_MOST_COLUMNS, triton.next_power_of_2(num_columns))
    rows = _NUMBERS // block
    return (triton.cdiv(num_rows, rows), triton.cdiv(num_columns, block)), {
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": 4,
    }
