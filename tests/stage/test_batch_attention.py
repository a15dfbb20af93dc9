"""Attention of a micro-batch: the same results for wanted rows only, for long segments alone and for all rows together."""

from __future__ import annotations

import random

import pytest
import torch

from finlora.engine.micro_batch import MicroBatch, Segment
from finlora.engine.request import Request
from finlora.inference.open_base import choose_batch_rows, choose_in_flight
from finlora.model.layers.attention import can_attend_alone
from finlora.stage import batch_attention
from finlora.stage.batch_attention import make_attention, narrow

CPU = torch.device("cpu")
SEGMENTS = [
    (8, [(20, 8)]),
    (3, [(0, 9)]),
    (1, [(40, 5)]),
    (6, [(28, 6)]),
    (5, [(10, 5)]),
    (8, [(0, 10)]),
    (8, [(0, 11)]),
]
"""(rows, keys) of segments: a whole prompt, one after a cached prefix, one token, two adjacent ones, two with longer prefixes."""


def make_batch(layout, adapters=()):
    batch = MicroBatch(0, adapters=list(adapters))
    for num_rows, keys in layout:
        batch.add([0] * num_rows, 0, [0] * num_rows, keys)
    return batch


def random_tensors(num_rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(num_rows, 4, 8, generator=generator)
    return query, *(torch.randn(64, 2, 8, generator=generator) for _ in range(2))


def test_wanted_rows_attend_to_keys_up_to_their_own():
    batch = make_batch([(4, [(20, 3), (50, 4)]), (2, [(0, 2)]), (1, [(7, 9)])], [(None, 4), ("a", 3)])
    segments, adapters = narrow(batch, [0, 1, 3, 5, 6])
    assert [segment.num_rows for segment in segments] == [1] * 5
    assert [segment.keys for segment in segments] == [
        ((20, 3), (50, 1)),
        ((20, 3), (50, 2)),
        ((20, 3), (50, 4)),
        ((0, 2),),
        ((7, 9),),
    ]
    assert adapters == [(None, 3), ("a", 2)]
    assert narrow(batch, []) == ([], [(None, 0), ("a", 0)])


@pytest.mark.parametrize("seed", range(5))
def test_wanted_rows_have_the_same_attention_as_among_all_rows(seed):
    rng = random.Random(seed)
    layout = [(8, [(20, 3), (50, 7)]), *SEGMENTS]
    total = sum(num_rows for num_rows, _ in layout)
    wanted = sorted(rng.sample(range(total), rng.randint(1, total)))
    query, keys, values = random_tensors(total, seed)
    batch = make_batch(layout)
    segments, _ = narrow(batch, wanted)
    everything = make_attention(batch.segments, CPU)(query, keys, values)
    narrowed = make_attention(segments, CPU)(query[wanted], keys, values)
    torch.testing.assert_close(narrowed, everything[wanted], rtol=1e-6, atol=1e-6)


def test_long_segments_run_alone_and_the_others_together(monkeypatch):
    query, keys, values = random_tensors(sum(num_rows for num_rows, _ in SEGMENTS))
    batch = make_batch(SEGMENTS)
    expected = make_attention(batch.segments, CPU)(query, keys, values)
    alone = []

    def wide_heads(tensor):
        return tensor.repeat_interleave(2, 1).transpose(0, 1)

    def attend_alone(query, key, value):
        alone.append((len(query), len(key)))
        visible = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
        wide = [query.transpose(0, 1), wide_heads(key), wide_heads(value)]
        out = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=visible)
        return out.transpose(0, 1)

    monkeypatch.setattr(batch_attention, "LONG", 5)
    monkeypatch.setattr(batch_attention, "attend_alone", attend_alone)
    attend_keys = make_attention(batch.segments, CPU, flashes=True)
    torch.testing.assert_close(attend_keys(query, keys, values), expected, rtol=1e-5, atol=1e-6)
    assert not alone
    attend_keys = make_attention(batch.segments, CPU, flashes=True, goes_alone=True)
    torch.testing.assert_close(attend_keys(query, keys, values), expected, rtol=1e-5, atol=1e-6)
    assert alone == [(8, 8), (6, 6), (5, 5), (8, 10)]


def test_rows_with_keys_in_two_ranges_attend_to_all_of_them(monkeypatch):
    """Against softmax over the same keys in contiguous memory: for all rows, and for wanted rows only."""
    layout = [(6, [(4, 9)]), (2, [(4, 9), (13, 2)]), (1, [(4, 9), (15, 1)]), (3, [(4, 9), (16, 3)]), *SEGMENTS]
    total = sum(num_rows for num_rows, _ in layout)
    query, keys, values = random_tensors(total)
    expected, row = [], 0
    for num_rows, parts in layout:
        own = [index for start, count in parts for index in range(start, start + count)]
        for index in range(num_rows):
            seen = own[: len(own) - num_rows + index + 1]
            wide = [tensor[seen].repeat_interleave(2, 1) for tensor in (keys, values)]
            scores = torch.einsum("hd,khd->hk", query[row], wide[0]) * 8**-0.5
            expected.append(torch.einsum("hk,khd->hd", torch.softmax(scores, -1), wide[1]))
            row += 1
    expected, batch = torch.stack(expected), make_batch(layout)
    wanted = [2, 6, 7, 8, 10, 11, 15]
    segments, _ = narrow(batch, wanted)
    for flashes in (False, True):
        found = make_attention(batch.segments, CPU, flashes=flashes)(query, keys, values)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found = make_attention(segments, CPU, flashes=flashes)(query[wanted], keys, values)
        torch.testing.assert_close(found, expected[wanted], rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_with_keys_in_two_ranges_on_a_gpu():
    layout = [
        (600, [(4, 900)]),
        (2, [(4, 900), (904, 2)]),
        (1, [(4, 900), (906, 1)]),
        (3, [(4, 900), (907, 3)]),
        (1, [(950, 9)]),
    ]
    total = sum(num_rows for num_rows, _ in layout)
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(count, heads, 128, generator=generator) for count, heads in ((total, 8), (1000, 2), (1000, 2))
    )
    segments = make_batch(layout).segments
    expected = make_attention(segments, CPU)(query, keys, values)
    tensors = (tensor.to("cuda", torch.bfloat16) for tensor in (query, keys, values))
    found = make_attention(segments, torch.device("cuda"), flashes=True)(*tensors)
    torch.testing.assert_close(found.float().cpu(), expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("wanted", [[], [3], [0, 10, 11, 20]])
def test_wanted_rows_only_give_the_same_states_and_cache_as_all_rows(make_core, wanted):
    states, caches = [], []
    for rows in (None, wanted):
        core = make_core(1, cache_rows=256)
        for name, adapter in (("a", None), ("b", "few"), ("c", "all")):
            core.submit(Request(id=name, prompt_ids=tuple(range(3, 12)), adapter=adapter))
        batch = core.scheduler.next_batch()
        stage = core.executor.stages[0]
        states.append(stage.forward(batch, None, rows))
        caches.append(stage.cache.clone())
    atol = 1e-5 * float(states[0].abs().max())
    torch.testing.assert_close(states[1], states[0][wanted], rtol=1e-5, atol=atol)
    assert torch.equal(*caches)


@pytest.mark.parametrize(
    ("num_stages", "gpus_per_stage", "expected"),
    [
        (1, None, 1),
        (4, None, 4),
        (4, 1.0, 4),
        (4, 0.25, 1),
        (4, 0.5, 2),
        (3, 1 / 3, 1),
        (4, 0.3, 2),
        (2, 0.9, 2),
        (4, 2.0, 4),
    ],
)
def test_one_micro_batch_per_gpu_is_in_flight(num_stages, gpus_per_stage, expected):
    device = "cpu" if gpus_per_stage is None else "cuda"
    assert choose_in_flight(num_stages, device, gpus_per_stage or 1.0) == expected


def test_single_micro_batch_in_flight_is_larger():
    assert choose_batch_rows(1) == 6 * choose_batch_rows(2) == 6 * choose_batch_rows(4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_cached", [0, 1, 61, 500])
def test_long_segment_after_a_cached_prefix_equals_flash_attention(num_cached):
    rows, device = 2100, torch.device("cuda")
    if not can_attend_alone(torch.empty(1, 1, 128, dtype=torch.bfloat16, device=device)):
        pytest.skip("needs a Hopper")
    generator = torch.Generator("cuda").manual_seed(0)
    query, keys, values = (
        torch.randn(count, heads, 128, generator=generator, device=device, dtype=torch.bfloat16)
        for count, heads in ((rows, 8), (4000, 2), (4000, 2))
    )
    segments = [Segment(rows, ((300, num_cached + rows),))]
    alone, flash = (
        make_attention(segments, device, flashes=True, goes_alone=way)(query, keys, values) for way in (True, False)
    )
    torch.testing.assert_close(alone, flash, rtol=0, atol=0.01)
