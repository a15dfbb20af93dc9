"""FlashAttention on the processor, under the name and with the arguments that torch gives it on a GPU, which it checks.

Source: torch's aten/src/ATen/native/native_functions.yaml, _flash_attention_forward; flash_api.cpp checks the same.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from finlora.model.attention import score_keys, widen_heads


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
    return flash(query, key, value, cumulative_queries, starts, max_queries, max_keys, is_causal, seqused_k)


def emulate_flash(patch):
    """Make the engine take its way on a GPU with tensors of the processor, by a pytest.MonkeyPatch; heads narrower than 16."""
    from finlora.engine import stage
    from finlora.model import cached_attention

    patch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    for module in (stage, cached_attention):
        patch.setattr(module, "can_flash", lambda _query: True)
    patch.setattr(cached_attention, "_suits_triton", lambda _width: False)
