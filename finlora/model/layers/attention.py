"""Causal attention over packed segments, forward and backward: FlashAttention on a GPU in 16 bit, plain torch elsewhere.

On Hopper and newer, long segments of packs that are not captured go to cuDNN's attention one by one: forward and backward pass
take 55 % of FlashAttention-2's time (4,608 rows, H200). cuDNN plans each new length for about 50 ms, so lengths are rounded up:
the causal mask hides the rows after a segment from its queries.

Shapes: Q query rows, S key rows, h heads, g key-value heads (h a multiple of g), d head width. Segment i of `Segments` holds
its own rows of both; its last query is aligned with its last key, and query j sees keys up to j + (keys - queries).

Source: FlashAttention-2, arXiv:2307.08691, as torch ships it (aten::_flash_attention_forward).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from finlora.data.pack_size import MAX_CAPTURED_ROWS
from finlora.data.packing import Segments
from finlora.model.kernels import launch

_LENGTH_STEP = 256
LONG = 1024
"""Rows of a segment from which the cost of a launch of its own is negligible."""


def can_flash(query: Tensor) -> bool:
    """Return whether FlashAttention supports these tensors; otherwise each segment is a plain product."""
    is_half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    return launch.takes_kernels(query) and is_half and width <= 256 and width % 8 == 0


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Return the output (Q, h, d) and, for the backward pass, the log-sum-exp of the scores.

    Shapes: query (Q, h, d), key and value (S, g, d).
    """
    if _suits_cudnn(query, segments):
        return _attend_each(query, key, value, segments)
    if can_flash(query):
        output, log_sum, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            segments.cumulative_queries,
            segments.cumulative_keys,
            segments.max_queries,
            segments.max_keys,
            0.0,
            True,
            False,
        )
        return output, log_sum
    outputs, sums = [], []
    for queries, keys, values in _split(query, key, value, segments):
        scores = score_keys(queries, keys)
        sums.append(scores.logsumexp(-1))
        outputs.append(_heads_out(torch.softmax(scores, -1) @ widen_heads(values, queries)).to(query.dtype))
    return torch.cat(outputs), torch.cat(sums, -1)


def attend_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value from the output's.

    With P = exp(scores - log_sum) and o the output: dV = P^T do, dS = P * (do V^T - rowsum(do * o)), dQ = dS K / sqrt(d),
    dK = dS^T Q / sqrt(d); the gradients of a key-value head are summed over its query heads.
    """
    if _suits_cudnn(query, segments):
        return _attend_each_backward(grad, query, key, value, output, log_sum, segments)
    if can_flash(query):
        offsets = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout, which is off
        gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            grad,
            query,
            key,
            value,
            output,
            log_sum,
            segments.cumulative_queries,
            segments.cumulative_keys,
            segments.max_queries,
            segments.max_keys,
            0.0,
            True,
            offsets,
            offsets[:0],
        )
        return gradients
    num_groups = key.shape[1]
    scale = query.shape[-1] ** -0.5
    parts = zip(
        _split(query, key, value, segments),
        grad.split(segments.query_lengths),
        output.split(segments.query_lengths),
        log_sum.split(segments.query_lengths, -1),
        strict=True,
    )
    pieces = []
    for (queries, keys, values), grads, outputs, sums in parts:
        probabilities = torch.exp(score_keys(queries, keys) - sums[..., None])
        wide, expanded = grads.float().transpose(0, 1), widen_heads(values, queries)
        row_sums = (wide * outputs.float().transpose(0, 1)).sum(-1, keepdim=True)
        grad_scores = probabilities * (wide @ expanded.transpose(1, 2) - row_sums) * scale
        grad_query = _heads_out(grad_scores @ widen_heads(keys, queries))
        grad_key = _sum_groups(grad_scores.transpose(1, 2) @ queries.float().transpose(0, 1), num_groups)
        grad_value = _sum_groups(probabilities.transpose(1, 2) @ wide, num_groups)
        pieces.append((grad_query, grad_key, grad_value))
    first, second, third = (torch.cat(part).to(query.dtype) for part in zip(*pieces, strict=True))
    return first, second, third


def can_attend_alone(query: Tensor) -> bool:
    """Return whether `attend_alone` supports a tensor's device, type and width and is faster there: on Hopper and newer."""
    return can_flash(query) and query.shape[-1] <= 128 and torch.cuda.get_device_capability(query.device) >= (9, 0)


def attend_alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the causal attention (Q, h, d) of one segment, its last query aligned with its last key; key and value (S, g, d)."""
    num_queries, num_keys = query.shape[0], key.shape[0]
    first, size = num_keys - num_queries, _round_up(num_keys)
    # cuDNN aligns the mask with the first key and row, so queries move to their position; outputs of other rows are dropped.
    square = query if num_queries == size else query.new_empty(size, *query.shape[1:])
    if square is not query:
        square[first:num_keys] = query
    parts = (_cut(tensor, 0, size) for tensor in (square, key, value))
    output: Tensor = torch.ops.aten._cudnn_attention_forward(
        *parts, None, None, None, size, size, False, 0.0, True, False
    )[0]
    return output[0].transpose(0, 1)[first:num_keys]


def _suits_cudnn(query: Tensor, segments: Segments) -> bool:
    return (
        MAX_CAPTURED_ROWS < query.shape[0] >= LONG * len(segments.query_lengths)
        and segments.query_lengths == segments.key_lengths
        and can_attend_alone(query)
    )


def _attend_each(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """As `attend`; the log-sum-exps (h, rounded length) of the segments are concatenated flat."""
    outputs, sums = [], []
    for start, length, size in _rounded(segments):
        parts = (_cut(tensor, start, size) for tensor in (query, key, value))
        output, log_sum, *_ = torch.ops.aten._cudnn_attention_forward(
            *parts, None, None, None, size, size, True, 0.0, True, False
        )
        outputs.append(output[0].transpose(0, 1)[:length])
        sums.append(log_sum.flatten())
    return torch.cat(outputs), torch.cat(sums)


def _attend_each_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, log_sum: Tensor, segments: Segments
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_backward`. Padding rows have zero output gradient, so they contribute nothing."""
    num_heads, pieces, before = query.shape[1], [], 0
    unused = torch.zeros((), dtype=torch.int64, device=query.device)  # seed and offset of dropout, which is off
    for start, length, size in _rounded(segments):
        own = torch.nn.functional.pad(grad[start : start + length], (0, 0, 0, 0, 0, size - length))
        parts = [_cut(tensor, start, size) for tensor in (query, key, value, output)]
        sums = log_sum[before : before + num_heads * size].view(1, num_heads, size, 1)
        before += num_heads * size
        gradients = torch.ops.aten._cudnn_attention_backward(
            *(_cut(own, 0, size), *parts, sums, unused, unused, None, None, None, size, size, 0.0, True)
        )
        pieces.append([part[0].transpose(0, 1)[:length] for part in gradients])
    first, second, third = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return first, second, third


def _rounded(segments: Segments) -> Iterator[tuple[int, int, int]]:
    """Yield each segment's first row, its length, and the length rounded up."""
    start = 0
    for length in segments.query_lengths:
        yield start, length, _round_up(length)
        start += length


def _round_up(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _cut(tensor: Tensor, start: int, size: int) -> Tensor:
    """Return `size` rows from `start`, zero-padded past the end. Shapes: (Q, h, d) -> (1, h, size, d)."""
    rows = tensor[start : start + size]
    if missing := size - rows.shape[0]:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, missing))
    return rows.transpose(0, 1)[None]


def _split(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    return zip(
        query.split(segments.query_lengths),
        key.split(segments.key_lengths),
        value.split(segments.key_lengths),
        strict=True,
    )


def score_keys(queries: Tensor, keys: Tensor, *, is_causal: bool = True) -> Tensor:
    """Masked scores of one segment in float32. Shapes: (q, h, d), (k, g, d) -> (h, q, k)."""
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    wide, width = queries.float().transpose(0, 1), queries.shape[-1]
    scores: Tensor = wide @ widen_heads(keys, queries).transpose(1, 2) * width**-0.5
    if not is_causal:
        return scores
    visible = torch.ones(num_queries, num_keys, dtype=torch.bool, device=queries.device).tril(num_keys - num_queries)
    return scores.masked_fill(~visible, -torch.inf)


def widen_heads(tensor: Tensor, queries: Tensor) -> Tensor:
    """Repeat key-value heads for their query heads. Shapes: (k, g, d) -> (h, k, d), float32."""
    return tensor.float().transpose(0, 1).repeat_interleave(queries.shape[1] // tensor.shape[1], 0)


def _heads_out(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def _sum_groups(tensor: Tensor, num_groups: int) -> Tensor:
    """Shapes: (h, k, d) -> (k, g, d)."""
    summed: Tensor = tensor.view(num_groups, -1, *tensor.shape[1:]).sum(1)
    return summed.transpose(0, 1)
