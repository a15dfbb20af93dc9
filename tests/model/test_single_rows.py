"""The way into the KV cache, and single queries to it, by the kernels of a GPU against plain torch in float32."""

from __future__ import annotations

import pytest
import torch

from finlora.model.cached_attention import Places, attend_cache, write_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernels need a GPU")]

HEADS = [(8, 2, 128), (4, 4, 16), (24, 1, 64), (32, 8, 128)]
"""(query heads, key-value heads, width)"""


def random_tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def place(starts, lengths):
    numbers = (range(len(starts) + 1), [*starts, 0], lengths)
    return Places(*(torch.tensor([*part], dtype=torch.int32) for part in numbers), 1)


@pytest.mark.parametrize(("num_heads", "num_groups", "width"), HEADS)
@pytest.mark.parametrize("lengths", [(1,), (5000,), (70, 1, 64, 300, 65), (257,) * 64])
def test_single_queries_see_the_keys_of_their_place(num_heads, num_groups, width, lengths):
    starts = [sum(lengths[:index]) + 8 * index for index in range(len(lengths))]
    query = random_tensor(len(lengths), num_heads, width)
    key, value = (random_tensor(starts[-1] + lengths[-1] + 8, num_groups, width, seed=seed) for seed in (1, 2))
    places = place(starts, lengths)
    wanted, wanted_sum = attend_cache(query.float().cpu(), key.float().cpu(), value.float().cpu(), places)
    for start, length in zip(starts, lengths, strict=True):
        key[start + length : start + length + 8] = torch.nan  # nobody's
        value[start + length : start + length + 8] = torch.nan
    on_gpu = Places(*(part.cuda() for part in places[:3]), 1)
    found, found_sum = attend_cache(query, key, value, on_gpu)
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(found_sum.cpu(), wanted_sum, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, attend_cache(query, key, value, on_gpu)[0])


@pytest.mark.parametrize(("num_heads", "num_groups", "width"), HEADS)
def test_rows_go_into_the_cache_rotated(num_heads, num_groups, width):
    qkv = random_tensor(37, num_heads + 2 * num_groups, width)
    cosine, sine = (random_tensor(37, width // 2, seed=seed).repeat(1, 2) for seed in (1, 2))
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:37]
    found = [torch.zeros(64, num_groups, width, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    wanted = [torch.zeros(64, num_groups, width, dtype=torch.bfloat16) for _ in range(2)]
    query = write_cache(qkv, cosine, sine, slots.cuda(), *found)
    wanted_query = write_cache(qkv.cpu(), cosine.cpu(), sine.cpu(), slots, *wanted)
    for one, other in zip((query, *found), (wanted_query, *wanted), strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=2**-7, atol=2**-7)
