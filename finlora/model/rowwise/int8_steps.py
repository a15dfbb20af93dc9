"""Elementwise steps of LLM.int8() on a GPU, one Triton kernel each: outliers, quantised rows, gathered columns, unpacked weights.

Shapes: T rows, K in, N out, R columns kept in 16 bit. Imported only for CUDA tensors: the CPU build of torch has no Triton.
Source: arXiv:2208.07339, section 3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from finlora.model.rowwise.elementwise_steps import lay_out

_NUMBERS = 2048
_MOST_PARTS = 64
"""Parts of the rows that outliers are sought in at a time."""
_SOUGHT_ROWS, _SOUGHT_COLUMNS = 16, 512
"""Rows and columns that a program reads at a time to find outliers: enough loads in flight."""


@triton.jit(do_not_specialize=["num_rows", "part_rows"])
def _find_outliers(x_ptr, out_ptr, num_rows, num_columns, part_rows, least, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column, part = columns < num_columns, tl.program_id(1)
    last = min((part + 1) * part_rows, num_rows)
    strongest = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(part * part_rows, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        is_there = (rows < last)[:, None] & is_column[None]
        offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None]
        half = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float16)
        magnitude = tl.abs(half.to(tl.float32))
        strongest = tl.maximum(strongest, tl.where(magnitude >= least, magnitude, 0.0))
    tl.store(out_ptr + part * num_columns + columns, tl.max(strongest, 0).to(tl.float16), mask=is_column)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_rows(
    x_ptr, held_ptr, out_ptr, scale_ptr, num_rows, num_columns, least, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row, starts = rows < num_rows, rows.to(tl.int64)[:, None] * num_columns
    strongest = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_there = is_row[:, None] & (columns < num_columns)[None]
        half = tl.load(x_ptr + starts + columns[None], mask=is_there, other=0.0).to(tl.float16)
        held = tl.load(held_ptr + columns, mask=columns < num_columns, other=0).to(tl.int32)
        magnitude = tl.abs(half.to(tl.float32))
        magnitude = tl.where((magnitude >= least) & (held != 0)[None], 0.0, magnitude)
        # NaN would be left out of a maximum: the row's scale becomes infinite, and with it all that is computed of the row.
        magnitude = tl.where(magnitude == magnitude, magnitude, float("inf"))
        strongest = tl.maximum(strongest, magnitude)
    scales = tl.max(strongest, 1)
    tl.store(scale_ptr + rows, scales, mask=is_row)
    factors = (127.0 / tl.where(scales > 1e-12, scales, 1e-12))[:, None]
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_there = is_row[:, None] & (columns < num_columns)[None]
        half = tl.load(x_ptr + starts + columns[None], mask=is_there, other=0.0).to(tl.float16)
        held = tl.load(held_ptr + columns, mask=columns < num_columns, other=0).to(tl.int32)
        rounded = libdevice.rint(half.to(tl.float32) * factors)
        out = tl.where((held != 0)[None], 0.0, rounded).to(tl.int8)
        tl.store(out_ptr + starts + columns[None], out, mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _take_columns(
    x_ptr, columns_ptr, chosen_ptr, out_ptr, num_rows, num_columns, num_taken, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    rows, targets = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_target = targets < num_taken
    is_there = (rows < num_rows)[:, None] & is_target[None]
    columns = tl.load(columns_ptr + targets, mask=is_target, other=0)
    chosen = tl.load(chosen_ptr + targets, mask=is_target, other=0).to(tl.float32)
    wide_rows = rows.to(tl.int64)[:, None]
    taken = tl.load(x_ptr + wide_rows * num_columns + columns[None], mask=is_there, other=0.0).to(tl.float32)
    out = (taken * chosen[None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + wide_rows * num_taken + targets[None], out, mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def _scale(
    x_ptr, rows_ptr, columns_ptr, out_ptr, num_rows, num_columns, factor,
    HAS_COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_row, is_column = rows < num_rows, columns < num_columns
    is_there = is_row[:, None] & is_column[None]
    scale = tl.load(rows_ptr + rows, mask=is_row, other=0.0)[:, None]
    if HAS_COLUMNS:
        scale = scale * tl.load(columns_ptr + columns, mask=is_column, other=0.0)[None]
    offsets = rows.to(tl.int64)[:, None] * num_columns + columns[None]
    wide = tl.load(x_ptr + offsets, mask=is_there, other=0).to(tl.float32)
    tl.store(out_ptr + offsets, (wide * (scale * factor)).to(out_ptr.dtype.element_ty), mask=is_there)


def find_outliers_rows(x: Tensor, least: float) -> Tensor:
    """As `finlora.model.layers.frozen_linear._find_outliers`, for magnitudes of at least `least`."""
    x = x.contiguous()
    num_rows, num_columns = x.shape
    block = min(_SOUGHT_COLUMNS, triton.next_power_of_2(num_columns))
    part_rows = max(_SOUGHT_ROWS, triton.cdiv(num_rows, _MOST_PARTS))
    num_parts = triton.cdiv(num_rows, part_rows)
    out = torch.empty(num_parts, num_columns, dtype=torch.float16, device=x.device)
    _find_outliers[(triton.cdiv(num_columns, block), num_parts)](
        x, out, num_rows, num_columns, part_rows, least, ROWS=_SOUGHT_ROWS, BLOCK=block, num_warps=4
    )
    return out.amax(0) if num_parts > 1 else out[0]


def quantise_rows(x: Tensor, held_back: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """As `finlora.model.layers.frozen_linear._quantise_rows`; a row with NaN has an infinite scale."""
    x = x.contiguous()
    num_rows, num_columns = x.shape
    out = torch.empty(num_rows, num_columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = min(_NUMBERS, triton.next_power_of_2(num_columns))
    rows = _NUMBERS // block
    _quantise_rows[(triton.cdiv(num_rows, rows),)](
        x, held_back.view(torch.int8), out, scales, num_rows, num_columns, least, ROWS=rows, BLOCK=block, num_warps=4
    )
    return out, scales


def take_columns_rows(x: Tensor, columns: Tensor, is_chosen: Tensor) -> Tensor:
    """As `finlora.model.layers.frozen_linear._take_columns`."""
    x = x.contiguous()
    num_rows, num_columns = x.shape
    out = torch.empty(num_rows, len(columns), dtype=x.dtype, device=x.device)
    grid, sizes = lay_out(num_rows, len(columns))
    _take_columns[grid](x, columns, is_chosen.view(torch.int8), out, num_rows, num_columns, len(columns), **sizes)
    return out


def scale_product_rows(product: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """As `finlora.model.layers.frozen_linear._scale_product`."""
    out = torch.empty(product.shape, dtype=dtype, device=product.device)
    grid, sizes = lay_out(*product.shape)
    _scale[grid](product.contiguous(), rows, columns, out, *product.shape, 1 / 127.0**2, HAS_COLUMNS=True, **sizes)
    return out


def unpack_int8_rows(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As `finlora.model.layers.frozen_linear._unpack_int8`."""
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    grid, sizes = lay_out(*values.shape)
    _scale[grid](values.contiguous(), scales, scales, out, *values.shape, 1 / 127.0, HAS_COLUMNS=False, **sizes)
    return out
