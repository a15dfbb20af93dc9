"""RMSNorm of few rows on a GPU, launched to overlap the end of the kernel before it (finlora/model/kernels/launch.py).

Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from finlora.model.kernels.launch import can_overlap


@triton.jit
def _normalise(x_ptr, weight_ptr, out_ptr, num_columns, eps, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    is_there = columns < num_columns
    offsets = tl.program_id(0).to(tl.int64) * num_columns + columns
    weight = tl.load(weight_ptr + columns, mask=is_there, other=0.0)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + offsets, mask=is_there, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    tl.store(out_ptr + offsets, weight * (x * inverse).to(weight.dtype), mask=is_there)


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `finlora.model.layers.elementwise.normalise`, one program a row. Shapes: (T, H), (H,) -> (T, H), of one type."""
    x, (num_rows, num_columns) = x.contiguous(), x.shape
    out, overlaps = torch.empty_like(x), can_overlap(x.device)
    _normalise[(num_rows,)](
        x, weight, out, num_columns, eps,
        BLOCK=triton.next_power_of_2(num_columns), OVERLAPS=overlaps, num_warps=16, launch_pdl=overlaps,
    )  # fmt: skip
    return out
