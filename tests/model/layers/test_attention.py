"""Packed attention against torch's own on each segment, and its backward pass against autograd."""

from __future__ import annotations

import pytest
import torch
from emulated_flash import emulate_attention

from finlora.data.encode import Encoded
from finlora.data.pack_size import MAX_CAPTURED_ROWS, pad_pack
from finlora.data.packing import pack_examples
from finlora.model.layers import attention
from finlora.model.layers.attention import attend, attend_backward

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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", [(4200,), (2304, 2600), (3001, 1500, 1100)])
def test_long_segments_equal_flash_attention_and_float32(lengths, monkeypatch):
    """cuDNN's attention on Hopper and FlashAttention: both equally close to torch's own in float32."""
    items = [Encoded(tuple(range(n, n + length)), (1, 2)) for n, length in enumerate(lengths)]
    pack = pad_pack(pack_examples(items, share_prefix=True))
    segments = pack.to(torch.device("cuda")).segments
    num_rows = len(pack.input_ids)
    assert num_rows > MAX_CAPTURED_ROWS
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(heads):
        return torch.randn(num_rows, heads, 128, generator=generator, device="cuda", dtype=torch.bfloat16)

    # As in the layer: heads side by side, so a head's rows are not contiguous.
    query, key, value = draw(16).split([8, 4, 4], 1)
    grad = draw(8)
    leaves = [tensor.float().requires_grad_() for tensor in (query, key, value)]
    expected = []
    for part in zip(*(leaf.split(segments.query_lengths) for leaf in leaves), strict=True):
        heads = (tensor.transpose(0, 1)[None] for tensor in part)
        out = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        expected.append(out[0].transpose(0, 1))
    torch.cat(expected).backward(grad.float())
    truth = [torch.cat(expected).detach(), *(leaf.grad for leaf in leaves)]
    errors = {}
    for way in ("long", "flash"):
        if way == "flash":
            monkeypatch.setattr(attention, "LONG", num_rows + 1)
        elif torch.cuda.get_device_capability() >= (9, 0):
            assert attention._suits_cudnn(query, segments)
        output, log_sum = attend(query, key, value, segments)
        found = [output, *attend_backward(grad, query, key, value, output, log_sum, segments)]
        errors[way] = [float((own - right).norm() / right.norm()) for own, right in zip(found, truth, strict=True)]
    assert all(error < 0.01 for way in errors.values() for error in way), errors
    assert all(own < 1.2 * flash for own, flash in zip(errors["long"], errors["flash"], strict=True)), errors


@pytest.mark.parametrize("way", ["flash", "cudnn"])
@pytest.mark.parametrize("lengths", [(40,), (17, 300, 5), (256, 257)])
def test_attention_of_a_gpu_equals_the_plain_one(monkeypatch, way, lengths):
    """Arguments of FlashAttention and cuDNN, and use of their results; both are emulated."""
    items = [Encoded(tuple(range(n, n + length)), (1, 2)) for n, length in enumerate(lengths)]
    segments = pack_examples(items, share_prefix=False).segments
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(sum(segments.query_lengths), heads, 16, generator=generator).bfloat16() for heads in (6, 2, 2, 6)
    )
    plain, sums = attend(query, key, value, segments)
    expected = [plain, *attend_backward(grad, query, key, value, plain, sums, segments)]
    emulate_attention(monkeypatch)
    if way == "cudnn":
        monkeypatch.setattr(attention, "LONG", 1)
        monkeypatch.setattr(attention, "MAX_CAPTURED_ROWS", 1)
        assert attention._suits_cudnn(query, segments)
    output, log_sum = attend(query, key, value, segments)
    found = [output, *attend_backward(grad, query, key, value, output, log_sum, segments)]
    for own, right in zip(found, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=2**-7, atol=2**-7 * float(right.abs().max()))


@pytest.mark.parametrize("num_cached", [0, 1, 61, 300])
def test_a_long_segment_goes_alone_after_its_cached_rows(monkeypatch, num_cached):
    emulate_attention(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(count, heads, 16, generator=generator).bfloat16()
                         for count, heads in ((270, 6), (270 + num_cached, 2), (270 + num_cached, 2)))  # fmt: skip
    scores = attention.score_keys(query, key)
    expected = (torch.softmax(scores, -1) @ attention.widen_heads(value, query)).transpose(0, 1).bfloat16()
    found = attention.attend_alone(query, key, value)
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize(
    ("width", "dtype", "flashes"),
    [
        (64, torch.bfloat16, True),
        (8, torch.float16, True),
        (256, torch.bfloat16, True),
        (12, torch.bfloat16, False),
        (264, torch.bfloat16, False),
        (64, torch.float32, False),
    ],
)
def test_flash_attention_gets_widths_and_types_that_it_takes(monkeypatch, width, dtype, flashes):
    """flash_api.cpp: 16 bit, and heads of a multiple of 8 up to 256."""
    monkeypatch.setattr(attention.launch, "takes_kernels", lambda _tensor: True)
    assert attention.can_flash(torch.zeros(1, 1, width, dtype=dtype)) == flashes
