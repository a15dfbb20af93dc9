"""Products of few rows with NF4 weights in tiles on a GPU, by few_nf4.cu; unpacking of tiles, by unpack_nf4.cu.

Shapes: T rows, up to MAX_FEW_ROWS, K in, N out.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finlora.model.kernels.compile_cuda import CudaKernel, load_kernels
from finlora.model.kernels.int8_decode import num_processors
from finlora.model.kernels.launch import can_overlap
from finlora.model.kernels.nf4 import STRIP, UNIT, Nf4Tiles

_WARPS = 8
_THREADS = 32 * _WARPS
_HEIGHT = STRIP * _WARPS  # outputs of a step
_TABLE_BYTES = 256 * 32 * 4 + 256 * 4  # pairs for each lane, and the levels' values
_SCALE_BYTES = _HEIGHT * (UNIT // 64) * 4
_RESERVED_BYTES = 1024  # of shared memory, for each block


class _Kernels(NamedTuple):
    few_nf4: CudaKernel
    add_parts: CudaKernel
    add_gated_parts: CudaKernel
    num_slots: int
    """Blocks that the GPU runs at a time."""


def few_nf4(x: Tensor, weight: Nf4Tiles, residual: Tensor | None) -> Tensor:
    """Return x W^T (+ residual) in bfloat16, W unpacked from NF4 with double quantisation on the fly.

    NF4's values are rounded to bfloat16 and the products of a group scaled in float32; bitsandbytes rounds each scaled weight to
    bfloat16. Both errors are of the same size. Parts of the sum are added in a fixed order.

    Shapes: x (T, K) and residual (T, N) bfloat16 -> (T, N).
    """
    return _multiply(x, weight, residual, is_gated=False)


def few_gated_nf4(x: Tensor, weight: Nf4Tiles) -> Tensor:
    """Return silu(x G^T) * (x U^T) of a weight that joins G and U; both products are first rounded to bfloat16.

    Shapes: x (T, K) bfloat16, weight of N = 2 I outputs -> (T, I).
    """
    return _multiply(x, weight, None, is_gated=True)


def _multiply(x: Tensor, weight: Nf4Tiles, residual: Tensor | None, *, is_gated: bool) -> Tensor:
    (num_rows, num_in), num_out = x.shape, weight.means.shape[0]
    kernels, overlaps = _load(max(8, 1 << (num_rows - 1).bit_length()) // 8, x.device), can_overlap(x.device)
    num_heights, num_columns = -(-num_out // _HEIGHT), num_in // UNIT
    steps = num_heights * num_columns
    steps_a_block = -(-steps // kernels.num_slots)
    blocks = -(-steps // steps_a_block)
    parts = torch.empty((blocks + num_heights) * num_rows * _HEIGHT, dtype=torch.float32, device=x.device)
    kernels.few_nf4.launch(
        (blocks, 1),
        *(x, weight.tiles, weight.level_code, weight.level_scales, weight.means, weight.pairs, parts),
        *(num_rows, num_out, num_in, steps, steps_a_block),
        overlaps=overlaps,
    )
    num_targets = num_out // 2 if is_gated else num_out
    out = torch.empty(num_rows, num_targets, dtype=torch.bfloat16, device=x.device)
    grid, sizes = (-(-num_targets // _THREADS), num_rows), (num_rows, num_targets, num_columns, steps_a_block)
    if is_gated:
        kernels.add_gated_parts.launch(grid, parts, out, *sizes, overlaps=overlaps)
    else:
        kernels.add_parts.launch(grid, parts, residual, out, *sizes, overlaps=overlaps)
    return out


def unpack_tiles(weight: Nf4Tiles) -> Tensor:
    """Return the weight (N, K) in bfloat16, with the values that bitsandbytes unpacks."""
    (num_strips, num_columns, _), num_out = weight.tiles.shape, weight.means.shape[0]
    out = torch.empty(num_out, num_columns * UNIT, dtype=torch.bfloat16, device=weight.tiles.device)
    _load_unpacking(out.device).launch(
        (-(-num_columns // _WARPS), num_strips),
        *(weight.tiles, weight.level_code, weight.level_scales, weight.means, weight.numbers, out),
        *out.shape,
    )
    return out


@functools.cache
def _load(row_tiles: int, device: torch.device) -> _Kernels:
    """Compile the kernels for 8 * row_tiles rows."""
    num_blocks = 2 if row_tiles <= 2 else 1  # more, with fewer registers each, do not fit
    of_block, of_processor = _find_shared_bytes(device)
    # Whole steps of x where they fit. On an A6000 only halves fit from 9 rows on, with two blocks on a multiprocessor.
    needs = {x_parts: _count_shared_bytes(row_tiles, x_parts) for x_parts in (1, 2)}
    x_parts = 1 if needs[1] <= of_block and num_blocks * (needs[1] + _RESERVED_BYTES) <= of_processor else 2
    defines = {"WARPS": _WARPS, "ROW_TILES": row_tiles, "BLOCKS": num_blocks, "X_PARTS": x_parts}
    sizes = {"few_nf4": (_THREADS, needs[x_parts])}
    sizes |= dict.fromkeys(("add_parts", "add_gated_parts"), (_THREADS, 0))
    kernels = load_kernels(("ptx.cuh", "nf4_tiles.cuh", "few_nf4.cu"), device, defines, sizes)
    num_slots = num_processors(device) * kernels["few_nf4"].blocks_a_processor
    return _Kernels(kernels["few_nf4"], kernels["add_parts"], kernels["add_gated_parts"], num_slots)


def _count_shared_bytes(row_tiles: int, x_parts: int) -> int:
    """Return the shared memory of a block: the tables, and double-buffered columns of x with 16 bytes of padding a row."""
    return _TABLE_BYTES + _SCALE_BYTES + 2 * (8 * row_tiles) * (UNIT // x_parts + 8) * 2


def _find_shared_bytes(device: torch.device) -> tuple[int, int]:
    """Return the shared memory limits of a block and of a multiprocessor."""
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.shared_memory_per_multiprocessor


@functools.cache
def _load_unpacking(device: torch.device) -> CudaKernel:
    files, sizes = ("ptx.cuh", "nf4_tiles.cuh", "unpack_nf4.cu"), {"unpack_nf4": (_THREADS, 0)}
    return load_kernels(files, device, {"WARPS": _WARPS}, sizes)["unpack_nf4"]
