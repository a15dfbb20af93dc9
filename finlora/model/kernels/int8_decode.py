"""Products of few rows with int8 weights on a GPU, bound by memory: each weight is read once and unpacked on the fly.

Shapes: T rows, up to MAX_FEW_ROWS, K in, N out. A program reads BLOCK_OUT outputs and a part of the columns; a second kernel sums
the parts in a fixed order.

Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from finlora.model.kernels.launch import can_overlap

MIN_DOT = 16  # smallest side of a tensor-core product
_PROGRAMS_A_PROCESSOR = 4


@triton.jit
def _few_int8(
    x_ptr, w_ptr, scale_ptr, out_ptr, num_rows, num_out, num_in, part,
    ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    outs = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.arange(0, ROWS)
    start = tl.program_id(1) * part
    is_out, is_row = outs < num_out, rows < num_rows
    acc = tl.zeros((BLOCK_OUT, ROWS), dtype=tl.float32)
    for offset in range(start, min(start + part, num_in), BLOCK_IN):
        ins = offset + tl.arange(0, BLOCK_IN)
        w = tl.load(w_ptr + outs[:, None] * num_in + ins[None], mask=is_out[:, None], other=0)
        x = tl.load(x_ptr + rows[None] * num_in + ins[:, None], mask=is_row[None], other=0.0)
        acc = tl.dot(w.to(x_ptr.dtype.element_ty), x, acc)
    acc = acc * (tl.load(scale_ptr + outs, mask=is_out, other=0.0) / 127.0)[:, None]
    target = (tl.program_id(1) * num_rows + rows[None]) * num_out + outs[:, None]
    tl.store(out_ptr + target, acc, mask=is_out[:, None] & is_row[None])


@triton.jit
def _add_parts(
    parts_ptr, residual_ptr, out_ptr, num_parts, size,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    indices = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = indices < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in range(num_parts):
        total += tl.load(parts_ptr + part * size + indices, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + indices, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + indices, total.to(out_ptr.dtype.element_ty), mask=mask)


def few_int8(x: Tensor, values: Tensor, scales: Tensor, residual: Tensor | None) -> Tensor:
    """Return x W^T (+ residual) in x's type, W = values * scales / 127 unpacked on the fly.

    Shapes: x (T, K), values (N, K) int8, scales (N,) float32, residual (T, N) -> (T, N).
    """
    (num_rows, num_in), num_out = x.shape, values.shape[0]
    block_out, overlaps = 32, can_overlap(x.device)
    parts, part = _split(num_out, num_in, block_out, 256, x.device)
    out = torch.empty(parts, num_rows, num_out, dtype=torch.float32, device=x.device)
    _few_int8[(triton.cdiv(num_out, block_out), parts)](
        x, values, scales, out, num_rows, num_out, num_in, part,
        ROWS=_pad_rows(num_rows), BLOCK_OUT=block_out, BLOCK_IN=256 if num_in % 256 == 0 else 128,
        OVERLAPS=overlaps, num_warps=4, num_stages=4, launch_pdl=overlaps,
    )  # fmt: skip
    return _sum_parts(out, residual, x.dtype)


def _sum_parts(parts: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Shapes: (parts, T, N), (T, N) -> (T, N)."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    block, overlaps = 1024, can_overlap(parts.device)
    _add_parts[(triton.cdiv(out.numel(), block),)](
        parts, out if residual is None else residual, out, parts.shape[0], out.numel(),
        HAS_RESIDUAL=residual is not None, BLOCK=block, OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out


def _pad_rows(num_rows: int) -> int:
    return max(MIN_DOT, int(triton.next_power_of_2(num_rows)))


def _split(num_out: int, num_in: int, block_out: int, block_in: int, device: torch.device) -> tuple[int, int]:
    """Return the number of parts into which the columns are split among programs, and the columns of a part."""
    num_blocks = triton.cdiv(num_in, block_in)
    wanted = max(1, _PROGRAMS_A_PROCESSOR * num_processors(device) // triton.cdiv(num_out, block_out))
    part = triton.cdiv(num_blocks, min(wanted, num_blocks)) * block_in
    return triton.cdiv(num_in, part), part


@functools.cache
def num_processors(device: torch.device) -> int:
    """Return the number of multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
