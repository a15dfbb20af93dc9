"""Products of few rows with NF4 weights on a GPU: finlora/model/few_nf4.cu, which reads each packed weight once.

Shapes: T rows, up to MAX_FEW_ROWS, K in, a multiple of UNIT (finlora/model/nf4.py), N out.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from finlora.model.cuda_source import CudaKernel, load_kernels
from finlora.model.nf4 import Nf4Rows

_WARPS, _OUT_TILES = 8, 2
_THREADS = 32 * _WARPS
_COLUMNS = 128  # of a slice
_WORD_COLUMNS = 256  # whose levels are a word
_LARGE_BYTES = 96 * 2**20
"""Of packed weights, from which on it pays to fetch whole lines into L2 (measured on an H100: 117 MB gain, 29 MB lose)."""
_TABLE_BYTES = 256 * 32 * 4 + 256 * 4  # pairs for each lane, and the levels' numbers


class _Kernels(NamedTuple):
    few_nf4: CudaKernel
    add_parts: CudaKernel
    num_slots: int
    """Blocks that the GPU runs at once."""
    num_slices: int


def few_nf4(x: Tensor, rows: Nf4Rows, residual: Tensor | None) -> Tensor:
    """Return x W^T (+ residual) in bfloat16, W unpacked from NF4 with double quantisation on the way.

    NF4's numbers are rounded to bfloat16 and the products of a group scaled in float32, where bitsandbytes rounds each scaled
    weight to bfloat16: both are as far from the stored weight. Parts of the sum are added in a fixed order.

    Shapes: x (T, K) and residual (T, N) bfloat16 -> (T, N).
    """
    (num_rows, num_in), num_out = x.shape, rows.means.shape[0]
    num_words = 4 if num_in % (4 * _WORD_COLUMNS) == 0 else 1
    row_tiles, is_large = max(8, 1 << (num_rows - 1).bit_length()) // 8, rows.packed.numel() >= _LARGE_BYTES
    kernels = _load(row_tiles, num_words, is_large, x.device)
    tile, step = 16 * _OUT_TILES * _WARPS // kernels.num_slices, _COLUMNS * kernels.num_slices
    num_tiles, steps_a_tile = -(-num_out // tile), num_in // step
    steps = num_tiles * steps_a_tile
    steps_a_block = -(-steps // kernels.num_slots)
    blocks = -(-steps // steps_a_block)
    num_parts = (blocks + num_tiles) * kernels.num_slices
    parts = torch.empty(num_parts * num_rows * tile, dtype=torch.float32, device=x.device)
    out = torch.empty(num_rows, num_out, dtype=torch.bfloat16, device=x.device)
    kernels.few_nf4.launch(
        (blocks, 1),
        *(x, *rows, parts),
        *(num_rows, num_out, num_in, steps, steps_a_block),
    )
    kernels.add_parts.launch(
        (-(-num_out // _THREADS), num_rows), parts, residual, out, num_rows, num_out, steps_a_tile, steps_a_block
    )
    return out


@functools.cache
def _load(row_tiles: int, num_words: int, is_large: bool, device: torch.device) -> _Kernels:
    """Compile the kernels for so many times 8 rows, words of levels in a load, and weights that are large or not."""
    # Slices side by side read whole lines of W; of more rows, their columns of x take more time than that saves.
    num_slices = 2 if row_tiles == 1 and not is_large else 1
    scale_bytes = _WARPS * 16 * _OUT_TILES * 8
    x_bytes = 2 * (8 * row_tiles) * (_COLUMNS * num_slices + 8) * 2  # two steps' columns, eight more a row
    defines = {
        "WARPS": _WARPS,
        "OUT_TILES": _OUT_TILES,
        "ROW_TILES": row_tiles,
        "SLICES": num_slices,
        "BLOCKS": 2 if row_tiles <= 2 else 1,  # more registers do not fit
        "WORDS": num_words,
        "FETCHES_LINES": int(is_large),
    }
    sizes = {"few_nf4": (_THREADS, _TABLE_BYTES + scale_bytes + x_bytes), "add_parts": (_THREADS, 0)}
    kernels = load_kernels("few_nf4.cu", device, defines, sizes)
    num_processors = torch.cuda.get_device_properties(device).multi_processor_count
    num_slots = num_processors * kernels["few_nf4"].blocks_a_processor
    return _Kernels(kernels["few_nf4"], kernels["add_parts"], num_slots, num_slices)
