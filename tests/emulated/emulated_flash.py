"""Emulation of FlashAttention on CPU under torch's name for it; its arguments are checked as on a GPU.

Source: torch's aten/src/ATen/native/native_functions.yaml, _flash_attention_forward; flash_api.cpp checks the same.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from finlora.model.layers.attention import score_keys, widen_heads


@torch.library.custom_op("finlora_tests::flash", mutates_args=())
def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cumulative_queries: Tensor,
    starts: Tensor,
    max_queries: int,
    max_keys: int,
    is_causal: bool,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    assert cumulative_queries.dtype == starts.dtype == torch.int32
    assert len(cumulative_queries) == len(starts)
    ends, firsts = cumulative_queries.tolist(), starts.tolist()
    if lengths is None:
        counts = [stop - start for start, stop in pairwise(firsts)]
    else:
        assert lengths.dtype == torch.int32
        counts = lengths.tolist()
    assert len(counts) == len(ends) - 1
    assert ends[0] == 0
    assert ends[-1] == len(query), "rows that belong to no segment are never computed"
    output = torch.full_like(query, torch.nan)
    log_sum = torch.full((query.shape[1], len(query)), torch.nan)
    for number, count in enumerate(counts):
        first, last = ends[number], ends[number + 1]
        assert 0 <= last - first <= max_queries, "no program is started for more queries"
        if first == last:
            continue
        assert 0 < count <= max_keys
        assert not is_causal or count >= last - first
        assert 0 <= firsts[number] <= len(key) - count, "keys outside of the cache"
        own = slice(firsts[number], firsts[number] + count)
        queries = query[first:last]
        scores = score_keys(queries, key[own], is_causal=is_causal)
        log_sum[:, first:last] = scores.logsumexp(-1)
        attended = torch.softmax(scores, -1) @ widen_heads(value[own], queries)
        output[first:last] = attended.transpose(0, 1).to(query.dtype)
    return output, log_sum


def forward(
    query, key, value, cumulative_queries, starts, max_queries, max_keys, dropout, is_causal, debug, *, seqused_k=None
):
    """As torch.ops.aten._flash_attention_forward is called."""
    assert dropout == 0.0
    assert not debug
    for tensor in (query, key, value):
        assert tensor.stride(-1) == 1, "the last dimension must be contiguous"
    assert query.shape[1] % key.shape[1] == 0
    assert query.shape[2] % 8 == 0
    assert query.shape[2] <= 256
    return flash(query, key, value, cumulative_queries, starts, max_queries, max_keys, is_causal, seqused_k)


def emulate_flash(patch, *, is_whole=True):
    """Replace FlashAttention by the emulation, with a pytest.MonkeyPatch.

    Args:
        is_whole: the engine also takes its GPU path with float32 tensors on the CPU, single queries included.
    """
    from finlora.model.layers import cached_attention
    from finlora.stage import stage

    patch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    patch.setattr(stage, "can_attend_alone", lambda _query: False)
    if is_whole:
        for module in (stage, cached_attention):
            patch.setattr(module, "can_flash", lambda _query: True)
        patch.setattr(cached_attention, "_suits_triton", lambda _width: False)


def emulate_attention(patch):
    """Make attention of packs take its Hopper path with CPU tensors, by a pytest.MonkeyPatch."""
    from finlora.model.layers import attention

    patch.setattr(attention.launch, "takes_kernels", lambda _tensor: True)
    patch.setattr(attention, "can_attend_alone", attention.can_flash)
    for name, function in (
        ("_flash_attention_forward", forward),
        ("_flash_attention_backward", backward),
        ("_cudnn_attention_forward", cudnn_forward),
        ("_cudnn_attention_backward", cudnn_backward),
    ):
        patch.setattr(torch.ops.aten, name, function)


def backward(
    grad, query, key, value, output, log_sum, cumulative_queries, cumulative_keys, max_queries, max_keys,
    dropout, is_causal, seed, offset,
):  # fmt: skip
    """As torch.ops.aten._flash_attention_backward is called."""
    assert (dropout, is_causal) == (0.0, True)
    tensors = (grad, query, key, value, output, log_sum, cumulative_queries, cumulative_keys)
    return flash_backward(*tensors, max_queries, max_keys)


@torch.library.custom_op("finlora_tests::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    cumulative_queries: Tensor,
    cumulative_keys: Tensor,
    max_queries: int,
    max_keys: int,
) -> tuple[Tensor, Tensor, Tensor]:
    ends, stops = cumulative_queries.tolist(), cumulative_keys.tolist()
    assert (ends[-1], stops[-1]) == (len(query), len(key))
    pieces = []
    for (first, last), (start, stop) in zip(pairwise(ends), pairwise(stops), strict=True):
        assert last - first <= max_queries
        assert stop - start <= max_keys
        own, keys = slice(first, last), slice(start, stop)
        parts = (grad[own], query[own], key[keys], value[keys], output[own], log_sum[:, own])
        pieces.append(_backward_of_one(*parts))
    first_part, second, third = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return first_part, second, third


def _backward_of_one(grad, query, key, value, output, log_sum):
    """Shapes: (q, h, d), (k, g, d), (h, q). Source: arXiv:2307.08691, section 2.2."""
    grads, outputs, queries = (tensor.float().transpose(0, 1) for tensor in (grad, output, query))
    keys, values = widen_heads(key, query), widen_heads(value, query)
    weights = torch.exp(score_keys(query, key) - log_sum[..., None])
    slopes = weights * (grads @ values.transpose(1, 2) - (grads * outputs).sum(-1, keepdim=True))
    slopes = slopes * query.shape[-1] ** -0.5
    wide = slopes @ keys, slopes.transpose(1, 2) @ queries, weights.transpose(1, 2) @ grads
    gradients = [wide[0].transpose(0, 1)]
    for part in wide[1:]:
        gradients.append(part.unflatten(0, (key.shape[1], -1)).sum(1).transpose(0, 1))
    return [own.to(query.dtype).contiguous() for own in gradients]


def cudnn_forward(
    query, key, value, bias, cumulative_queries, cumulative_keys, max_queries, max_keys,
    wants_sums, dropout, is_causal, debug,
):  # fmt: skip
    """As torch.ops.aten._cudnn_attention_forward is called. Shapes: (1, h, size, d), (1, g, size, d)."""
    assert bias is cumulative_queries is cumulative_keys is None
    assert (dropout, is_causal, debug) == (0.0, True, False)
    assert query.shape[2] == max_queries == key.shape[2] == value.shape[2] == max_keys, "causal from the first key on"
    assert max_queries % 256 == 0, "each other length costs a plan of 50 ms"
    rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    scores = score_keys(rows[0], rows[1])
    output = (torch.softmax(scores, -1) @ widen_heads(rows[2], rows[0])).to(query.dtype)
    return output[None], scores.logsumexp(-1)[None, ..., None] if wants_sums else None


def cudnn_backward(
    grad, query, key, value, output, log_sum, seed, offset, bias, cumulative_queries, cumulative_keys,
    max_queries, max_keys, dropout, is_causal,
):  # fmt: skip
    """As torch.ops.aten._cudnn_attention_backward is called."""
    assert bias is cumulative_queries is cumulative_keys is None
    assert (dropout, is_causal) == (0.0, True)
    assert query.shape[2] == max_queries == key.shape[2] == max_keys == log_sum.shape[2]
    rows = (tensor[0].transpose(0, 1) for tensor in (grad, query, key, value, output))
    gradients = _backward_of_one(*rows, log_sum[0, ..., 0])
    return tuple(own.transpose(0, 1)[None] for own in gradients)
