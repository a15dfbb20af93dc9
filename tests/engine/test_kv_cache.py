"""Extents of the KV cache: best fit, merging of free runs, prefixes found and dropped."""

from __future__ import annotations

import random

import pytest

from finlora.engine import kv_cache
from finlora.engine.kv_cache import BLOCK, ExtentPool, common_length


def take(pool, ids, num_rows=None, adapter=None, spare=None):
    extent = pool.allocate(adapter, ids, num_rows or len(ids), spare)
    if extent is not None:
        extent.num_ready = len(ids)
    return extent


def test_extents_never_overlap_and_all_rows_come_back():
    rng = random.Random(0)
    pool = ExtentPool(1000, keeps_prefixes=False)
    assert pool.num_rows == 992
    held = []
    for _ in range(500):
        if held and rng.random() < 0.5:
            pool.release(held.pop(rng.randrange(len(held))))
        elif (extent := take(pool, (1,), rng.randint(1, 300))) is not None:
            assert extent.start % BLOCK == extent.num_rows % BLOCK == 0
            held.append(extent)
        rows = [row for extent in held for row in range(extent.start, extent.start + extent.num_rows)]
        assert len(rows) == len(set(rows)) == pool.num_held
        assert pool.num_held + pool.num_free == pool.num_rows
    for extent in held:
        pool.release(extent)
    assert take(pool, (1,), 992) is not None  # one run of rows again


def test_longest_shared_prefix_is_found():
    pool = ExtentPool(1024)
    for ids in ((1, 2, 3, 4), (1, 2, 9, 9, 9), (5, 5)):
        pool.release(take(pool, ids))
    extent, length = pool.find(None, (1, 2, 9, 9, 7))
    assert (extent.ids, length) == ((1, 2, 9, 9, 9), 4)
    assert pool.find(None, (7, 7)) == (None, 0)
    assert pool.find("adapter", (1, 2, 3, 4)) == (None, 0)
    # The last token is always computed.
    assert pool.find(None, (1, 2, 3, 4))[1] == 3


def test_rows_not_yet_computed_are_not_found():
    pool = ExtentPool(1024)
    extent = pool.allocate(None, (1, 2, 3, 4), 4, None)
    extent.num_ready = 2
    assert pool.find(None, (1, 2, 3, 4))[1] == 2


def test_same_prompt_is_kept_once():
    pool = ExtentPool(1024)
    first, second, longer = take(pool, (1, 2, 3)), take(pool, (1, 2, 3)), take(pool, (1, 2, 3, 4))
    for extent in (longer, first, second):
        pool.release(extent)
    assert pool.num_kept == BLOCK
    assert pool.find(None, (1, 2, 3, 4, 5))[1] == 4


def test_kept_prefix_frees_the_rows_of_its_answer():
    pool = ExtentPool(1024)
    pool.release(take(pool, tuple(range(20)), 500))
    assert (pool.num_kept, pool.num_free) == (32, 992)


def test_least_recently_used_prefix_is_dropped_but_never_the_one_to_copy():
    pool = ExtentPool(64)
    for start in (1, 2, 3, 4):
        pool.release(take(pool, (start,) * 16))
    source, _ = pool.find(None, (1,) * 20)
    assert take(pool, (1,) * 12, 16, spare=source) is not None
    assert pool.find(None, (2,) * 20)[0] is None
    assert pool.find(None, (1,) * 20)[1] == 16
    assert take(pool, (9,), 64, spare=source) is None


def test_prefixes_of_an_unloaded_adapter_are_dropped():
    pool = ExtentPool(64)
    pool.release(take(pool, (1,) * 16, adapter="a"))
    pool.release(take(pool, (1,) * 16))
    pool.forget("a")
    assert pool.find("a", (1,) * 20)[0] is None
    assert pool.find(None, (1,) * 20)[1] == 16


@pytest.mark.parametrize("seed", range(4))
def test_no_extent_shares_a_longer_prefix_than_the_one_found(seed):
    rng = random.Random(seed)
    pool, active, everything = ExtentPool(4096), [], []
    for _ in range(400):
        ids = tuple(rng.randrange(3) for _ in range(rng.randint(1, 12)))
        adapter = rng.choice([None, "a", "b"])
        best = max(
            (
                common_length(each.ids, ids, min(each.num_ready, len(ids) - 1))
                for each in everything
                if each.adapter == adapter
            ),
            default=0,
        )
        found, length = pool.find(adapter, ids)
        assert length == best
        if found is not None:
            assert (found.adapter, found.ids[:length]) == (adapter, ids[:length])
            pool.touch(found)
        extent = take(pool, ids, rng.randint(len(ids), 60), adapter, found)
        if extent is not None:
            extent.num_ready = rng.randint(1, len(ids))
            active.append(extent)
        while len(active) > 5 or (extent is None and active):
            pool.release(active.pop(rng.randrange(len(active))))
        everything = [*pool._held.values(), *pool._kept.values()]
        kept = [(each.adapter, each.ids) for each in pool._kept.values()]
        assert len(kept) == len(set(kept))
        assert sum(len(each) for each in pool._in_order.values()) == len(kept)
        assert pool.num_held + pool.num_kept + pool.num_free == pool.num_rows


def test_look_up_compares_few_of_a_thousand_kept_prompts(monkeypatch):
    pool = ExtentPool(BLOCK * 1100)
    for number in range(1000):
        pool.release(take(pool, (1, 2, number, 4)))
    calls = []
    monkeypatch.setattr(kv_cache, "common_length", lambda *args: calls.append(1) or common_length(*args))
    assert pool.find(None, (1, 2, 500, 4, 5))[1] == 4
    assert pool.find(None, (1, 2, 5000, 4, 5))[1] == 2
    assert len(calls) <= 4


@pytest.mark.parametrize("length", [0, 1, 5, 7])
def test_common_length(length):
    left = tuple(range(7))
    right = (*range(length), *(99 for _ in range(7 - length)))
    assert common_length(left, right, 7) == length
    assert common_length(left, right, 3) == min(length, 3)
