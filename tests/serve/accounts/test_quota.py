"""Quotas of requests and tokens a minute, with a manual clock."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finlora.errors import QuotaError
from finlora.serve.accounts.keys import KeyRecord
from finlora.serve.accounts.quota import Quota


def make_key(name="a", **limits):
    return KeyRecord(id=name, salt="s", hash="0" * 64, **limits)


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def quota(clock):
    return Quota(lambda: clock[0])


def test_requests_of_the_last_minute_count(quota, clock):
    key = make_key(requests_per_minute=4)
    for _ in range(3):
        quota.take_request(key)
    clock[0] = 45.0
    quota.take_request(key)
    with pytest.raises(QuotaError, match=r"key 'a' may use 4 requests a minute.*try again in 15s") as refused:
        quota.take_request(key)
    assert (refused.value.retry_after_s, refused.value.kind) == (15, "requests")
    clock[0] = 60.0
    for _ in range(3):
        quota.take_request(key)
    with pytest.raises(QuotaError, match="try again in 45s"):
        quota.take_request(key)


def test_excess_tokens_are_taken_from_the_next_minutes(quota, clock):
    key = make_key(tokens_per_minute=60)
    quota.take_request(key)
    quota.take_tokens(key, 130)
    for now, wait in ((0.0, 120), (61.0, 59), (119.0, 1)):
        clock[0] = now
        with pytest.raises(QuotaError, match=rf"60 tokens a minute.*in {wait}s"):
            quota.take_request(key)
    clock[0] = 120.0
    assert quota.take_request(key)["tokens"].left == 50


def test_standing_says_what_is_left_and_when_nothing_is_used(quota, clock):
    key = make_key(requests_per_minute=4, tokens_per_minute=100)
    assert quota.take_request(key) == {"requests": (4, 3, 60.0), "tokens": (100, 100, 0.0)}
    quota.take_tokens(key, 30)
    clock[0] = 20.0
    assert quota.take_request(key) == {"requests": (4, 2, 60.0), "tokens": (100, 70, 40.0)}


def test_steady_requests_do_not_hold_each_other_up(quota, clock):
    """Entries that are merged must still expire: 100 a minute, one every 0.7 s, are never refused."""
    key = make_key(requests_per_minute=100)
    for number in range(1000):
        clock[0] = number * 0.7
        quota.take_request(key)
    assert len(quota._windows["a", "requests"]) < 130


def test_keys_have_separate_buckets_and_none_means_no_limit(quota):
    quota.take_request(make_key("a", requests_per_minute=1))
    quota.take_request(make_key("b", requests_per_minute=1))
    for _ in range(1000):
        quota.take_request(make_key("c"))
        quota.take_tokens(make_key("c"), 10**6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    limit=st.integers(1, 50),
    steps=st.lists(st.tuples(st.floats(0, 40), st.integers(0, 200)), min_size=1, max_size=80),
)
def test_no_minute_admits_more_than_the_limit(limit, steps):
    """In any 60 s: at most the limit of requests, and of tokens before the last answer."""
    now = [0.0]
    quota, key = Quota(lambda: now[0]), make_key(requests_per_minute=limit, tokens_per_minute=100 * limit)
    taken: list[tuple[float, int]] = []
    for wait, tokens in steps:
        now[0] += wait
        for _ in range(3):
            try:
                quota.take_request(key)
            except QuotaError:
                continue
            quota.take_tokens(key, tokens)
            taken.append((now[0], tokens))
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            if taken[last][0] - taken[first][0] < 60:
                assert last - first + 1 <= limit
                assert sum(count for _, count in taken[first:last]) < 100 * limit


def test_ten_thousand_keys_have_their_own_buckets():
    now = [0.0]
    quota = Quota(lambda: now[0])
    keys = [make_key(f"k{number}", requests_per_minute=2) for number in range(10_000)]
    started = time.process_time()
    for _ in range(2):
        for key in keys:
            quota.take_request(key)
    for key in keys[::100]:
        with pytest.raises(QuotaError, match=f"key '{key.id}' may use 2"):
            quota.take_request(key)
    assert time.process_time() - started < 5
    now[0] = 60.0
    for key in keys[::100]:
        quota.take_request(key)
