"""GPU kernels for writes to the KV cache, decode attention and norms of few rows, against plain torch in float32.

Without a GPU the kernels run by an emulation of Triton.
"""

from __future__ import annotations

import pytest
import torch
from emulated_triton import emulated_kernels

from finlora.model.layers.cached_attention import KeyRanges, attend_cache, write_cache
from finlora.model.layers.elementwise import normalise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

if DEVICE == "cuda":
    from finlora.model.kernels.rms_norm import norm_rows
else:
    with emulated_kernels() as kernels:
        norm_rows = kernels.rms_norm.norm_rows

HEADS = [(8, 2, 128), (4, 4, 16), (24, 1, 64), (32, 8, 128), (9, 3, 64)]
"""(query heads, key-value heads, width); the last are SmolLM2-135M's."""
LENGTHS = [(1,), (5000,), (70, 1, 64, 300, 65), (257,) * 64]
if DEVICE == "cpu":  # one program after the other
    LENGTHS = [(1,), (1500,), (70, 1, 64, 300, 65), (130,) * 12]


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, torch.bfloat16)


def attend(query, key, value, ranges):
    """Call attention as the engine does on a GPU."""
    if DEVICE == "cuda":
        return attend_cache(query, key, value, ranges)
    return kernels.decode_attention.attend_singly(query, key, value, ranges.starts, ranges.lengths)


def write(*tensors):
    return write_cache(*tensors) if DEVICE == "cuda" else kernels.write_kv.write_rows(*tensors)


def lay_out(starts, lengths):
    numbers = (range(len(starts) + 1), [*starts, 0], lengths)
    return KeyRanges(*(torch.tensor([*part], dtype=torch.int32) for part in numbers), 1)


@pytest.mark.parametrize(("num_heads", "num_groups", "width"), HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_single_queries_see_the_keys_of_their_range(num_heads, num_groups, width, lengths):
    starts = [sum(lengths[:index]) + 8 * index for index in range(len(lengths))]
    query = random_tensor(len(lengths), num_heads, width)
    key, value = (random_tensor(starts[-1] + lengths[-1] + 8, num_groups, width, seed=seed) for seed in (1, 2))
    ranges = lay_out(starts, lengths)
    wanted, wanted_sum = attend_cache(query.float().cpu(), key.float().cpu(), value.float().cpu(), ranges)
    for start, length in zip(starts, lengths, strict=True):
        key[start + length : start + length + 8] = torch.nan  # rows of no request
        value[start + length : start + length + 8] = torch.nan
    on_device = KeyRanges(*(part.to(DEVICE) for part in ranges[:3]), 1)
    found, found_sum = attend(query, key, value, on_device)
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found_sum.cpu(), wanted_sum, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, attend(query, key, value, on_device)[0])


@pytest.mark.parametrize(("num_heads", "num_groups", "width"), HEADS)
def test_rows_go_into_the_cache_rotated(num_heads, num_groups, width):
    qkv = random_tensor(37, num_heads + 2 * num_groups, width)
    cosine, sine = (random_tensor(37, width // 2, seed=seed).repeat(1, 2) for seed in (1, 2))
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:37]
    found = [torch.zeros(64, num_groups, width, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    wanted = [torch.zeros(64, num_groups, width, dtype=torch.bfloat16) for _ in range(2)]
    query = write(qkv, cosine, sine, slots.to(DEVICE), *found)
    wanted_query = write_cache(qkv.cpu(), cosine.cpu(), sine.cpu(), slots, *wanted)
    for one, other in zip((query, *found), (wanted_query, *wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (16, 576), (3, 5000)])
def test_norms_of_few_rows_are_those_of_many(num_rows, width, dtype):
    x, weight = random_tensor(num_rows, width).to(dtype) * 3, random_tensor(width, seed=1).to(dtype)
    eps = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    wanted = normalise(x.cpu(), weight.cpu(), 1e-5)
    torch.testing.assert_close(norm_rows(x, weight, 1e-5).cpu(), wanted, rtol=eps, atol=1e-6)
