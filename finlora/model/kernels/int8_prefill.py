"""LLM.int8() on a GPU: a product on the int8 tensor cores that also rescales and adds the 16-bit product and the residual.

Shapes: T rows, K in, N out, R columns kept in 16 bit (held back). Source: arXiv:2208.07339, section 3.

Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGE_SHARED_BYTES = 200 * 1024
"""Shared memory of a multiprocessor that large blocks need: Hopper has 227 KiB, an A6000 99 KiB."""


@triton.jit
def _many_int8(
    x_ptr, w_ptr, row_ptr, column_ptr, few_x_ptr, few_w_ptr, residual_ptr, out_ptr, num_rows, num_out, num_in,
    FEW: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    # Programs that run at a time share blocks of both operands in cache: TOGETHER blocks of rows by all blocks of outputs.
    num_row_blocks, num_out_blocks = tl.cdiv(num_rows, BLOCK_ROWS), tl.cdiv(num_out, BLOCK_OUT)
    first = tl.program_id(0) // (TOGETHER * num_out_blocks) * TOGETHER
    size = min(num_row_blocks - first, TOGETHER)
    inside = tl.program_id(0) % (TOGETHER * num_out_blocks)
    rows = (first + inside % size) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outs = inside // size * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    is_row, is_out = rows < num_rows, outs < num_out
    safe_rows, safe_outs = tl.where(is_row, rows, 0), tl.where(is_out, outs, 0)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_OUT), dtype=tl.int32)
    ins = tl.arange(0, BLOCK_IN)
    x_block = x_ptr + safe_rows[:, None] * num_in + ins[None]
    w_block = w_ptr + safe_outs[None] * num_in + ins[:, None]
    for _ in range(0, num_in, BLOCK_IN):
        acc = tl.dot(tl.load(x_block), tl.load(w_block), acc, out_dtype=tl.int32)
        x_block += BLOCK_IN
        w_block += BLOCK_IN
    row_scale = tl.load(row_ptr + safe_rows) * (1 / 127.0)
    column_scale = tl.load(column_ptr + safe_outs) * (1 / 127.0)
    out = acc.to(tl.float32) * row_scale[:, None] * column_scale[None]
    few = tl.arange(0, FEW)
    few_x = tl.load(few_x_ptr + safe_rows[:, None] * FEW + few[None])
    few_w = tl.load(few_w_ptr + safe_outs[None] * FEW + few[:, None])
    out = tl.dot(few_x, few_w, out)
    target = rows[:, None] * num_out + outs[None]
    mask = is_row[:, None] & is_out[None]
    if HAS_RESIDUAL:
        out += tl.load(residual_ptr + target, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + target, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _choose_columns(
    strength_ptr, columns_ptr, is_chosen_ptr, is_held_ptr, num_in, FEW: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program. float16 magnitudes sort like their bits, so 15 bisections find the FEW-th largest."""
    columns = tl.arange(0, BLOCK)
    bits = tl.load(strength_ptr + columns, mask=columns < num_in, other=0).to(tl.int32)
    threshold = 0
    if tl.sum((bits > 0).to(tl.int32)) > FEW:
        high = 32767
        for _ in range(15):
            middle = (threshold + high) // 2
            is_over = tl.sum((bits > middle).to(tl.int32)) > FEW
            threshold, high = tl.where(is_over, middle + 1, threshold), tl.where(is_over, high, middle)
    num_over = tl.sum((bits > threshold).to(tl.int32))
    num_equal = tl.sum(((bits == threshold) & (bits > 0)).to(tl.int32))
    room = FEW - num_over
    count = num_over + min(room, num_equal)
    # Columns without an outlier fill the rest of the list, marked as not chosen.
    num_chosen, num_seen_equal, num_other = 0, 0, count
    for start in range(0, num_in, CHUNK):
        own = start + tl.arange(0, CHUNK)
        is_there = own < num_in
        part = tl.load(strength_ptr + own, mask=is_there, other=0).to(tl.int32)
        equal = ((part == threshold) & (part > 0)).to(tl.int32)
        is_in_room = num_seen_equal + tl.cumsum(equal, 0) <= room
        chosen = tl.where((part > threshold) | ((equal > 0) & is_in_room), 1, 0)
        other = tl.where(is_there, 1 - chosen, 0)
        rank = tl.where(chosen > 0, num_chosen + tl.cumsum(chosen, 0), num_other + tl.cumsum(other, 0)) - 1
        is_listed = (rank < FEW) & is_there
        tl.store(columns_ptr + rank, own, mask=is_listed)
        tl.store(is_chosen_ptr + rank, chosen.to(tl.int8), mask=is_listed)
        tl.store(is_held_ptr + own, chosen.to(tl.int8), mask=is_there)
        num_chosen += tl.sum(chosen)
        num_seen_equal += tl.sum(equal)
        num_other += tl.sum(other)


def many_int8(
    x: Tensor, rows: Tensor, values: Tensor, scales: Tensor, few_x: Tensor, few_w: Tensor, residual: Tensor | None
) -> Tensor:
    """Return the rescaled int8 product, plus the product of the held-back columns, plus the residual, in few_x's type.

    Shapes: x (T, K) int8 with magnitudes rows (T,), values (N, K) int8 with magnitudes scales (N,), few_x (T, R), few_w (N, R),
    residual (T, N) -> (T, N). R is a power of two.
    """
    (num_rows, num_in), num_out = x.shape, values.shape[0]
    out = torch.empty(num_rows, num_out, dtype=few_x.dtype, device=x.device)
    is_large = x.is_cuda and _shared_bytes(x.device) >= _LARGE_SHARED_BYTES
    block_rows, block_out, block_in = (128, 256, 128) if is_large else (128, 128, 64)
    grid = (triton.cdiv(num_rows, block_rows) * triton.cdiv(num_out, block_out),)
    _many_int8[grid](
        x, values, rows, scales, few_x, few_w, out if residual is None else residual, out, num_rows, num_out, num_in,
        FEW=few_x.shape[1], HAS_RESIDUAL=residual is not None,
        BLOCK_ROWS=block_rows, BLOCK_OUT=block_out, BLOCK_IN=block_in, TOGETHER=8,
        num_warps=8, num_stages=4 if is_large else 3,
    )  # fmt: skip
    return out


def choose_columns(strength: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns with the strongest outliers, without a host synchronisation.

    Shapes: strength (K,) float16, 0 without an outlier; K >= count.

    Returns:
        columns (count,) int64; whether each has an outlier (count,) bool; whether each of all columns is chosen (K,) bool.
    """
    num_in = strength.shape[0]
    columns = torch.empty(count, dtype=torch.int64, device=strength.device)
    is_chosen, is_held = (torch.empty(n, dtype=torch.int8, device=strength.device) for n in (count, num_in))
    block = triton.next_power_of_2(num_in)
    _choose_columns[(1,)](
        strength.view(torch.int16), columns, is_chosen, is_held, num_in,
        FEW=count, BLOCK=block, CHUNK=min(block, 4096), num_warps=min(32, max(8, block // 512)),
    )  # fmt: skip
    return columns, is_chosen.view(torch.bool), is_held.view(torch.bool)


@functools.cache
def _shared_bytes(device: torch.device) -> int:
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
