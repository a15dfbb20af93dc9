"""Row counts of bfloat16 products on CPU, rounded up to few sizes.

oneDNN compiles its kernels for each row count anew, and torch keeps the last 1,024 of each thread. A micro-batch of 1,500 rows of
the demo's base takes 100 ms, and a row count not seen before adds 10 ms and 3 MiB. With few sizes both are paid once.

Padding rows repeat the last row, so that they change no other row, nor the outliers that LLM.int8 looks for in all rows. They
write to a cache row of their own, and their results are dropped. On a GPU, see finlora/stage/decode_graphs.py.

Source: https://github.com/intel/ideep, include/ideep/lru_cache.hpp (LRU_CACHE_CAPACITY)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TILE = 16
"""Rows of an AMX tile: a product computes whole tiles."""
_SIZES_PER_OCTAVE = 32


def compiles_by_rows(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes the products: on CPU in bfloat16. Those in float32 go to MKL, which compiles nothing."""
    return device.type == "cpu" and dtype == torch.bfloat16


def count_padding(num_rows: int) -> int:
    """Return the rows to add: up to 16 rows to the next power of two, above to a multiple of 16 or 1/32 of it (3 % at most)."""
    if num_rows <= _TILE:
        return (1 << max(0, num_rows - 1).bit_length()) - num_rows if num_rows else 0
    step = max(_TILE, (1 << (num_rows - 1).bit_length()) // (2 * _SIZES_PER_OCTAVE))
    return -num_rows % step


def repeat_last(x: Tensor, num_padding: int) -> Tensor:
    """Append the last row `num_padding` times. Shapes: (T, ...) -> (T + num_padding, ...)."""
    return torch.cat([x, x[-1:].expand(num_padding, *x.shape[1:])]) if num_padding else x


def pad_adapters(adapters: Sequence[tuple[str | None, int]], num_padding: int) -> list[tuple[str | None, int]]:
    """Give the padding rows to the adapter of the last row."""
    last = max(index for index, (_, num_rows) in enumerate(adapters) if num_rows)
    return [(name, num_rows + num_padding * (index == last)) for index, (name, num_rows) in enumerate(adapters)]
