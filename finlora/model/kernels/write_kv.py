"""Write to the KV cache on a GPU: one kernel rotates queries and keys and writes keys and values to their cache rows.

Imported only for CUDA tensors: the CPU build of torch has no Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from finlora.model.kernels.launch import can_overlap

_HEADS = 16
"""Heads per program."""


@triton.jit
def _write(
    qkv_ptr, cosine_ptr, sine_ptr, slots_ptr, query_ptr, key_ptr, value_ptr, num_heads, num_groups,
    HALF: tl.constexpr, HEADS: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    sources = qkv_ptr + ((row * (num_heads + 2 * num_groups) + head) * 2 * HALF)[:, None] + columns[None]
    is_there = (head < num_heads + 2 * num_groups)[:, None]
    first, second = tl.load(sources, mask=is_there), tl.load(sources + HALF, mask=is_there)
    cosine = tl.load(cosine_ptr + row * 2 * HALF + columns).to(tl.float32)[None]
    sine = tl.load(sine_ptr + row * 2 * HALF + columns).to(tl.float32)[None]
    wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
    turned_first = (wide_first * cosine - wide_second * sine).to(first.dtype)
    turned_second = (wide_second * cosine + wide_first * sine).to(first.dtype)
    is_query = (head < num_heads)[:, None]
    queries = query_ptr + ((row * num_heads + head) * 2 * HALF)[:, None] + columns[None]
    tl.store(queries, turned_first, mask=is_query)
    tl.store(queries + HALF, turned_second, mask=is_query)
    slot = tl.load(slots_ptr + row) * num_groups
    group = head - num_heads
    is_key = ((group >= 0) & (group < num_groups))[:, None]
    keys = key_ptr + ((slot + group) * 2 * HALF)[:, None] + columns[None]
    tl.store(keys, turned_first, mask=is_key)
    tl.store(keys + HALF, turned_second, mask=is_key)
    is_value = (group >= num_groups)[:, None] & is_there
    values = value_ptr + ((slot + group - num_groups) * 2 * HALF)[:, None] + columns[None]
    tl.store(values, first, mask=is_value)
    tl.store(values + HALF, second, mask=is_value)


def write_rows(qkv: Tensor, cosine: Tensor, sine: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As `finlora.model.layers.cached_attention.write_cache`, for contiguous tensors and d a power of 2."""
    num_rows, num_all, width = qkv.shape
    num_groups = key.shape[1]
    overlaps = can_overlap(qkv.device)
    query = torch.empty(num_rows, num_all - 2 * num_groups, width, dtype=qkv.dtype, device=qkv.device)
    _write[(num_rows, triton.cdiv(num_all, _HEADS))](
        qkv, cosine, sine, slots, query, key, value, num_all - 2 * num_groups, num_groups,
        HALF=width // 2, HEADS=_HEADS, OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return query
