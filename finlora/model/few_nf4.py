"""Products of few rows with NF4 weights on a GPU: finlora/model/few_nf4.cu, which reads each packed weight once.

Shapes: T rows, up to MAX_FEW_ROWS, K in, a multiple of UNIT, N out.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from finlora.model.cuda_source import CudaKernel, load_kernels
from finlora.model.nf4 import UNIT, Nf4Rows

_WARPS, _OUT_TILES = 8, 2
_THREADS, _TILE = 32 * _WARPS, 16 * _WARPS * _OUT_TILES
_TABLE_BYTES = 256 * 32 * 4 + 256 * 4  # pairs for each lane, and the levels' numbers


def few_nf4(x: Tensor, rows: Nf4Rows, residual: Tensor | None) -> Tensor:
    """Return x W^T (+ residual) in bfloat16, W unpacked from NF4 with double quantisation on the way.

    NF4's numbers are rounded to bfloat16 and the products of a group scaled in float32, where bitsandbytes rounds each scaled
    weight to bfloat16: both are as far from the stored weight. Parts of the sum are added in a fixed order.

    Shapes: x (T, K) and residual (T, N) bfloat16 -> (T, N).
    """
    (num_rows, num_in), num_out = x.shape, rows.means.shape[0]
    kernels, num_slots = _load(max(8, 1 << (num_rows - 1).bit_length()) // 8, x.device)
    num_tiles, units_a_tile = -(-num_out // _TILE), num_in // UNIT
    units = num_tiles * units_a_tile
    units_a_block = -(-units // num_slots)
    blocks = -(-units // units_a_block)
    parts = torch.empty((blocks + num_tiles) * num_rows * _TILE, dtype=torch.float32, device=x.device)
    out = torch.empty(num_rows, num_out, dtype=torch.bfloat16, device=x.device)
    kernels["few_nf4"].launch(
        (blocks, 1),
        *(x, *rows, parts),
        *(num_rows, num_out, num_in, units, units_a_block),
    )
    kernels["add_parts"].launch(
        (-(-num_out // _THREADS), num_rows), parts, residual, out, num_rows, num_out, units_a_tile, units_a_block
    )
    return out


@functools.cache
def _load(row_tiles: int, device: torch.device) -> tuple[dict[str, CudaKernel], int]:
    """Return the kernels for so many times 8 rows, and the blocks that the GPU runs at once."""
    defines = {"WARPS": _WARPS, "OUT_TILES": _OUT_TILES, "ROW_TILES": row_tiles}
    x_bytes = 2 * (8 * row_tiles) * (UNIT // 2 + 8) * 2  # two pieces of x, eight columns more a row
    sizes = {"few_nf4": (_THREADS, _TABLE_BYTES + x_bytes), "add_parts": (_THREADS, 0)}
    kernels = load_kernels("few_nf4.cu", device, defines, sizes)
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    return kernels, num_processors * kernels["few_nf4"].blocks_a_processor
