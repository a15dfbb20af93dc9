"""Packed attention against torch's own on each segment, and its backward pass against autograd."""

from __future__ import annotations

import pytest
import torch

from finlora.data.encode import Encoded
from finlora.data.packing import pack_examples
from finlora.model.attention import attend, attend_backward

ITEMS = [Encoded(tuple(range(9)) + tuple(range(20, 24 + n)), tuple(range(1 + n % 3))) for n in range(4)]


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("part", ["segments", "last_segments"])
def test_attention_and_its_gradient_equal_torch(share_prefix, part):
    segments = getattr(pack_examples(ITEMS, share_prefix=share_prefix), part)
    generator = torch.Generator().manual_seed(0)
    num_queries, num_keys = sum(segments.query_lengths), sum(segments.key_lengths)
    query = torch.randn(num_queries, 4, 8, generator=generator).requires_grad_()
    key, value = (torch.randn(num_keys, 2, 8, generator=generator).requires_grad_() for _ in range(2))
    grad = torch.randn(num_queries, 4, 8, generator=generator)
    parts = zip(
        query.split(segments.query_lengths),
        key.split(segments.key_lengths),
        value.split(segments.key_lengths),
        strict=True,
    )
    expected = []
    for q, k, v in parts:
        visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        out = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), attn_mask=visible, enable_gqa=True
        )
        expected.append(out.transpose(0, 1))
    torch.cat(expected).backward(grad)
    with torch.no_grad():
        output, log_sum = attend(query, key, value, segments)
        gradients = attend_backward(grad, query, key, value, output, log_sum, segments)
    torch.testing.assert_close(output, torch.cat(expected).detach(), rtol=1e-5, atol=1e-6)
    for own, leaf in zip(gradients, (query, key, value), strict=True):
        torch.testing.assert_close(own, leaf.grad, rtol=1e-5, atol=1e-5)
