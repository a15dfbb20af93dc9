"""Decode attention on a GPU: single queries, whose keys in the KV cache are split among parallel programs (Flash-Decoding).

FlashAttention would split them by the longest sequence that the cache can hold: a few long requests would then occupy only a part
of the GPU, and the pass would wait for the longest.

Shapes: Q queries, R rows of the cache, h heads, g key-value heads of width d, a power of 2, at least 16.

Imported only for CUDA tensors: the CPU build of torch has no Triton.
Source: Flash-Decoding, https://pytorch.org/blog/flash-decoding/
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from finlora.model.kernels.int8_decode import MIN_DOT, num_processors
from finlora.model.kernels.launch import can_overlap

_BLOCK = 64
"""Keys that a program reads per iteration."""
_PROGRAMS_A_PROCESSOR = 8
_MOST_PARTS = 64


@triton.jit
def _attend_part(
    query_ptr, key_ptr, value_ptr, starts_ptr, lengths_ptr, out_ptr, sum_ptr, scale, num_groups, num_parts,
    HEADS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    group, part, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths_ptr + row)
    size = tl.cdiv(tl.cdiv(length, num_parts), BLOCK) * BLOCK
    first, last = part * size, min(part * size + size, length)
    if first >= last:
        return
    heads, columns, indices = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, BLOCK)
    numbers = (row * num_groups + group) * HEADS + heads
    query = tl.load(query_ptr + numbers[:, None] * WIDTH + columns[None], mask=heads[:, None] < HEADS, other=0.0)
    start = (tl.load(starts_ptr + row).to(tl.int64) * num_groups + group) * WIDTH
    keys = key_ptr + start + indices[:, None] * num_groups * WIDTH + columns[None]
    values = value_ptr + start + indices[:, None] * num_groups * WIDTH + columns[None]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, WIDTH), tl.float32)
    for begin in range(first, last, BLOCK):
        is_seen = begin + indices < last
        offset = begin * num_groups * WIDTH
        key = tl.load(keys + offset, mask=is_seen[:, None], other=0.0)
        value = tl.load(values + offset, mask=is_seen[:, None], other=0.0)
        scores = tl.where(is_seen[None], tl.dot(query, tl.trans(key)) * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink, weights = tl.exp2(top - new_top), tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        out = tl.dot(weights.to(value.dtype), value, out * shrink[:, None])
        top = new_top
    targets = numbers * num_parts + part
    tl.store(sum_ptr + targets, top + tl.log2(total), mask=heads < HEADS)
    tl.store(out_ptr + targets[:, None] * WIDTH + columns[None], out / total[:, None], mask=heads[:, None] < HEADS)


@triton.jit
def _join_parts(
    parts_ptr, sums_ptr, lengths_ptr, out_ptr, log_sum_ptr, num_parts,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    row, head, num_rows, num_heads = tl.program_id(0), tl.program_id(1), tl.num_programs(0), tl.num_programs(1)
    length = tl.load(lengths_ptr + row)
    size = tl.cdiv(tl.cdiv(length, num_parts), BLOCK) * BLOCK
    parts, columns = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    is_there, number = parts * size < length, row * num_heads + head
    sources = number * num_parts + parts
    sums = tl.load(sums_ptr + sources, mask=is_there, other=float("-inf"))
    outs = tl.load(parts_ptr + sources[:, None] * WIDTH + columns[None], mask=is_there[:, None], other=0.0)
    top = tl.max(sums, 0)
    weights = tl.exp2(sums - top)
    total = tl.sum(weights, 0)
    out = tl.sum(outs * weights[:, None], 0) / total
    tl.store(out_ptr + number * WIDTH + columns, out.to(out_ptr.dtype.element_ty))
    tl.store(log_sum_ptr + head * num_rows + row, (top + tl.log2(total)) * 0.6931471805599453)


def attend_singly(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output (Q, h, d) of queries with one range of keys each, and the log-sum-exp of their scores (h, Q).

    Shapes: query (Q, h, d), key and value (R, g, d), all contiguous; starts and lengths, at least 1, (Q,) int32.
    """
    (num_queries, num_heads, width), num_groups = query.shape, key.shape[1]
    wanted = _PROGRAMS_A_PROCESSOR * num_processors(query.device) // (num_queries * num_groups)
    num_parts = max(1, min(_MOST_PARTS, wanted))
    outs = torch.empty(num_queries, num_heads, num_parts, width, dtype=torch.float32, device=query.device)
    sums = torch.empty(num_queries, num_heads, num_parts, dtype=torch.float32, device=query.device)
    out, log_sum = torch.empty_like(query), sums.new_empty(num_heads, num_queries)
    heads, overlaps = num_heads // num_groups, can_overlap(query.device)
    _attend_part[(num_groups, num_parts, num_queries)](
        query, key, value, starts, lengths, outs, sums, math.log2(math.e) * width**-0.5, num_groups, num_parts,
        HEADS=heads, ROWS=max(MIN_DOT, triton.next_power_of_2(heads)), WIDTH=width, BLOCK=_BLOCK,
        OVERLAPS=overlaps, num_warps=4, num_stages=2, launch_pdl=overlaps,
    )  # fmt: skip
    _join_parts[(num_queries, num_heads)](
        outs, sums, lengths, out, log_sum, num_parts,
        PARTS=triton.next_power_of_2(num_parts), WIDTH=width, BLOCK=_BLOCK,
        OVERLAPS=overlaps, num_warps=4, launch_pdl=overlaps,
    )  # fmt: skip
    return out, log_sum
