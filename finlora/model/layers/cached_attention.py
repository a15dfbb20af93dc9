"""Attention to a KV cache, forward only; keys and values are read where they are cached.

Shapes: Q query rows, R rows of the cache, h heads, g key-value heads (h a multiple of g), d head width. The last query of a
segment is aligned with its last key.

Source: FlashAttention-2, arXiv:2307.08691, as torch ships it (aten::_flash_attention_forward).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from finlora.model.kernels import launch
from finlora.model.layers.attention import can_flash, score_keys, widen_heads
from finlora.model.layers.elementwise import rotate


def write_cache(qkv: Tensor, cosine: Tensor, sine: Tensor, slots: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Rotate queries and keys, write keys and values to their cache rows, and return the queries (T, h, d).

    Shapes: qkv (T, h + 2 g, d), cosine and sine (T, d), slots (T,) int64, key and value (R, g, d).
    """
    if launch.takes_kernels(qkv) and _suits_triton(qkv.shape[-1]):
        from finlora.model.kernels.write_kv import write_rows

        return write_rows(qkv, cosine, sine, slots, key, value)
    first_value = qkv.shape[1] - key.shape[1]
    rotated = rotate(qkv[:, :first_value], cosine, sine)
    first_key = first_value - key.shape[1]
    key[slots], value[slots] = rotated[:, first_key:], qkv[:, first_value:]
    return rotated[:, :first_key]


class KeyRanges(NamedTuple):
    """Contiguous cache rows of each segment's keys, as FlashAttention's variable-length call takes them."""

    cumulative_queries: Tensor
    """(segments + 1,) int32."""
    starts: Tensor
    """(segments + 1,) int32: first key row of each segment; the last element is unused."""
    lengths: Tensor
    """(segments,) int32: key rows of each segment, its own queries' included."""
    max_queries: int
    """Upper bound of a segment's queries."""


def attend_cache(
    query: Tensor, key: Tensor, value: Tensor, ranges: KeyRanges, *, is_causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Return the segments' output (Q, h, d) and the log-sum-exp of their scores (h, Q).

    Args:
        key: (R, g, d), all rows of the cache, as is `value`.
        is_causal: False: each query sees all keys of its segment.
    """
    cumulative_queries, starts, lengths, max_queries = ranges
    if can_flash(query) and max_queries == 1 and _suits_triton(query.shape[-1]):
        from finlora.model.kernels.decode_attention import attend_singly

        return attend_singly(query, key, value, starts, lengths)
    if can_flash(query):
        output, log_sum, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            cumulative_queries,
            starts,
            max_queries,
            key.shape[0],
            0.0,
            is_causal,
            False,
            seqused_k=lengths,
        )
        return output, log_sum
    outputs, sums = [], []
    parts = zip(query.split(cumulative_queries.diff().tolist()), starts.tolist(), lengths.tolist(), strict=False)
    for queries, start, length in parts:
        scores = score_keys(queries, key[start : start + length], is_causal=is_causal)
        sums.append(scores.logsumexp(-1))
        values = widen_heads(value[start : start + length], queries)
        outputs.append((torch.softmax(scores, -1) @ values).transpose(0, 1).to(query.dtype))
    return torch.cat(outputs), torch.cat(sums, -1)


class Tails(NamedTuple):
    """C queries whose keys lie in two ranges of the cache."""

    rows: Tensor
    """(C,) indices among all queries. A query listed twice has the same keys both times."""
    first: KeyRanges
    """First range, one segment for neighbouring queries that share it; each query sees all of it."""
    starts: Tensor
    """(C,) first key row of the second range."""
    counts: Tensor
    """(C,) keys in the second range."""
    most: int
    """Upper bound of `counts`."""


def attend_tails(output: Tensor, query: Tensor, key: Tensor, value: Tensor, tails: Tails) -> Tensor:
    """Return the output (Q, h, d) with the rows of the tails replaced.

    Softmax over both ranges is the mean of the two outputs, weighted by the sums of their scores' exponentials. The second range
    has so few keys that they are gathered.
    """
    queries = query[tails.rows]
    first, first_sum = attend_cache(queries, key, value, tails.first, is_causal=False)
    offsets = torch.arange(tails.most, device=query.device)
    is_seen = offsets < tails.counts[:, None]
    slots = tails.starts[:, None] + torch.where(is_seen, offsets, 0)
    grouped = queries.float().unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("cgrd,ckgd->cgrk", grouped, key[slots].float()) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~is_seen[:, None, None], -torch.inf)
    second = torch.einsum("cgrk,ckgd->cgrd", torch.softmax(scores, -1), value[slots].float()).flatten(1, 2)
    share = torch.sigmoid(scores.logsumexp(-1).flatten(1) - first_sum.t())[..., None]
    return output.index_copy(0, tails.rows, torch.lerp(first.float(), second, share).to(output.dtype))


def _suits_triton(width: int) -> bool:
    """Return whether Triton's kernels support a head width: a power of two, at least 16 as `tl.dot` requires."""
    return width >= 16 and width & (width - 1) == 0
