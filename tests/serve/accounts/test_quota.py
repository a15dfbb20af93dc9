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


def test_requests_refill_evenly_over_the_minute(quota, clock):
    key = make_key(requests_per_minute=4)
    for _ in range(4):
        quota.take_request(key)
    with pytest.raises(QuotaError, match=r"key 'a' may use 4 requests a minute.*ask again in 15 s") as refused:
        quota.take_request(key)
    assert refused.value.retry_after_s == 15
    clock[0] = 15.0
    quota.take_request(key)
    with pytest.raises(QuotaError):
        quota.take_request(key)
    clock[0] = 1e6
    for _ in range(4):
        quota.take_request(key)
    with pytest.raises(QuotaError):
        quota.take_request(key)


def test_excess_tokens_are_taken_from_the_next_minute(quota, clock):
    key = make_key(tokens_per_minute=60)
    quota.take_request(key)
    quota.take_tokens(key, 100)
    with pytest.raises(QuotaError, match=r"60 tokens a minute.*in 41 s"):
        quota.take_request(key)
    clock[0] = 41.0
    quota.take_request(key)


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
def test_any_interval_admits_at_most_its_refill_and_one_full_bucket(limit, steps):
    """In any time t: at most limit (1 + t / 60) requests, and as many tokens plus those of one answer."""
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
            allowed = limit * (1 + (taken[last][0] - taken[first][0]) / 60)
            assert last - first + 1 <= allowed + 1e-6
            assert sum(count for _, count in taken[first:last]) <= 100 * allowed + 1e-6


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
    now[0] = 30.0
    for key in keys[::100]:
        quota.take_request(key)
